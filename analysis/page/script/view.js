// What is looked at: one plain object, changed by `show` alone, and its spelling in the address.

const view = {
  a: null, b: null, // the runs on the left and on the right; b null: one alone
  prompt: 0, step: 0, pass: 1,
  colour: "change",
  token: null, // the one chosen, by its position: a window that slides has others first
  hover: null, // the one pointed at, for as long as it is
};

const sketches = []; // functions that bring a part of the page up to date

/** Changes the view, makes it possible, and draws it. */
function show(changes) {
  Object.assign(view, changes);
  settleView();
  setScales();
  for (const sketch of sketches) sketch();
  writeAddress();
}

/** The nearest view that exists: a run lacks some texts, a text some steps, passes and tokens. */
function settleView() {
  const family = siblings(view.a);
  if (family.length < 2) view.b = null;
  else if (!family.includes(view.b)) view.b = nearest(family, view.b ?? family.at(-1));
  const prompts = promptsOf(view.a);
  if (!prompts.includes(view.prompt)) view.prompt = prompts[0];
  const steps = stepsOf();
  view.step = steps.reduce((best, step) => (closer(step, best, view.step) ? step : best));
  view.pass = Math.min(Math.max(1, view.pass), lastPass());
  const { first, tokens } = textOf(view.a, view.prompt, view.step);
  for (const name of ["token", "hover"]) {
    if (!(view[name] >= first && view[name] < first + tokens.length)) view[name] = null;
  }
}

/** Beyond every pass and step: the last one there is. */
const LAST = Number.MAX_SAFE_INTEGER;

function closer(one, other, wanted) {
  return Math.abs(one - wanted) < Math.abs(other - wanted);
}

function nearest(family, run) {
  const wanted = run.strength ?? 0;
  return family.reduce((a, b) => (closer(b.strength ?? 0, a.strength ?? 0, wanted) ? b : a));
}

function promptsOf(run) {
  return [...new Set(run.texts.map((text) => text.prompt))].sort((one, other) => one - other);
}

function stepsOf() {
  const own = view.a.texts.filter((text) => text.prompt === view.prompt);
  return own.map((text) => text.step).sort((one, other) => one - other);
}

/** [run, text] of every strength. */
function family() {
  return siblings(view.a)
    .map((run) => [run, textOf(run, view.prompt, view.step)])
    .filter(([, text]) => text);
}

/** The last pass after which something still moved, at any strength. */
function lastPass() {
  return Math.max(...family().map(([, text]) => Math.max(text.passes.at(-1), ...text.settles)));
}

/** The first view: both ends of the strengths at rest, where most are, move, and changed most. */
function firstView() {
  const at = study.columns.findIndex(({ key }) => key === "change");
  const moves = (run) => run.texts.at(-1).passes.length > 1 && run.texts.at(-1).plain !== null;
  const weight = (run) =>
    siblings(run).length + 0.9 * Math.tanh(Math.abs(rows[run.row].measures[at]) || 0) + moves(run);
  const able = runs.filter((run) => run.texts.length);
  const all = siblings(able.reduce((best, run) => (weight(run) > weight(best) + 0.02 ? run : best)));
  const differs = ({ texts }) => ![null, texts.at(-1)].includes(texts.at(-1).plain);
  // else no token would have a colour
  const colour = all.some((run) => moves(run) || differs(run)) ? "change" : "surprise";
  return { ...view, a: all[0], b: all.length > 1 ? all.at(-1) : null, pass: LAST, step: LAST, colour };
}

function writeAddress() {
  const words = new URLSearchParams({
    a: view.a.id,
    ...(view.b && { b: view.b.id }),
    prompt: study.prompts[view.prompt],
    ...(stepsOf().length > 1 && { step: view.step }),
    pass: view.pass,
    colour: view.colour,
    ...(view.token !== null && { token: view.token }),
  });
  if (`#${words}` === location.hash) return; // a browser ignores what comes too often
  try {
    history.replaceState(null, "", `#${words}`);
  } catch {
    // a page inside another has no address of its own
  }
}

/** The view that the address spells; whatever it does not know stays as in `view`. */
function readAddress(view) {
  const words = new URLSearchParams(location.hash.slice(1));
  const run = (id) => runs.find((one) => one.id === id && one.texts.length);
  const whole = (name) => (/^\d{1,6}$/.test(words.get(name) ?? "") ? Number(words.get(name)) : null);
  const a = run(words.get("a"));
  const prompt = study.prompts.indexOf(words.get("prompt"));
  return {
    ...view,
    a: a ?? view.a,
    b: run(words.get("b")) ?? view.b,
    prompt: prompt < 0 ? view.prompt : prompt,
    step: whole("step") ?? view.step,
    pass: whole("pass") ?? view.pass,
    colour: Object.hasOwn(MODES, words.get("colour") ?? "") ? words.get("colour") : view.colour,
    token: whole("token"),
    hover: null,
  };
}
