// The runs as a table that sorts by any column; a run's button shows it beside the other.

const DIGITS = { rate: 3, lyapunov: 3, nll: 3, change: 3, kl_effect: 3 };
const order = { column: null, down: false };

/** [heading, explanation, value of a run, whether a number, digits, its key] by column. */
function columns() {
  const strength = ["strength", "How much the estimates count", (run) => run.strength, false];
  const settings = study.settings.map((name, index) => [
    name, `Setting ${name}`, (run) => run.settings[index], false,
  ]);
  const measures = study.columns.map(({ key, name, about }, index) => [
    name, about, (run) => run.measures[index], key !== "outcome", DIGITS[key], key,
  ]);
  return [strength, ...settings, ...measures];
}

function makeTable() {
  const table = document.getElementById("runs");
  const head = make("tr");
  columns().forEach(([name, about, , counts], column) => {
    const button = make("button", { type: "button", title: about }, name);
    button.addEventListener("click", () => {
      order.down = order.column === column && !order.down;
      order.column = column;
      fillTable();
    });
    const cell = make("th", { scope: "col", className: counts ? "number" : "" });
    cell.append(button);
    head.append(cell);
  });
  const top = make("thead");
  top.append(head);
  table.replaceChildren(top, make("tbody"));
  fillTable();
}

function fillTable() {
  const table = document.getElementById("runs");
  const all = columns();
  const sorted = [...runs];
  if (order.column !== null) {
    const value = all[order.column][2];
    sorted.sort((one, other) => compare(value(one), value(other), order.down));
  }
  table.querySelectorAll("th[scope=col]").forEach((cell, column) => {
    const way = order.down ? "descending" : "ascending";
    cell.setAttribute("aria-sort", column === order.column ? way : "none");
  });
  table.tBodies[0].replaceChildren(...sorted.map((run) => tableRow(run, all)));
  if (view.a) markRows();
}

function tableRow(run, all) {
  const row = make("tr");
  row.dataset.run = run.index;
  all.forEach(([, , value, counts, digits, key], column) => {
    const shown = value(run);
    const text = typeof shown === "number" ? number(shown, digits, key === "change") : shown;
    const cell = make(column ? "td" : "th", { className: counts ? "number" : "" });
    if (column) cell.textContent = text === null || text === "" ? "–" : key === "outcome" ? text.replace("_", " ") : text;
    else {
      cell.scope = "row";
      const button = make("button", { type: "button", title: `Show run ${run.id}` }, strengthName(run));
      button.disabled = !run.texts.length;
      button.addEventListener("click", () => choose(run));
      cell.append(button);
    }
    row.append(cell);
  });
  return row;
}

/** A run of the same settings goes to the right; another brings its whole family along. */
function choose(run) {
  const beside = view.b && sameSettings(view.a, run);
  show(beside ? { b: run } : { a: run });
}

/** Numbers by size, words by the alphabet, what is missing always last. */
function compare(one, other, down) {
  const lacks = (value) => value === null || value === "";
  if (lacks(one) || lacks(other)) return lacks(one) - lacks(other);
  const numbers = typeof one === "number" && typeof other === "number";
  const way = numbers ? one - other : String(one).localeCompare(String(other), "en", { numeric: true });
  return down ? -way : way;
}

function markRows() {
  for (const row of document.getElementById("runs").tBodies[0].rows) {
    const run = runs[row.dataset.run];
    row.classList.toggle("a", run === view.a);
    row.classList.toggle("b", run === view.b);
  }
}
