// A click on a heading sorts its table: numbers by value, texts by the alphabet; once more, the other way.
function sortBy(heading) {
  const table = heading.closest("table"), body = table.tBodies[0];
  const up = heading.getAttribute("aria-sort") !== "ascending";
  const number = (row) => parseFloat(row.cells[heading.cellIndex].textContent.replace(/,/g, ""));
  const text = (row) => row.cells[heading.cellIndex].textContent;
  const rows = [...body.rows];
  const numeric = rows.every((row) => text(row) === "" || !isNaN(text(row).replace(/,/g, "")));
  rows.sort((a, b) => {
    if (text(a) === "" || text(b) === "") return (text(a) === "") - (text(b) === "");
    const order = numeric ? number(a) - number(b) : text(a).localeCompare(text(b));
    return up ? order : -order;
  });
  for (const each of table.tHead.rows[0].cells) each.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", up ? "ascending" : "descending");
  body.append(...rows);
}
for (const heading of document.querySelectorAll(".sortable th[tabindex]")) {
  heading.onclick = () => sortBy(heading);
  heading.onkeydown = (event) => { if (event.key === "Enter") sortBy(heading); };
}
