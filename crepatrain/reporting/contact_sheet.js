"use strict";
const rows = document.getElementById("rows");
const all = Array.from(rows.children);
const find = document.getElementById("find"), warning = document.getElementById("warning"), order = document.getElementById("order");

function show() {
  const words = find.value.toLowerCase(), kind = warning.value;
  let count = 0;
  for (const row of all) {
    const kinds = JSON.parse(row.dataset.kinds);
    const wanted = kind === "" || (kind === "*" ? kinds.length > 0 : kinds.includes(kind));
    row.hidden = !(wanted && row.textContent.toLowerCase().includes(words));
    count += !row.hidden;
  }
  document.getElementById("count").value = `${count} shown`;
}

function sort() {
  const key = order.value, sign = ["number", "kept"].includes(key) ? 1 : -1;
  const value = (row) => Number(row.dataset[key]);
  all.sort((a, b) => sign * (value(a) - value(b)) || Number(a.dataset.number) - Number(b.dataset.number));
  rows.append(...all);
}

// The strip is read only when it is asked for: hundreds of moving pictures at once would stop the page.
rows.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  const image = button.querySelector("img"), row = button.closest("article");
  const playing = image.dataset.still !== undefined;
  if (playing) {
    image.src = image.dataset.still;
    delete image.dataset.still;
  } else {
    image.dataset.still = image.src;
    image.src = row.dataset.moving;
  }
  button.setAttribute("aria-pressed", String(!playing));
});
find.addEventListener("input", show);
warning.addEventListener("change", show);
order.addEventListener("change", sort);
document.querySelector("form.tools").addEventListener("submit", (event) => event.preventDefault());
