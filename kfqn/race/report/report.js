"use strict";
const {labels, curves} = JSON.parse(document.getElementById("data").textContent);
const hidden = new Set();

for (const box of document.querySelectorAll("[name=shown]"))
  box.addEventListener("change", () => {
    const entry = Number(box.value);
    if (box.checked) hidden.delete(entry); else hidden.add(entry);
    for (const path of document.querySelectorAll(`[data-entry="${entry}"]`)) path.toggleAttribute("hidden", !box.checked);
  });
for (const choice of document.querySelectorAll("[name=scale]"))
  choice.addEventListener("change", () => document.documentElement.classList.toggle("linear", choice.value === "linear"));

function nearest(xs, x) {
  let best = 0;
  xs.forEach((value, n) => { if (Math.abs(value - x) < Math.abs(xs[best] - x)) best = n; });
  return best;
}

function told(plot, x) {  // who is there, and with which value, the lowest first
  const {axis, quantity, end} = plot.dataset, found = [];
  curves.forEach((curve, entry) => {
    if (!curve || hidden.has(entry) || x > curve[axis].at(-1) + 0.02 * end) return;
    const n = nearest(curve[axis], x), [mean, error] = curve.values[quantity].map(values => values[n]);
    if (mean !== null) found.push({entry, mean, error});
  });
  return found.sort((a, b) => a.mean - b.mean);
}

function row({entry, mean, error}) {
  const line = document.createElement("tr"), swatch = line.insertCell();
  swatch.textContent = "■";
  swatch.style.color = document.querySelector(`path.curve[data-entry="${entry}"]`).style.stroke;
  line.insertCell().textContent = labels[entry];
  line.insertCell().textContent = Math.abs(mean) < 1e-3 ? mean.toExponential(2) : mean.toPrecision(3);
  line.insertCell().textContent = error ? `± ${Number(error.toPrecision(1))}` : "";
  return line;
}

function hide() {
  for (const box of document.querySelectorAll(".cross, .values")) box.hidden = true;
}

for (const plot of document.querySelectorAll(".plot")) {
  const cross = plot.querySelector(".cross"), values = plot.querySelector(".values");
  const show = event => {
    hide();
    const {left, width} = plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - left) / width)), x = share * plot.dataset.end;
    const head = document.createElement("tr"), cell = head.insertCell(), table = document.createElement("table");
    cell.colSpan = 4;
    cell.textContent = `${plot.dataset.label} ${plot.dataset.axis === "epoch" ? Math.round(x) : x.toPrecision(3)}`;
    table.append(head, ...told(plot, x).map(row));
    values.replaceChildren(table);
    cross.style.left = `${100 * share}%`;
    values.style.left = share < 0.5 ? "auto" : "0.3rem";
    values.style.right = share < 0.5 ? "0.3rem" : "auto";
    cross.hidden = values.hidden = false;
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") hide(); });
}
