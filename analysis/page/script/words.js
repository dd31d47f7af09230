// Numbers and texts as they are shown. Whatever came from a run passes through textContent.

/** An element with properties and a text. */
function make(name, properties = {}, text = undefined) {
  const element = Object.assign(document.createElement(name), properties);
  if (text !== undefined) element.textContent = text;
  return element;
}

/** A number with a true minus sign; `digits` after the point, or as few as it needs. */
function number(value, digits = undefined, signed = false) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  const zero = Number(value.toFixed(digits ?? 6)) === 0;
  const plain = digits === undefined ? String(Number(value.toPrecision(12))) : value.toFixed(digits);
  const text = zero ? plain.replace("-", "") : plain;
  return (signed && value > 0 && !zero ? "+" : "") + text.replace("-", "−");
}

/** `β = 0.5`; a hidden state has a scale s instead. */
function strengthName(run) {
  if (run.strength === null) return "no feedback";
  const kind = run.settings[study.settings.indexOf("kind")] ?? study.kind;
  return `${kind === "hidden_state" ? "s" : "β"} = ${number(run.strength)}`;
}

// what would be invisible, end the line, or turn the text around
const HIDDEN = /[\p{C}\p{Zl}\p{Zp}\p{Variation_Selector}]/gu;

/** A token with every hidden character made visible. */
function visible(token) {
  return token.replace(HIDDEN, (letter) => {
    const code = letter.codePointAt(0);
    if (letter === "\n") return "↵";
    if (code < 0x20) return String.fromCodePoint(0x2400 + code);
    return `⟨${code.toString(16).toUpperCase().padStart(4, "0")}⟩`;
  });
}
