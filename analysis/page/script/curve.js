// The path of a token, or of the whole text, at every strength; drawn by uPlot.

let plot = null;
let plotted = ""; // whose curves `plot` shows
let pathOf = null; // of which token
const LABELS = 88; // pixels at the right for the names of the curves

function drawCurve() {
  const position = view.hover ?? view.token;
  const token = position === null ? null : tokenAt(position);
  const all = family();
  const text = textOf(view.a, view.prompt, view.step);
  // a text that was written otherwise has another token there
  const lines = all.filter(([, other]) => token === null || other.tokens[token] === text.tokens[token]);
  const measure = ([, text], pass) =>
    token === null ? mean(text, pass, surprise) : surprise(text, pass, token);
  const passes = Array.from({ length: lastPass() }, (_, index) => index + 1);
  const title = document.getElementById("curve-title");
  const what = token === null ? "the whole text, a token on average" : "";
  title.replaceChildren("Surprise after each pass: ", what);
  if (token !== null) title.append(make("bdi", {}, `“${visible(text.tokens[token])}”`));
  document.getElementById("curve-hint").textContent =
    `nats; ${lines.length > 1 ? "one curve per strength, the two above in colour; " : ""}click to go to a pass`;
  const said = lines
    .filter(([run]) => run === view.a || run === view.b)
    .map((line) => `${strengthName(line[0])}: ${number(measure(line, view.pass), 2)}`);
  document.getElementById("curve").setAttribute(
    "aria-label", `${title.textContent} Pass ${view.pass}: ${said.join("; ")} nats`);
  const drawn = lines.map(([run]) => run.index);
  const shown = [view.prompt, view.step, view.a.index, view.b?.index, dark.matches, ...drawn].join();
  if (shown === plotted && token === pathOf) {
    plot.redraw(false);
    return;
  }
  const point = (line) => (pass) => (hasPass(line[1], pass) ? measure(line, pass) : null);
  const data = [passes, ...lines.map((line) => passes.map(point(line)))];
  pathOf = token;
  if (shown === plotted) {
    plot.setData(data);
    return;
  }
  plotted = shown;
  const old = plot;
  plot = new uPlot(options(lines, passes.length), data, document.getElementById("curve"));
  old?.destroy();
}

function options(lines, last) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const series = lines.map(([run]) => {
    const place = run === view.a ? "a" : run === view.b ? "b" : "";
    return {
      stroke: colour(place || "other"),
      width: place ? 2.5 : 1,
      dash: place === "b" ? [7, 4] : undefined,
      points: { show: last === 1 },
      spanGaps: true,
    };
  });
  const axis = {
    stroke: colour("ink"), grid: { stroke: colour("line"), width: 1 },
    ticks: { stroke: colour("line"), width: 1 }, font: "12px system-ui, sans-serif",
  };
  return {
    ...size(),
    padding: [8, LABELS, 0, 0],
    legend: { show: false },
    cursor: { drag: { x: false, y: false }, points: { show: false }, y: false },
    scales: { x: { time: false, range: [1, Math.max(2, last)] } },
    series: [{}, ...series],
    axes: [
      { ...axis, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000], label: "pass", labelSize: 18, size: 32 },
      { ...axis, size: 50 },
    ],
    hooks: {
      draw: [(u) => markPass(u, colour("ink")), (u) => nameCurves(u, lines, colour)],
      ready: [(u) => u.over.addEventListener("click", () => show({ pass: passUnder(u) }))],
    },
  };
}

function passUnder(u) {
  return Math.round(u.posToVal(u.cursor.left, "x"));
}

function size() {
  const width = document.getElementById("curve").clientWidth;
  return { width, height: Math.round(Math.min(300, Math.max(200, width * 0.4))) };
}

function markPass(u, stroke) {
  const x = u.valToPos(view.pass, "x", true);
  const { top, height } = u.bbox;
  u.ctx.save();
  Object.assign(u.ctx, { strokeStyle: stroke, lineWidth: devicePixelRatio, globalAlpha: 0.7 });
  u.ctx.beginPath();
  u.ctx.moveTo(x, top);
  u.ctx.lineTo(x, top + height);
  u.ctx.stroke();
  u.ctx.restore();
}

/** Each curve's strength beside its end; where there is no room, those of the two sides only. */
function nameCurves(u, lines, colour) {
  const gap = 13 * devicePixelRatio;
  const ends = lines
    .map(([run], index) => ({ run, value: u.data[index + 1].at(-1) }))
    .filter(({ value }) => value !== null)
    .map(({ run, value }) => ({ run, y: u.valToPos(value, "y", true), own: run === view.a || run === view.b }))
    .sort((one, other) => other.own - one.own);
  const taken = [];
  u.ctx.save();
  Object.assign(u.ctx, { textAlign: "left", textBaseline: "middle" });
  for (const { run, y, own } of ends) {
    let at = y;
    if (own && taken.some((other) => Math.abs(other - at) < gap)) at += at < taken[0] ? -gap : gap;
    if (taken.some((other) => Math.abs(other - at) < gap)) continue;
    taken.push(at);
    u.ctx.fillStyle = colour(run === view.a ? "a" : run === view.b ? "b" : "soft");
    u.ctx.font = `${own ? "bold " : ""}${12 * devicePixelRatio}px system-ui, sans-serif`;
    u.ctx.fillText(strengthName(run), u.bbox.left + u.bbox.width + 5 * devicePixelRatio, at);
  }
  u.ctx.restore();
}
