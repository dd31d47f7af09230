// Colours that the colour-blind can tell apart; all begin at the ground of the page.

const SEQUENTIAL = {
  light: [ // YlGnBu, by Cynthia Brewer
    "#ffffd9", "#edf8b1", "#c7e9b4", "#7fcdbb", "#41b6c4", "#1d91c0", "#225ea8", "#253494", "#081d58",
  ],
  dark: [ // cividis
    "#00224e", "#002e6a", "#1a386f", "#32436d", "#434e6c", "#535a6d", "#61656f", "#6f7073", "#7d7c78",
    "#8c8878", "#9b9476", "#aba072", "#bcae6c", "#cdbb63", "#dec958", "#f0d846", "#fee838",
  ],
};
const DIVERGING = {
  light: ["#08407e", "#2b7bba", "#9cc6e4", "#ffffff", "#fdc48c", "#e8791c", "#8f3a02"],
  dark: ["#8cc8ff", "#3f8fd6", "#1d4468", "#15181c", "#693a10", "#d0701c", "#ffb878"],
};
const NICE = [0.05, 0.1, 0.2, 0.5, 1, 2, 3, 5, 8, 10, 15, 20];
const dark = window.matchMedia("(prefers-color-scheme: dark)");

// what a token's colour can say, its unit, and words for both ends of the scale
const MODES = {
  change: { name: "Change from the plain model", unit: "nats", ends: ["easier", "harder"] },
  surprise: { name: "Surprise (−log of its probability)", unit: "nats", ends: ["expected", "surprising"] },
  settles: { name: "Pass at which it settles", unit: "", ends: ["at once", "late"] },
};
let most = { change: 1, surprise: 10, settles: 1 }; // where the scales end
let scaled = ""; // for which settings

/** Ends that nearly all values lie within, the same for every strength, text and pass. */
function setScales() {
  const settings = JSON.stringify(view.a.settings);
  if (settings === scaled) return;
  scaled = settings;
  most = { change: 1, surprise: 10, settles: 1 };
  const found = { change: [], surprise: [] };
  for (const text of siblings(view.a).flatMap((run) => run.texts)) {
    const last = text.passes.at(-1);
    for (let token = 1; token < text.tokens.length; token += 1) {
      found.surprise.push(surprise(text, last, token) ?? 0);
      found.change.push(Math.abs(change(text, last, token) ?? 0));
    }
    for (const pass of text.settles) most.settles = Math.max(most.settles, pass);
  }
  for (const [mode, values] of Object.entries(found)) {
    values.sort((one, other) => one - other);
    const nearly = values[Math.floor(0.98 * (values.length - 1))] ?? 1;
    most[mode] = NICE.find((end) => end >= nearly) ?? NICE.at(-1);
  }
}

/** The number that a token's colour stands for, or null. */
function shownValue(mode, text, pass, token) {
  if (mode === "settles") return text.settles[token] || null;
  return mode === "change" ? change(text, pass, token) : surprise(text, pass, token);
}

/** [background, ink] of a value. What stands out from the ground is what deserves a look. */
function colours(mode, value) {
  if (value === null) return ["transparent", "inherit"];
  const scheme = dark.matches ? "dark" : "light";
  let stops = SEQUENTIAL[scheme];
  let place = value / most[mode];
  if (mode === "settles") place = (value - 1) / Math.max(1, most.settles - 1);
  if (mode === "change") {
    stops = DIVERGING[scheme];
    place = (place + 1) / 2;
  }
  const rgb = between(stops, Math.min(1, Math.max(0, place)));
  return [`rgb(${rgb.join(", ")})`, luminance(rgb) > 0.18 ? "#000" : "#fff"];
}

function between(stops, place) {
  const at = place * (stops.length - 1);
  const low = Math.min(stops.length - 2, Math.floor(at));
  const [from, to] = [channels(stops[low]), channels(stops[low + 1])];
  return from.map((value, index) => Math.round(value + (to[index] - value) * (at - low)));
}

function channels(hex) {
  return [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
}

/** Relative luminance, as WCAG defines contrast by it; roughly 0.18 has equal contrast to both. */
function luminance(rgb) {
  const [r, g, b] = rgb.map((value) => (value / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

/** The legend: a bar of the scale with its ends in numbers and words. */
function drawLegend(element, mode) {
  const { name, unit, ends } = MODES[mode];
  const low = { change: -most.change, surprise: 0, settles: 1 }[mode];
  const bar = make("span", { className: "bar" });
  const places = Array.from({ length: 13 }, (_, i) => low + ((most[mode] - low) * i) / 12);
  bar.style.background = `linear-gradient(to right, ${places.map((v) => colours(mode, v)[0])})`;
  const label = (value, word) => [number(Number(value.toPrecision(4))), unit, word];
  const texts = [label(low, `(${ends[0]})`), label(most[mode], `(${ends[1]})`)];
  const words = texts.map((parts) => parts.filter(Boolean).join(" "));
  element.replaceChildren(make("span", {}, words[0]), bar, make("span", {}, words[1]));
  if (mode === "settles") element.append(make("span", { className: "unsettled" }, "still moving"));
  element.setAttribute("aria-label", `Colours: ${name}, from ${words[0]} to ${words[1]}`);
}
