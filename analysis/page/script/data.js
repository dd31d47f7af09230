// The study as build.py and texts.py stored it: runs, and the estimates of every text and pass.

const MISSING = -32768; // an estimate that is no number
const PER_NAT = 100; // values are hundredths of a nat

const study = JSON.parse(document.getElementById("study").textContent);
const runs = study.runs.map((run, index) => ({ ...run, index, texts: [] }));
const rows = study.rows.map((row, index) => ({ ...row, runs: runs.filter((run) => run.row === index) }));
let texts = [];

/** Fills `texts`, and the `texts` of each run. What packed() of texts.py wrote, read backwards. */
async function readTexts() {
  const numbers = await inflate(study.values);
  let at = 0;
  texts = study.texts.map(([run, prompt, step, first, count, tokens, passes, plain]) => {
    const text = {
      run: runs[run], prompt, step, first, plain,
      tokens: study.tokens[tokens].slice(0, count), passes: study.passes[passes],
    };
    let before = new Int16Array(count);
    text.values = text.passes.map(() => {
      before = before.map((value, index) => value + numbers[at + index]);
      at += count;
      return before;
    });
    text.run.texts.push(text);
    return text;
  });
  for (const text of texts) {
    text.settles = numbers.slice(at, at + text.tokens.length);
    at += text.tokens.length;
    text.plain = text.plain === null ? null : texts[text.plain];
  }
}

/** Base64 of zlib of all low bytes, then all high bytes → Uint16Array. */
async function inflate(base64) {
  const packed = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const bytes = new Uint8Array(await new Response(stream).arrayBuffer());
  const half = bytes.length / 2;
  return Uint16Array.from({ length: half }, (_, i) => bytes[i] + 256 * bytes[half + i]);
}

/** The text of a run, or undefined. */
function textOf(run, prompt, step) {
  return run.texts.find((text) => text.prompt === prompt && text.step === step);
}

/** Which of a text's tokens, here and at every strength, has this position. */
function tokenAt(position) {
  return position - textOf(view.a, view.prompt, view.step).first;
}

/** The estimates after a pass: after the last one that is kept nothing moves. */
function rowAt(text, pass) {
  return text.values[Math.max(0, text.passes.findLastIndex((kept) => kept <= pass))];
}

/** Whether the page has the estimates of a pass; a thinned one may lack them. */
function hasPass(text, pass) {
  return text.passes.includes(pass) || pass > text.passes.at(-1);
}

/** Surprise of a token in nats, -log of its probability; null where there is no number. */
function surprise(text, pass, token) {
  const value = rowAt(text, pass)[token];
  return value === MISSING || value === undefined ? null : -value / PER_NAT + 0;
}

/** Surprise less the plain model's; null where that is not known. */
function change(text, pass, token) {
  if (!text.plain) return null;
  const now = surprise(text, pass, token);
  const plain = surprise(text.plain, 1, token);
  return now === null || plain === null ? null : now - plain;
}

/** Mean of a measure over the tokens that something predicts: all but the first. */
function mean(text, pass, measure) {
  let sum = 0;
  let count = 0;
  for (let token = 1; token < text.tokens.length; token += 1) {
    const value = measure(text, pass, token);
    if (value === null) return null;
    sum += value;
    count += 1;
  }
  return count ? sum / count : null;
}

/** The runs that differ from this one in strength alone, itself among them, weakest first. */
function siblings(run) {
  return runs
    .filter((other) => other.texts.length && sameSettings(run, other))
    .sort((one, other) => (one.strength ?? -Infinity) - (other.strength ?? -Infinity));
}

function sameSettings(run, other) {
  return run.settings.every((value, index) => value === other.settings[index]);
}
