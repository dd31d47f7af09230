// The text on either side: a strength, its tokens in colour, and what is said of one of them.

/** Builds one side ("a" or "b") and registers its sketch. */
function makeSide(name) {
  const side = document.getElementById(`side-${name}`);
  const label = make("label", { htmlFor: `strength-${name}` });
  const slider = make("input", { type: "range", id: `strength-${name}`, min: 0, step: 1 });
  const about = make("p", { className: "mean" });
  const box = make("div", { className: "tokens", id: `tokens-${name}` });
  box.setAttribute("role", "listbox");
  side.append(label, slider, about, box);
  slider.addEventListener("input", () => show({ [name]: siblings(view.a)[slider.value] }));
  box.addEventListener("pointerover", (event) => point(tokenIn(event)));
  box.addEventListener("pointerleave", () => point(null));
  box.addEventListener("click", (event) => {
    const token = tokenIn(event);
    if (token !== null) show({ token: token === view.token ? null : token });
  });
  box.addEventListener("keydown", (event) => walk(event, box));
  let drawn = null;
  sketches.push(() => {
    const run = view[name];
    side.hidden = !run;
    if (!run) return;
    const all = siblings(view.a);
    label.textContent = strengthName(run);
    slider.max = all.length - 1;
    slider.value = all.indexOf(run);
    slider.hidden = all.length < 2;
    slider.setAttribute("aria-valuetext", strengthName(run));
    box.setAttribute("aria-label", `Tokens at ${strengthName(run)}`);
    const text = textOf(run, view.prompt, view.step);
    const words = JSON.stringify([text?.first, text?.tokens]);
    if (words !== drawn) fill(box, text); // else what has the focus keeps it
    drawn = words;
    about.textContent = text ? meanSentence(text) : "This run kept no such text.";
    if (text) paint(box, text);
  });
}

function fill(box, text) {
  const tokens = (text?.tokens ?? []).map((token, index) => {
    const element = make("span", { className: "token", tabIndex: -1 }, visible(token));
    element.setAttribute("role", "option");
    element.dataset.position = text.first + index;
    return element;
  });
  // a line of the text is a line here
  const breaks = tokens.flatMap((element, index) =>
    text.tokens[index].endsWith("\n") ? [element, make("br")] : [element]);
  box.replaceChildren(...breaks);
}

function paint(box, text) {
  const focusable = view.token ?? text.first;
  const pointed = view.hover ?? view.token;
  box.querySelectorAll(".token").forEach((element, token) => {
    const value = shownValue(view.colour, text, view.pass, token);
    const position = text.first + token;
    [element.style.backgroundColor, element.style.color] = colours(view.colour, value);
    element.classList.toggle("unsettled", view.colour === "settles" && value === null);
    element.classList.toggle("pointed", position === pointed);
    element.setAttribute("aria-selected", position === view.token);
    element.tabIndex = position === focusable ? 0 : -1;
  });
}

/** The position of the token that an event is about, or null. */
function tokenIn(event) {
  const element = event.target.closest?.(".token");
  return element ? Number(element.dataset.position) : null;
}

function point(token) {
  if (token !== view.hover) show({ hover: token });
}

/** Keys among the tokens choose one, as coming there by Tab does not; up and down are the pass. */
function walk(event, box) {
  const steps = { ArrowRight: 1, ArrowLeft: -1, Enter: 0 };
  const passes = { ArrowDown: 1, ArrowUp: -1 };
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  if (event.key in passes) show({ pass: view.pass + passes[event.key] });
  else if (event.key === "Escape") show({ token: null });
  else if (event.key in steps) {
    const tokens = [...box.querySelectorAll(".token")];
    const next = tokens.indexOf(event.target) + steps[event.key];
    const token = tokens[Math.min(Math.max(0, next), tokens.length - 1)];
    token.focus({ focusVisible: true });
    show({ token: Number(token.dataset.position), hover: null });
  } else return;
  event.preventDefault();
  event.stopPropagation();
}

function meanSentence(text) {
  const now = mean(text, view.pass, surprise);
  if (now === null && text.tokens.length > 1) return "no mean surprise: not every estimate is a number";
  const than = mean(text, view.pass, change);
  const kept = text.passes.findLast((pass) => pass <= view.pass);
  const after = hasPass(text, view.pass) ? "" : ` after pass ${kept}, the last one kept before`;
  const words = `mean surprise ${number(now, 2)} nats a token${after}`;
  const beside = than === null ? "the plain model's is not known" : `${number(than, 2, true)} against the plain model`;
  return `${words} (${beside})`;
}

/** One token in words, on both sides. */
function drawReadout() {
  const position = view.hover ?? view.token;
  const readout = document.getElementById("readout");
  readout.setAttribute("aria-live", view.hover === null && !playing() ? "polite" : "off");
  if (position === null) {
    readout.textContent = "Point at a token, or choose one, to see its path below.";
    return;
  }
  const token = tokenAt(position);
  const sides = [view.a, view.b]
    .filter(Boolean)
    .map((run) => [run, textOf(run, view.prompt, view.step)])
    .filter(([, text]) => text && token < text.tokens.length);
  const words = sides.map(([run, text]) => {
    const now = surprise(text, view.pass, token);
    const than = change(text, view.pass, token);
    const settles = text.settles[token];
    const own = text.tokens[token] === sides[0][1].tokens[token] ? "" : `, “${visible(text.tokens[token])}”`;
    if (token === 0) return `${strengthName(run)}${own}: nothing predicts the first token`;
    return [
      `${strengthName(run)}${own}: surprise ${number(now, 2)} nats`,
      now === null ? "" : `, probability ${percent(Math.exp(-now))}`,
      than === null ? "" : `, ${number(than, 2, true)} against the plain model`,
      settles ? `, settles at pass ${settles}` : now === null ? "" : ", still moving at the end",
    ].join("");
  });
  const name = make("bdi", {}, `“${visible(sides[0][1].tokens[token])}”`);
  const lines = words.map((line) => make("span", {}, line));
  readout.replaceChildren(name, ` token ${position}, pass ${view.pass}`, ...lines);
}

function percent(probability) {
  return `${Number((100 * probability).toPrecision(2))} %`;
}
