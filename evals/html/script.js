// Tables sort by a click on a heading, and a grid of cells says the figure under the pointer.
"use strict";

function sortable(table) {
  const body = table.tBodies[0];
  const value = (row, column) => {
    const text = row.cells[column].textContent.trim();
    const number = parseFloat(text.replace(/,/g, "").replace("−", "-"));
    return Number.isNaN(number) ? text : number;
  };
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const falling = heading.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const rows = [...body.rows].sort((one, other) => {
        const [a, b] = [value(one, column), value(other, column)];
        const order = typeof a === typeof b ? (a > b) - (a < b) : typeof a === "number" ? -1 : 1;
        return falling ? -order : order;
      });
      body.append(...rows);
    });
  });
}

function pointed(svg) {
  const rows = svg.closest("figure").querySelector("table").tBodies[0].rows;
  const readout = document.createElement("output");
  readout.className = "readout";
  svg.closest(".plot").after(readout);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
    const row = at((event.clientY - box.top) / box.height, Number(svg.dataset.rows));
    const column = at((event.clientX - box.left) / box.width, Number(svg.dataset.columns));
    const [layer, cell] = [rows[row].cells[0], rows[row].cells[column + 1]];
    readout.textContent = cell
      ? `layer ${layer.textContent}, expert ${column}: ${cell.textContent}`
      : "";
  });
  svg.addEventListener("pointerleave", () => { readout.textContent = ""; });
}

document.querySelectorAll("table.sortable").forEach(sortable);
document.querySelectorAll("svg.cells").forEach(pointed);
