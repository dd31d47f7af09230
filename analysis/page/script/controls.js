// Selects, the pass with its play button, and the keys.

const TICK = 350; // milliseconds a pass
let ticking = null;

function playing() {
  return ticking !== null;
}

function makeControls() {
  const choices = document.getElementById("choices");
  addSelect(choices, "colour", "Colour", () => Object.entries(MODES).map(([key, { name }]) => [key, name]),
    () => view.colour, (colour) => show({ colour }));
  if (study.prompts.length > 1) {
    addSelect(choices, "prompt", "Text", () => promptsOf(view.a).map((at) => [at, visible(study.prompts[at])]),
      () => view.prompt, (prompt) => show({ prompt: Number(prompt), token: null, pass: LAST }));
  }
  study.settings.forEach((name, index) => {
    const said = runs.filter((run) => run.texts.length).map((run) => run.settings[index]);
    const values = [...new Set(said)].sort((one, other) => compare(one, other, false));
    if (values.length < 2) return;
    addSelect(choices, `setting-${index}`, capital(name.replace(/[._]/g, " ")), () => values.map((value) => [value, value || "–"]),
      () => view.a.settings[index], (value) => {
        const a = withSetting(index, value);
        show({ a, pass: LAST, ...(!promptsOf(a).includes(view.prompt) && { token: null }) });
      });
  });
  if (texts.some((text) => text.step > 0)) {
    addSelect(choices, "step", "Tokens generated", () => stepsOf().map((step) => [step, step]),
      () => view.step, (step) => show({ step: Number(step) }));
  }
  const slider = document.getElementById("pass");
  slider.addEventListener("input", () => show({ pass: Number(slider.value) }));
  document.getElementById("play").addEventListener("click", togglePlay);
  document.addEventListener("keydown", pressed);
  sketches.push(() => {
    const last = lastPass();
    slider.max = last;
    slider.value = view.pass;
    slider.disabled = last < 2;
    document.getElementById("play").disabled = last < 2;
    const words = `${view.pass} of ${last}${placeOf(view.pass, last)}`;
    document.getElementById("pass-value").textContent = words;
    slider.setAttribute("aria-valuetext", words);
    drawLegend(document.getElementById("legend"), view.colour);
  });
}

/** What is special about a pass, if anything. */
function placeOf(pass, last) {
  const all = family().map(([, text]) => text);
  const parts = [];
  if (pass === 1 && all.every((text) => text.plain === text)) parts.push("the plain model");
  if (pass === last && all.every((text) => text.settles.every((settles) => settles))) parts.push("at rest");
  return parts.length ? ` – ${parts.join(", ")}` : "";
}

/** A labelled select; `options` gives [value, name] pairs anew each time. */
function addSelect(parent, id, name, options, chosen, change) {
  const label = make("label", {}, name);
  const select = make("select", { id: `choose-${id}` });
  label.append(select);
  parent.append(label);
  select.addEventListener("change", () => change(select.value));
  let filled = "";
  sketches.push(() => {
    const pairs = options();
    if (JSON.stringify(pairs) !== filled) {
      filled = JSON.stringify(pairs);
      select.replaceChildren(...pairs.map(([value, text]) => make("option", { value }, text)));
    }
    select.value = chosen();
  });
}

/** The run with this setting that is otherwise most like the one on the left. */
function withSetting(index, value) {
  const likeness = (run) =>
    run.settings.filter((setting, at) => setting === view.a.settings[at]).length;
  const able = runs.filter((run) => run.texts.length && run.settings[index] === value);
  const most = Math.max(...able.map(likeness));
  return nearest(able.filter((run) => likeness(run) === most), view.a);
}

function capital(name) {
  return name.slice(0, 1).toUpperCase() + name.slice(1);
}

function togglePlay() {
  if (playing()) return stop();
  if (view.pass >= lastPass()) show({ pass: 1 });
  ticking = setInterval(() => {
    show({ pass: view.pass + 1 });
    if (view.pass >= lastPass()) stop();
  }, TICK);
  drawPlay();
}

function stop() {
  clearInterval(ticking);
  ticking = null;
  drawPlay();
}

function drawPlay() {
  const button = document.getElementById("play");
  button.textContent = playing() ? "❚❚ Pause" : "▶ Play";
  button.setAttribute("aria-pressed", playing());
}

/** Keys of the whole page, where what has the focus has no use for them itself. */
function pressed(event) {
  if (event.altKey || event.ctrlKey || event.metaKey || !view.a) return;
  const busy = event.target.closest?.("input, select, .scroll");
  const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (way && !busy && event.shiftKey) {
    const name = view.b ? "b" : "a";
    const all = siblings(view.a);
    const next = all.indexOf(view[name]) + way;
    if (all[next]) show({ [name]: all[next] });
  } else if (way && !busy) {
    show({ pass: view.pass + way });
  } else if (event.key === " " && !busy && !event.target.closest?.("button")) {
    togglePlay();
  } else return;
  event.preventDefault();
}
