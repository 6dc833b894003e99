"use strict";
// Draws the charts of a report from the numbers in it. No library, no network.
const SVG = "http://www.w3.org/2000/svg";
const PAD = { left: 52, right: 16, top: 10, bottom: 24 };
const HEIGHT = 230;

function svg(tag, attributes, parent) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (parent) parent.appendChild(made);
  return made;
}

function html(tag, text, parent) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (parent) parent.appendChild(made);
  return made;
}

const paint = (name) => (name === "ink" || name === "muted" ? `var(--${name === "ink" ? "soft" : "muted"})` : `var(--${name})`);

function number(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size < 1e-3 || size >= 1e6) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(4)));
}

function ticks(low, high, wanted) {
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  return found;
}

// The series as they are drawn: stacked ones with the height on which each stands.
function placed(chart, hidden) {
  const stacked = chart.kind === "stack" || chart.kind === "stackedbars";
  const shown = chart.series.filter((one) => !hidden.has(one.name));
  let base = null;
  return shown.map((one) => {
    const from = stacked ? base || one.y.map(() => 0) : null;
    const to = stacked ? one.y.map((value, index) => value + from[index]) : one.y;
    base = to;
    return { ...one, from, to };
  });
}

function line(points) {
  return points.map(([x, y], index) => `${index ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
}

function draw(figure, chart, hidden) {
  const plot = figure.querySelector(".plot");
  const width = plot.clientWidth;
  if (!width) return;
  plot.replaceChildren();
  const bars = chart.kind === "bars" || chart.kind === "stackedbars";
  const root = svg("svg", { width, height: HEIGHT, "aria-hidden": "true" }, plot);
  const clip = `clip-${chart.key}`;
  const inner = { width: width - PAD.left - PAD.right, height: HEIGHT - PAD.top - PAD.bottom };
  svg("rect", { x: PAD.left, y: PAD.top - 1, width: inner.width, height: inner.height + 2 }, svg("clipPath", { id: clip }, svg("defs", {}, root)));

  let [first, last] = bars ? [-0.5, chart.categories.length - 0.5] : STEPS;
  if (first === last) [first, last] = [first - 1, last + 1];
  const x = (value) => PAD.left + ((value - first) / (last - first)) * inner.width;
  const y = (value) => PAD.top + (1 - (value - chart.low) / (chart.high - chart.low)) * inner.height;

  for (const at of ticks(chart.low, chart.high, 4)) {
    svg("line", { x1: PAD.left, x2: width - PAD.right, y1: y(at), y2: y(at), stroke: "var(--line)" }, root);
    svg("text", { x: PAD.left - 7, y: y(at) + 4, "text-anchor": "end" }, root).textContent = number(at) + (chart.unit ? ` ${chart.unit}` : "");
  }
  svg("line", { x1: PAD.left, x2: width - PAD.right, y1: HEIGHT - PAD.bottom, y2: HEIGHT - PAD.bottom, stroke: "var(--axis)" }, root);
  if (bars) {
    const room = Math.max(Math.floor(inner.width / chart.categories.length / 6.2), 4);
    chart.categories.forEach((name, index) => {
      const label = svg("text", { x: x(index), y: HEIGHT - 7, "text-anchor": "middle" }, root);
      label.textContent = name.length > room ? `${name.slice(0, room - 1)}…` : name;
    });
  } else {
    for (const at of ticks(first, last, Math.max(Math.floor(inner.width / 70), 2)).filter(Number.isInteger)) {
      const end = x(at) > width - 30 ? "end" : "middle";
      svg("text", { x: end === "end" ? width - 4 : x(at), y: HEIGHT - 7, "text-anchor": end }, root).textContent = at.toLocaleString("en");
    }
  }

  const area = svg("g", { "clip-path": `url(#${clip})` }, root);
  const shown = placed(chart, hidden);
  if (bars) drawBars(area, chart, shown, x, y);
  else for (const one of shown) drawSeries(area, chart, one, x, y);
  for (const level of chart.levels) {
    svg("line", { x1: PAD.left, x2: width - PAD.right, y1: y(level.at), y2: y(level.at), stroke: paint(level.color), "stroke-dasharray": "2 3", "stroke-width": 1.5 }, area);
    svg("text", { x: width - PAD.right - 4, y: y(level.at) - 5, "text-anchor": "end", class: "mark" }, area).textContent = level.name;
  }
  chart.marks.forEach((mark, index) => {
    svg("line", { x1: x(mark.at), x2: x(mark.at), y1: PAD.top, y2: HEIGHT - PAD.bottom, stroke: paint(mark.color), "stroke-dasharray": "4 3" }, area);
    const left = x(mark.at) > width - 150;
    svg("text", { x: x(mark.at) + (left ? -5 : 5), y: HEIGHT - PAD.bottom - 8 - 14 * (index % 4), "text-anchor": left ? "end" : "start", class: "mark" }, area).textContent = mark.name;
  });
  const cursor = svg("g", {}, root);
  figure.state = { chart, shown, x, y, first, last, cursor, bars };
}

function drawSeries(area, chart, one, x, y) {
  const points = one.x.map((step, index) => [x(step), y(one.to[index])]);
  const color = paint(one.color);
  if (chart.kind === "stack") {
    const floor = one.x.map((step, index) => [x(step), y(one.from[index])]).reverse();
    svg("path", { d: `${line(points)}${line(floor).replace("M", "L")}Z`, fill: color, "fill-opacity": 0.85, stroke: "var(--card)", "stroke-width": 0.75 }, area);
    return;
  }
  const looks = { raw: { "stroke-width": 1, "stroke-opacity": new Set(chart.series.map((all) => all.name)).size > 2 ? 0.25 : 0.45 }, dashed: { "stroke-width": 1.75, "stroke-dasharray": "5 4" }, line: { "stroke-width": 2 }, dots: { "stroke-width": 1.75 } };
  svg("path", { d: line(points), fill: "none", stroke: color, "stroke-linejoin": "round", ...looks[one.look] }, area);
  if (one.look === "dots" || points.length < 2) for (const [cx, cy] of points) svg("circle", { cx, cy, r: 3.5, fill: color }, area);
}

function drawBars(area, chart, shown, x, y) {
  const slot = x(1) - x(0);
  const stacked = chart.kind === "stackedbars";
  const room = Math.min(slot * 0.72, stacked ? 84 : 64 * shown.length);
  const width = stacked ? room : room / Math.max(shown.length, 1);
  shown.forEach((one, place) => {
    one.x.forEach((category, index) => {
      const left = x(category) - room / 2 + (stacked ? 0 : place * width);
      const from = stacked ? one.from[index] : 0;
      svg("rect", { x: left + 1, width: Math.max(width - 2, 1), y: y(one.to[index]), height: Math.max(y(from) - y(one.to[index]), 0), rx: stacked ? 0 : 2, fill: paint(one.color) }, area);
    });
  });
}

function nearest(values, wanted) {
  let best = 0;
  values.forEach((value, index) => { if (Math.abs(value - wanted) < Math.abs(values[best] - wanted)) best = index; });
  return best;
}

// What is under the pointer: `at` is a step, or the index of a category.
function point(figure, at) {
  const { chart, shown, x, y, first, last, cursor, bars } = figure.state;
  const tip = figure.querySelector(".tip");
  cursor.replaceChildren();
  const steps = shown.flatMap((one) => (one.x.length ? [one.x[nearest(one.x, at)]] : []));
  if (!steps.length) return;
  const step = bars ? Math.round(at) : steps[nearest(steps, at)];
  tip.replaceChildren();
  html("b", bars ? chart.categories[step] : `step ${step.toLocaleString("en")}`, tip);
  if (!bars) svg("line", { x1: x(step), x2: x(step), y1: PAD.top, y2: HEIGHT - PAD.bottom, stroke: "var(--axis)" }, cursor);
  const rows = chart.kind.startsWith("stack") ? [...shown].reverse() : shown;
  const smooth = new Set(shown.filter((one) => one.look === "raw").map((one) => one.name));
  let total = 0;
  for (const one of rows) {
    const index = bars ? one.x.indexOf(step) : nearest(one.x, step);
    if (index < 0 || !one.x.length) continue;
    const row = html("div", undefined, tip);
    html("span", undefined, row).className = "dot";
    row.firstChild.style.background = paint(one.color);
    const about = (smooth.has(one.name) ? (one.look === "raw" ? ", as logged" : ", smoothed") : "") + (bars || Math.abs(one.x[index] - step) <= (last - first) / 200 ? "" : ` (step ${one.x[index]})`);
    html("span", one.name + about, row);
    html("span", `${number(one.y[index])}${chart.unit ? ` ${chart.unit}` : ""}`, row);
    total += one.y[index];
    if (!bars && chart.kind === "line") svg("circle", { cx: x(one.x[index]), cy: Math.min(Math.max(y(one.y[index]), PAD.top), HEIGHT - PAD.bottom), r: 3.5, fill: paint(one.color), stroke: "var(--card)", "stroke-width": 1.5 }, cursor);
  }
  if (chart.kind.startsWith("stack")) {
    const row = html("div", undefined, tip);
    html("span", "together", row);
    html("span", `${number(total)} ${chart.unit}`, row);
  }
  tip.hidden = false;
  const plot = figure.querySelector(".plot");
  const full = plot.getBoundingClientRect().left + x(step) + 24 + tip.offsetWidth > document.documentElement.clientWidth;
  tip.style.left = `${plot.offsetLeft + x(step) + (full ? -14 - tip.offsetWidth : 14)}px`;
  tip.style.top = `${plot.offsetTop + 8}px`;
  figure.at = step;
}

function leave(figure) {
  figure.querySelector(".tip").hidden = true;
  figure.state.cursor.replaceChildren();
}

function swatch(one, kind) {
  const made = svg("svg", { width: 18, height: 10 });
  if (kind === "line") svg("line", { x1: 0, x2: 18, y1: 5, y2: 5, stroke: paint(one.color), "stroke-width": 2.5, "stroke-dasharray": one.look === "dashed" ? "5 3" : "none" }, made);
  else svg("rect", { x: 3, y: 0, width: 10, height: 10, rx: 3, fill: paint(one.color) }, made);
  return made;
}

function build(figure, chart) {
  const hidden = new Set();
  const legend = html("div", undefined, figure);
  legend.className = "legend";
  const named = chart.series.filter((one) => one.look !== "raw");
  if (named.length > 1) for (const one of named) {
    const button = html("button", undefined, legend);
    button.append(swatch(one, chart.kind), one.name);
    button.setAttribute("aria-pressed", "true");
    button.title = "show or hide";
    button.onclick = () => {
      if (!hidden.delete(one.name)) hidden.add(one.name);
      button.setAttribute("aria-pressed", String(!hidden.has(one.name)));
      draw(figure, chart, hidden);
    };
  }
  const plot = html("div", undefined, figure);
  plot.className = "plot";
  plot.tabIndex = 0;
  plot.setAttribute("role", "img");
  const ends = named.filter((one) => one.y.length).map((one) => `${one.name} from ${number(one.y[0])} to ${number(one.y[one.y.length - 1])}`);
  plot.setAttribute("aria-label", `${chart.title}: ${ends.join("; ")}`);
  const tip = html("div", undefined, figure);
  tip.className = "tip";
  tip.hidden = true;
  plot.onpointermove = (event) => {
    const { first, last } = figure.state;
    const share = (event.clientX - plot.getBoundingClientRect().left - PAD.left) / (plot.clientWidth - PAD.left - PAD.right);
    point(figure, first + Math.min(Math.max(share, 0), 0.9999) * (last - first));
  };
  plot.onpointerleave = () => leave(figure);
  plot.onblur = () => leave(figure);
  plot.onkeydown = (event) => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!way) return;
    event.preventDefault();
    const steps = [...new Set(figure.state.shown.flatMap((one) => one.x))].sort((a, b) => a - b);
    if (!steps.length) return;
    const next = figure.at === undefined ? (way > 0 ? 0 : steps.length - 1) : nearest(steps, figure.at) + way;
    point(figure, steps[Math.min(Math.max(next, 0), steps.length - 1)]);
  };
  draw(figure, chart, hidden);
  new ResizeObserver(() => draw(figure, chart, hidden)).observe(plot);
}

function showPatches(image) {
  const rows = JSON.parse(image.dataset.cosine);
  image.onpointermove = (event) => {
    const box = image.getBoundingClientRect();
    const row = rows[Math.min(Math.floor(((event.clientY - box.top) / box.height) * rows.length), rows.length - 1)];
    image.title = `cosine ${row[Math.min(Math.floor(((event.clientX - box.left) / box.width) * row.length), row.length - 1)]}`;
  };
}

const charts = JSON.parse(document.getElementById("charts").textContent);
// One x axis for all, so that they can be read against each other.
const STEPS = charts.filter((chart) => chart.kind === "line" || chart.kind === "stack").flatMap((chart) => chart.series).flatMap((one) => one.x)
  .reduce(([low, high], step) => [Math.min(low, step), Math.max(high, step)], [Infinity, -Infinity]);
for (const figure of document.querySelectorAll("figure[data-chart]")) build(figure, charts[figure.dataset.chart]);
document.querySelectorAll("img.map").forEach(showPatches);
