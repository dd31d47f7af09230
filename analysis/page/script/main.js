// What can be read at once is drawn first; the texts follow as soon as they are unpacked.

document.title = `${study.title}: a GPT fed its own estimates`;
document.getElementById("title").textContent = study.title;
document.getElementById("finding").textContent = study.finding;
makeTable();
drawProvenance();
start();

async function start() {
  if (!study.texts.length) {
    document.getElementById("without-texts").hidden = study.thinned.length > 0;
    return;
  }
  await readTexts();
  document.getElementById("touch").hidden = false;
  makeControls();
  makeSide("a");
  makeSide("b");
  sketches.push(drawReadout, drawCurve, markRows);
  fillTable(); // now it is known which runs can be shown
  show(readAddress(firstView()));
  window.addEventListener("hashchange", () => show(readAddress(firstView())));
  dark.addEventListener("change", () => show({}));
  new ResizeObserver(() => plot.setSize(size())).observe(document.getElementById("curve"));
  document.documentElement.dataset.ready = "true";
}

function drawProvenance() {
  const list = document.getElementById("provenance");
  for (const [name, values] of study.provenance) {
    list.append(make("dt", {}, name));
    for (const value of values) list.append(make("dd", {}, visible(value)));
  }
  const [texts, prompts] = study.whole;
  const note = document.getElementById("thinned");
  note.hidden = !texts;
  note.textContent = study.thinned.length
    ? `To stay small, this page keeps only: ${study.thinned.join("; ")}. Recorded were ${texts} texts and steps, of ${prompts} prompts. The table has every run.`
    : "Every recorded estimate is here, to 0.01 nats.";
  const leftOut = document.getElementById("left-out");
  leftOut.hidden = !study.leftOut.length;
  const reasons = study.leftOut.map(({ id, reason }) => `${id} (${reason})`);
  leftOut.textContent = `Not shown: ${reasons.join(", ")}.`;
}
