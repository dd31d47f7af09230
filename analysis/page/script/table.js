// A row a setting, its runs pooled; it sorts by any column, and its button shows a run beside the other.

const DIGITS = { rate: 3, lyapunov: 3, nll: 3, change: 3, half: 3, kl_effect: 3 };
const order = { column: null, down: false };

/** [heading, explanation, value of a row, whether a number, digits, its key] by column. */
function columns() {
  const strength = ["strength", "How much the estimates count", (row) => row.runs[0].strength, false];
  const settings = study.settings.map((name, index) => [
    name, "", (row) => row.runs[0].settings[index], false,
  ]).filter((_, index) => !study.seeds[index]);
  const count = ["runs", "Runs of one setting: what follows is their mean", (row) => row.count, true];
  const measures = study.columns.map(({ key, name, about }, index) => [
    name, about, (row) => row.measures[index], key !== "outcome", DIGITS[key], key,
  ]).filter(([, , value]) => rows.some((row) => value(row) !== null));
  return [strength, ...settings, ...(rows.length < runs.length ? [count] : []), ...measures];
}

function makeTable() {
  const table = document.getElementById("runs");
  const head = make("tr");
  const meanings = document.getElementById("columns");
  columns().forEach(([name, about, , counts], column) => {
    if (about) meanings.append(make("dt", {}, name), make("dd", {}, about));
    const button = make("button", { type: "button" }, name);
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
  const sorted = [...rows];
  if (order.column !== null) {
    const value = all[order.column][2];
    sorted.sort((one, other) => compare(value(one), value(other), order.down));
  }
  table.querySelectorAll("th[scope=col]").forEach((cell, column) => {
    const way = order.down ? "descending" : "ascending";
    cell.setAttribute("aria-sort", column === order.column ? way : "none");
  });
  table.tBodies[0].replaceChildren(...sorted.map((row) => tableRow(row, all)));
  if (view.a) markRows();
}

function tableRow(data, all) {
  const row = make("tr");
  row.dataset.row = data.runs[0].row;
  all.forEach(([, , value, counts, digits, key], column) => {
    const shown = value(data);
    const text = typeof shown === "number" ? number(shown, digits, key === "change") : shown;
    const cell = make(column ? "td" : "th", { className: counts ? "number" : "" });
    if (column) cell.textContent = text === null || text === "" ? "–" : key === "outcome" ? text.replaceAll("_", " ") : text;
    else {
      const able = data.runs.filter((run) => run.texts.length);
      cell.scope = "row";
      const name = strengthName(data.runs[0]);
      const ids = data.runs.map((run) => run.id).join(", ");
      const title = able.length ? `Show ${ids}` : `This page keeps no text of ${ids}`;
      const button = make("button", { type: "button", title }, name);
      button.disabled = !able.length;
      button.addEventListener("click", () => choose(able));
      cell.append(button);
    }
    row.append(cell);
  });
  return row;
}

/** A run of the same settings goes to the right; another brings its whole family along. */
function choose(able) {
  const run = able.find((one) => sameSettings(view.a, one));
  show(view.b && run ? { b: run } : { a: run ?? able[0] });
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
    row.classList.toggle("a", Number(row.dataset.row) === view.a.row);
    row.classList.toggle("b", Number(row.dataset.row) === view.b?.row);
  }
}
