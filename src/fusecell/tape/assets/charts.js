"use strict";

// ---- charts: norms, saturation, memory lengths; drawn by Observable Plot ----

const drawnCharts = {};

/** Draw a chart into its place. */
function chart(place, options) {
  const box = byId(place);
  const plot = Plot.plot({
    width: Math.max(280, box.clientWidth), height: 240, marginLeft: 46, marginRight: 12,
    style: { background: "transparent", color: colour("--fore"), fontSize: "12px", overflow: "visible" }, ...options,
  });
  drawnCharts[place] = plot;
  box.replaceChildren(plot);
  saved(byId(`save-${place}`), () => pictureOfChart(plot, place));
  return plot;
}

/** The chart itself as a file; where it has a legend, Plot puts both into a figure. */
function pictureOfChart(plot, place) {
  const picture = (plot.matches("svg") ? plot : plot.querySelector(":scope > svg:last-of-type")).cloneNode(true);
  picture.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  picture.style.background = colour("--back");
  const content = new Blob([new XMLSerializer().serializeToString(picture)], { type: "image/svg+xml" });
  return Promise.resolve({ content, name: `${place}.svg` });
}

function drawCharts() {
  if (typeof Plot === "undefined") return;
  const track = tape.tracks[page.track], entries = shown(track), last = tape.lengths[page.row];
  drawNorms(entries.filter(({ value }) => !value.gate), last);
  const gates = entries.filter(({ value, name }) => value.gate && !track.states.includes(name) && name !== "output");
  for (const place of ["saturation", "memory"]) byId(place).parentElement.hidden = !gates.length;
  if (!gates.length) return;
  drawSaturation(gates, last);
  drawMemory(gates, last);
}

function drawNorms(entries, last) {
  // A line breaks where a norm is not finite.
  const points = entries.flatMap(({ label, value }) => Array.from({ length: last }, (_, step) => {
    const norm = Math.hypot(...vector(value, step));
    return { label, step, norm: Number.isFinite(norm) ? norm : NaN, said: format(norm, value, value.scale * Math.sqrt(value.size)) };
  }));
  const plot = chart("norms", {
    color: { legend: true, domain: entries.map(({ label }) => label) }, x: { label: say("steps") }, y: { label: null, grid: true },
    marks: [
      Plot.lineY(points, { x: "step", y: "norm", stroke: "label" }),
      Plot.ruleX([page.step], { stroke: colour("--mark"), strokeWidth: 2, className: "now" }),
      Plot.tip(points, Plot.pointer({
        x: "step", y: "norm", fill: colour("--back"), title: ({ label, step, said }) => `‖${label}‖, ${say("step")} ${step}: ${said}`,
      })),
    ],
  });
  plot.addEventListener("click", () => plot.value && go({ step: plot.value.step }));
  moveChartCursor();
}

/** Move the line of the present step, and draw nothing else. */
function moveChartCursor() {
  const plot = drawnCharts.norms, line = plot && plot.querySelector("[class~=now] line, line[class~=now]");
  if (!line) return;
  const x = plot.scale("x").apply(page.step);
  line.setAttribute("x1", x);
  line.setAttribute("x2", x);
  byId("norms").dataset.step = page.step;
}

const BANDS = [["shut", "#3b528b"], ["between", "#9aa3ad"], ["open", "#5ec962"]];

function drawSaturation(gates, last) {
  const shares = gates.flatMap(({ label, value }) => saturation(value, last).map((share, band) => ({
    label, share, band: say(BANDS[band][0]),
  })));
  chart("saturation", {
    color: { legend: true, domain: BANDS.map(([word]) => say(word)), range: BANDS.map(([, shade]) => shade) },
    x: { label: null, percent: true, domain: [0, 100] }, y: { label: null, domain: gates.map(({ label }) => label) },
    marks: [
      Plot.barX(shares, {
        x: "share", y: "label", fill: "band", title: ({ label, band, share }) => `${label} ${band}: ${(100 * share).toFixed(1)} %`,
        tip: { fill: colour("--back") },
      }),
    ],
  });
}

function drawMemory(gates, last) {
  const units = gates.flatMap(({ label, value }) => memory(value, last).map((length) => ({ label, length })));
  chart("memory", {
    color: { legend: true, domain: gates.map(({ label }) => label) }, x: { label: say("steps") }, y: { label: say("units"), grid: true },
    marks: [
      Plot.rectY(units, Plot.binX({ y2: "count" }, {
        x: "length", fill: "label", fillOpacity: 0.6, thresholds: 24, tip: { fill: colour("--back") },
      })),
      Plot.ruleY([0]),
    ],
  });
}

/** The shares of a gate's values below 0.1, between, and above 0.9. */
function saturation(value, last) {
  const counts = [0, 0, 0];
  for (let step = 0; step < last; step++) {
    for (const number of vector(value, step)) if (!Number.isNaN(number)) counts[number < 0.1 ? 0 : number > 0.9 ? 2 : 1] += 1;
  }
  const total = counts[0] + counts[1] + counts[2];
  return counts.map((count) => count / (total || 1));
}

/** Over how many steps each unit of a gate would remember. */
function memory(value, last) {
  const means = new Float64Array(value.size);
  for (let step = 0; step < last; step++) vector(value, step).forEach((number, unit) => { means[unit] += number / last; });
  return Array.from(means.filter(Number.isFinite), (mean) => 1 / Math.max(1 - mean, 1e-4));
}
