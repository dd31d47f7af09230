// A row a setting, its runs pooled; it sorts by any column, and its button shows a run beside the other.

const order = { column: null, down: false };
const counted = { name: "runs", about: "Runs of one setting: what follows is their mean", value: (row) => row.count };
// heading, meaning, the value of a row, whether it is words, and how many digits a number has
const columns = [
  { name: "strength", about: "How much the estimates count", value: (row) => row.runs[0].strength, words: true },
  ...study.settings
    .map((name, index) => ({ name, value: (row) => row.runs[0].settings[index], words: true }))
    .filter((_, index) => !study.seeds[index]),
  ...(rows.length < runs.length ? [counted] : []),
  ...study.columns
    .map((column, index) => ({
      ...column,
      value: (row) => row.measures[index],
      words: column.key === "outcome",
      digits: column.key === "iterations_to_tolerance" ? undefined : 3,
    }))
    .filter(({ value }) => rows.some((row) => value(row) !== null)),
];

function makeTable() {
  const head = document.querySelector("#runs thead tr");
  const meanings = document.getElementById("columns");
  for (const column of columns) {
    if (column.about) meanings.append(make("dt", {}, column.name), make("dd", {}, column.about));
    const button = make("button", { type: "button" }, column.name);
    button.addEventListener("click", () => {
      order.down = order.column === column && !order.down;
      order.column = column;
      fillTable();
    });
    head.append(make("th", { scope: "col", className: column.words ? "" : "number" }));
    head.lastChild.append(button);
  }
  fillTable();
}

function fillTable() {
  const table = document.getElementById("runs");
  const sorted = [...rows];
  if (order.column) {
    const { value } = order.column;
    sorted.sort((one, other) => compare(value(one), value(other), order.down));
  }
  table.querySelectorAll("th[scope=col]").forEach((cell, index) => {
    const way = order.down ? "descending" : "ascending";
    cell.setAttribute("aria-sort", columns[index] === order.column ? way : "none");
  });
  table.tBodies[0].replaceChildren(...sorted.map(tableRow));
  if (view.a) markRows();
}

function tableRow(data) {
  const able = data.runs.filter((run) => run.texts.length);
  const ids = data.runs.map((run) => run.id).join(", ");
  const title = able.length ? `Show ${ids}` : `This page keeps no text of ${ids}`;
  const button = make("button", { type: "button", title, disabled: !able.length }, strengthName(data.runs[0]));
  button.addEventListener("click", () => choose(able));
  const row = make("tr");
  row.dataset.row = data.runs[0].row;
  row.append(make("th", { scope: "row" }));
  row.lastChild.append(button);
  for (const { key, value, digits, words } of columns.slice(1)) {
    const found = value(data);
    const shown = typeof found === "number" ? number(found, digits, key === "change") : found || "–";
    const text = key === "outcome" ? shown.replaceAll("_", " ") : shown;
    row.append(make("td", { className: words ? "" : "number" }, text));
  }
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
