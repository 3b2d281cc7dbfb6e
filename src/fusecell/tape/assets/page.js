"use strict";
const words = JSON.parse(document.getElementById("words").textContent);
const tape = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const page = {
  language: (navigator.language || "en").startsWith("zh") ? "zh" : "en",
  track: 0, step: 0, row: 0, unit: 0, colour: "",
};

// ---- words ----

function say(word, facts = {}) {
  return words[page.language][word].replace(/\{(\w+)\}/g, (_, name) => facts[name]);
}

function sayAll() {
  document.documentElement.lang = page.language;
  for (const element of document.querySelectorAll("[data-word]")) element.textContent = say(element.dataset.word);
  sayMeasures();
  byId("language").textContent = say("other");
  byId("title").textContent = document.title = tape.title;
  const cells = tape.tracks.length, even = cells === tape.layers * tape.directions;
  byId("formula").textContent = say(even ? "formula" : "formulaMixed", {
    steps: tape.steps, directions: tape.directions, layers: tape.layers, count: tape.steps * cells, cells,
  });
}

// ---- numbers ----

/** The levels that stand for numbers without one. */
const NOT_FINITE = { 65533: NaN, 65534: -Infinity, 65535: Infinity };

/** The numbers of a value, (steps, rows, size) in one array; unpacked when they are first asked for. */
function numbers(value) {
  if (!value.unpacked) {
    const bytes = Uint8Array.from(atob(value.data), (character) => character.charCodeAt(0));
    const levels = new Uint16Array(bytes.buffer);
    value.unpacked = Float64Array.from(levels, (level) => (level in NOT_FINITE ? NOT_FINITE[level] : value.low + level * value.scale));
  }
  return value.unpacked;
}

/** The vector of a value at a step, for the row that is shown. */
function vector(value, step) {
  const start = (step * tape.rows.length + page.row) * value.size;
  return numbers(value).subarray(start, start + value.size);
}

/** All that is shown of a track, gradients behind the values they are of. */
function shown(track) {
  const found = Object.entries(track.values).map(([name, value]) => ({ name, label: name, value }));
  for (const [name, value] of Object.entries(track.gradients)) found.push({ name: "d " + name, label: "∂" + name, value });
  return found;
}

function find(track, name) {
  const entry = shown(track).find((each) => each.name === name);
  return entry && entry.value;
}

const valid = (step) => step < tape.lengths[page.row];
/** A number with as many digits as are true: those of a value are multiples of its scale. Four decimals at most, or four digits. */
function format(number, value, resolution = value.scale) {
  if (!Number.isFinite(number)) return Number.isNaN(number) ? "NaN" : number < 0 ? "-∞" : "∞";
  const decimals = Math.floor(-Math.log10(resolution));
  const small = value.high - value.low < 0.01 || decimals < 0;
  if (!small || number === 0) return number.toFixed(Math.max(0, Math.min(4, decimals)));
  const digits = decimals + Math.floor(Math.log10(Math.abs(number)));
  return digits < 0 ? "0" : number.toExponential(Math.min(3, digits));
}

/** A state as a step found it: that of the step before, but for the steps that begin. */
function before(track, name, step) {
  const begun = track.begins[name][page.row][step];
  return begun ? begun.map(Number) : vector(track.values[name], track.reverse ? step + 1 : step - 1);
}

// ---- colours ----

const SEQUENTIAL = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const DIVERGING = [[33, 102, 172], [146, 197, 222], [247, 247, 247], [244, 165, 130], [178, 24, 43]];

/** What is not a number has a colour of its own, behind the others. */
const NAN_COLOUR = [217, 70, 239];

function table(stops) {
  const found = new Uint8Array(257 * 3);
  found.set(NAN_COLOUR, 256 * 3);
  for (let i = 0; i < 256; i++) {
    const place = (i / 255) * (stops.length - 1), below = Math.min(Math.floor(place), stops.length - 2);
    for (let c = 0; c < 3; c++) {
      found[3 * i + c] = stops[below][c] + (place - below) * (stops[below + 1][c] - stops[below][c]);
    }
  }
  return found;
}

const TABLES = { gate: table(SEQUENTIAL), other: table(DIVERGING) };

/** The largest distance from 0 among a value's finite numbers. */
const reach = (value) => Math.max(Math.abs(value.low), Math.abs(value.high)) || 1;

/** A function from a number to its place in a table of colours: gates from 0 to 1, others around 0. */
function scale(value) {
  const position = value.gate ? (x) => 255 * x : (x) => 127.5 + (127.5 * x) / reach(value);
  const place = (x) => (Number.isNaN(x) ? 256 : Math.max(0, Math.min(255, Math.round(position(x)))));
  return { colours: value.gate ? TABLES.gate : TABLES.other, place };
}

function css(colours, place) {
  return `rgb(${colours[3 * place]},${colours[3 * place + 1]},${colours[3 * place + 2]})`;
}

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Sizes a canvas for the screen's pixels and returns what draws on it in CSS pixels. */
function brush(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}

// ---- the unrolled network ----

const LEFT = 66, GAP = 12;
let grid = { cell: 10, height: 22 };

function drawGrid() {
  const canvas = byId("grid"), room = canvas.parentElement.clientWidth - LEFT - 4;
  const cell = Math.max(3, Math.min(34, room / tape.steps));
  const height = cell >= 14 ? 26 : 20, lines = tape.tracks.length;
  const labels = tape.labels && cell >= 7 ? 22 : 0;
  const width = LEFT + cell * tape.steps + 4, total = lines * (height + GAP) + labels + 18;
  grid = { cell, height };
  canvas.style.width = width + "px";
  canvas.style.height = total + "px";
  canvas.setAttribute("aria-label", byId("formula").textContent);
  const draw = brush(canvas, width, total);
  draw.font = "12px system-ui, sans-serif";
  draw.textBaseline = "middle";
  tape.tracks.forEach((track, index) => drawLine(draw, track, index));
  draw.textAlign = "center";
  draw.fillStyle = colour("--fore");
  if (labels) {
    tape.labels.forEach((label, step) => draw.fillText(label, LEFT + (step + 0.5) * cell, lines * (height + GAP) + 9));
  }
  draw.fillStyle = colour("--dim");
  const every = Math.max(1, Math.ceil(44 / cell / 5) * 5);
  for (let step = 0; step < tape.steps; step += every) {
    draw.fillText(step, LEFT + (step + 0.5) * cell, lines * (height + GAP) + labels + 8);
  }
}

/** The mean of a value over its units at every step, and over all tracks the least and the largest. */
function means() {
  const key = `${page.colour} ${page.row}`;
  if (means.key === key) return means.found;
  const found = tape.tracks.map((track) => {
    const value = find(track, page.colour);
    return value && Array.from({ length: tape.lengths[page.row] }, (_, step) => {
      let sum = 0;
      for (const number of vector(value, step)) sum += number;
      return sum / value.size;
    });
  });
  const all = found.flatMap((each) => each || []).filter(Number.isFinite);
  means.key = key;
  means.found = { of: found, least: all.reduce((a, b) => Math.min(a, b), all[0] ?? 0), most: all.reduce((a, b) => Math.max(a, b), all[0] ?? 0) };
  return means.found;
}

/** The place of a number between the least and the largest in a table of colours. */
function shade(number, least, most) {
  if (Number.isNaN(number)) return 256;
  return Math.max(0, Math.min(255, Math.round(255 * ((number - least) / (most - least || 1)))));
}

/** One cell over time, from the top: the last layer first. */
function drawLine(draw, track, index) {
  const { cell, height } = grid, top = lineTop(index), pad = cell >= 14 ? 3 : 0;
  const { of, least, most } = means(), mine = of[index];
  draw.fillStyle = colour("--fore");
  draw.textAlign = "left";
  draw.fillText(`${track.layer} ${track.reverse ? "←" : "→"} ${track.kind.replace(/Cell$/, "").slice(0, 6)}`, 0, top + height / 2);
  for (let step = 0; step < tape.steps; step++) {
    const x = LEFT + step * cell;
    if (!valid(step) || !mine) {
      draw.strokeStyle = colour("--line");
      if (cell >= 5) draw.strokeRect(x + pad + 0.5, top + 0.5, cell - 2 * pad - 1, height - 1);
      continue;
    }
    draw.fillStyle = css(TABLES.gate, shade(mine[step], least, most));
    draw.fillRect(x + pad, top, cell - 2 * pad - (cell > 5 && !pad ? 1 : 0), height);
    const next = track.reverse ? step - 1 : step + 1;
    if (pad && next >= 0 && next < tape.steps && valid(next)) {
      draw.fillStyle = colour("--dim");
      draw.fillRect(track.reverse ? x - pad : x + cell - pad, top + height / 2, 2 * pad, 1);
    }
  }
  if (index === page.track) {
    draw.strokeStyle = colour("--mark");
    draw.lineWidth = 2.5;
    draw.strokeRect(LEFT + page.step * cell + pad - 1, top - 2, Math.max(cell - 2 * pad, 3) + 2, height + 4);
    draw.lineWidth = 1;
  }
}

const lineTop = (index) => (tape.tracks.length - 1 - index) * (grid.height + GAP) + 4;

/** The step and the track under the mouse, or undefined beside them. */
function placeInGrid(event) {
  const box = byId("grid").getBoundingClientRect();
  const step = Math.floor((event.clientX - box.left - LEFT) / grid.cell);
  const line = Math.floor((event.clientY - box.top) / (grid.height + GAP));
  const track = tape.tracks.length - 1 - line;
  return step >= 0 && step < tape.steps && track >= 0 && track < tape.tracks.length ? { step, track } : undefined;
}

function pickFromGrid(event) {
  const place = placeInGrid(event);
  if (place) go(place);
}

function sayOfGrid(event) {
  const place = placeInGrid(event), value = place && find(tape.tracks[place.track], page.colour);
  if (!value) return "";
  const mean = vector(value, place.step).reduce((sum, number) => sum + number, 0) / value.size;
  const label = page.colour.replace(/^d /, "∂"), number = valid(place.step) ? format(mean, value) : say("beyond");
  return `${say("meanOf", { name: label })}, ${say("layer")} ${tape.tracks[place.track].layer}, ${say("step")} ${place.step}: ${number}`;
}

// ---- one cell ----

/** A statement of the equation with numbers in place of names, where it holds no product with a matrix. */
function withNumbers(statement, track) {
  const [left, right] = statement.split(" = ");
  if (right === undefined) return "";
  const state = (name, primed) => track.states.includes(name) && !primed;
  const look = (name, primed) => {
    const value = track.values[name];
    if (!value || value.size <= page.unit) return undefined;
    return format((state(name, primed) ? before(track, name, page.step) : vector(value, page.step))[page.unit], value);
  };
  const results = left.split(",").map((name) => look(name.trim().replace(/'$/, ""), true));
  if (results.some((result) => result === undefined)) return "";
  let said = "";
  if (!/[A-Z]/.test(right)) {
    let complete = true;
    const spelled = right.replace(/([a-z]+)('?)/g, (whole, name, primed) => {
      if (["tanh", "relu"].includes(name)) return whole;
      const number = look(name, Boolean(primed));
      if (number === undefined) complete = false;
      return number === undefined ? whole : number.startsWith("-") ? `(${number})` : number;
    });
    if (complete) said = ` = ${spelled.replace(/\(\((-[^()]+)\)\)/g, "($1)")}`;
  }
  return `${escaped(left + said)} = <b>${results.join(", ")}</b>`;
}

const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");

function drawCell() {
  const track = tape.tracks[page.track];
  const label = tape.labels ? `  “${tape.labels[page.step]}”` : "";
  byId("where").textContent = say("where", {
    layer: track.layer, kind: track.kind, direction: say(track.reverse ? "backward" : "forward"), step: page.step, label,
  });
  const box = byId("equations");
  if (!valid(page.step)) {
    box.textContent = say("beyond");
  } else if (track.equation) {
    const lines = track.equation.split("; ").flatMap((statement) => {
      const numbered = withNumbers(statement, track);
      return numbered ? [escaped(statement), "    " + numbered] : [escaped(statement)];
    });
    const code = track.source ? `\n\n${escaped(track.source)}` : "";
    box.innerHTML = `${lines.join("\n")}\n\n<i>${say("numbersOf", { unit: page.unit })}</i>${code}`;
  } else {
    box.textContent = track.source || track.kind;
  }
  const held = byId("vectors");
  held.replaceChildren(...shown(track).map((entry) => drawVector(entry)));
}

/** A vector as bars, and its numbers. */
function drawVector({ name, label, value }) {
  const element = document.createElement("div");
  element.className = "vector";
  element.innerHTML = `<span class="name">${escaped(label)}</span><canvas></canvas><details class="numbers"><summary></summary></details>`;
  const values = vector(value, page.step), canvas = element.querySelector("canvas");
  const width = Math.max(200, byId("vectors").clientWidth - 90), height = 46, step = width / value.size;
  const draw = brush(canvas, width, height), shades = scale(value);
  const most = value.gate ? 1 : reach(value);
  const zero = value.gate ? height : height / 2;
  values.forEach((number, unit) => {
    const room = value.gate ? height : height / 2;
    const length = Number.isNaN(number) ? room : Math.max(-room, Math.min(room, (number / most) * room));
    draw.fillStyle = unit === page.unit ? colour("--mark") : css(shades.colours, shades.place(number));
    draw.fillRect(unit * step, Math.min(zero, zero - length), Math.max(step - (step > 3 ? 1 : 0), 0.5), Math.max(Math.abs(length), 0.5));
  });
  const unitAt = (event) => keep(Math.floor((event.offsetX / canvas.clientWidth) * value.size), value.size - 1);
  canvas.addEventListener("click", (event) => go({ unit: unitAt(event) }));
  hovered(canvas, (event) => `${label}[${unitAt(event)}] = ${format(values[unitAt(event)], value)}`);
  const chosen = Math.min(page.unit, value.size - 1), details = element.querySelector("details");
  details.dataset.name = name;
  details.querySelector("summary").textContent = `${label}[${chosen}] = ${format(values[chosen], value)}`;
  details.addEventListener("toggle", () => {
    if (details.open && !details.querySelector("span")) {
      for (const [unit, number] of values.entries()) {
        const span = document.createElement("span");
        span.textContent = format(number, value) + " ";
        span.className = unit === page.unit ? "chosen" : "";
        details.append(span);
      }
    }
  });
  return element;
}

// ---- heatmaps ----

let pictured = "";

function drawHeatmaps() {
  const track = tape.tracks[page.track], key = `${page.track} ${page.row}`;
  if (pictured !== key) {
    pictured = key;
    byId("heatmaps").replaceChildren(...shown(track).map((entry) => drawHeatmap(entry)));
  }
  for (const cursor of document.querySelectorAll(".cursor")) {
    cursor.style.left = `${(100 * page.step) / tape.steps}%`;
    cursor.style.width = `max(2px, ${100 / tape.steps}%)`;
  }
}

function drawHeatmap({ name, label, value }) {
  const element = document.createElement("div");
  element.className = "heatmap";
  element.innerHTML = `<span class="name">${escaped(label)} <button type="button" class="save"></button></span><div class="frame"><canvas></canvas><div class="cursor"></div></div>`;
  const canvas = element.querySelector("canvas");
  canvas.dataset.name = name;
  canvas.width = tape.steps;
  canvas.height = value.size;
  canvas.style.height = `${Math.max(60, Math.min(160, value.size * 3))}px`;
  const image = new ImageData(tape.steps, value.size), { colours, place } = scale(value);
  for (let step = 0; step < tape.steps; step++) {
    const values = vector(value, step), alpha = valid(step) ? 255 : 40;
    for (let unit = 0; unit < value.size; unit++) {
      const at = 4 * (unit * tape.steps + step), from = 3 * place(values[unit]);
      image.data[at] = colours[from];
      image.data[at + 1] = colours[from + 1];
      image.data[at + 2] = colours[from + 2];
      image.data[at + 3] = alpha;
    }
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
  const placeOf = (event) => ({
    step: keep(Math.floor((event.offsetX / canvas.clientWidth) * tape.steps), tape.steps - 1),
    unit: keep(Math.floor((event.offsetY / canvas.clientHeight) * value.size), value.size - 1),
  });
  const pick = (event) => go(placeOf(event));
  hovered(canvas, (event) => {
    const { step, unit } = placeOf(event);
    const number = valid(step) ? format(vector(value, step)[unit], value) : say("beyond");
    return `${label}[${unit}], ${say("step")} ${step}: ${number}`;
  });
  saved(element.querySelector("button"), () => pictureOfCanvas(canvas, `${name}-${page.track}`));
  canvas.addEventListener("click", pick);
  canvas.addEventListener("mousemove", (event) => event.buttons && pick(event));
  return element;
}

// ---- moving about ----

/** Go to another step, track, row or unit, and draw what that changes. */
function go(change) {
  const before = { ...page };
  Object.assign(page, change);
  const value = Object.values(tape.tracks[page.track].values)[0];
  page.unit = Math.max(0, Math.min(value.size - 1, page.unit));
  byId("step").value = page.step;
  byId("unit").value = page.unit;
  const { least, most } = means();
  byId("range").textContent = `${least.toPrecision(3)} … ${most.toPrecision(3)}`;
  drawGrid();
  drawCell();
  drawHeatmaps();
  drawUnits();
  sayNotFinite();
  if (before.track !== page.track || before.row !== page.row) drawCharts();
  else moveChartCursor();
}

function keep(number, most) {
  return Number.isFinite(number) ? Math.max(0, Math.min(most, Math.round(number))) : 0;
}

function onKey(event) {
  if (["INPUT", "SELECT"].includes(event.target.tagName)) return;
  const along = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 }[event.key];
  const across = { ArrowUp: 1, ArrowDown: -1 }[event.key];
  const ends = { Home: 0, End: tape.steps - 1 }[event.key];
  if (along !== undefined) go({ step: keep(page.step + along, tape.steps - 1) });
  else if (across !== undefined) go({ track: keep(page.track + across, tape.tracks.length - 1) });
  else if (ends !== undefined) go({ step: ends });
  else return;
  event.preventDefault();
}

/** A button that leads to where the row's numbers first stop being finite. */
function sayNotFinite() {
  const place = tape.notFinite[page.row], button = byId("notFinite");
  button.hidden = !place;
  if (!place) return;
  const { layer, reverse } = tape.tracks[place.track];
  button.textContent = say("notFinite", { ...place, layer, direction: say(reverse ? "backward" : "forward") });
  button.onclick = () => go({ track: place.track, step: place.step, unit: place.unit });
}

function drawAll() {
  sayAll();
  pictured = "";
  go({});
  drawCharts();
}

// ---- numbers under the mouse, and pictures to keep ----

/** Say something of the place in an element that the mouse is over. */
function hovered(element, text) {
  const tip = byId("tip");
  element.addEventListener("mousemove", (event) => {
    tip.textContent = text(event);
    tip.hidden = !tip.textContent;
    tip.style.left = `${Math.min(event.clientX + 14, document.documentElement.clientWidth - tip.offsetWidth - 4)}px`;
    tip.style.top = `${event.clientY + 16}px`;
  });
  element.addEventListener("mouseleave", () => { tip.hidden = true; });
}

/** Make a button that saves the file that a function returns a promise of: its content and its name. */
function saved(button, file) {
  button.textContent = "⤓";
  button.title = say("save");
  button.setAttribute("aria-label", say("save"));
  button.onclick = async () => {
    const { content, name } = await file(), link = document.createElement("a");
    link.href = URL.createObjectURL(content);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
}

function pictureOfCanvas(canvas, name) {
  return new Promise((done) => canvas.toBlob((content) => done({ content, name: `${name}.png` }), "image/png"));
}

/** The text that was deflated and written in base64. */
function inflated(packed) {
  const bytes = Uint8Array.from(atob(packed), (character) => character.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).text();
}

function start() {
  const names = [...new Set(tape.tracks.flatMap((track) => shown(track).map(({ name }) => name)))];
  byId("colour").replaceChildren(...names.map((name) => new Option(name.replace(/^d /, "∂"), name)));
  page.colour = names.includes("z") ? "z" : names.includes("f") ? "f" : names[0];
  byId("colour").value = page.colour;
  byId("row").replaceChildren(...tape.rows.map((row, index) => new Option(row, index)));
  byId("rowControl").hidden = tape.rows.length < 2;
  byId("step").max = tape.steps - 1;
  byId("colour").addEventListener("change", (event) => go({ colour: event.target.value }));
  byId("row").addEventListener("change", (event) => go({ row: Number(event.target.value) }));
  byId("step").addEventListener("change", (event) => go({ step: keep(Number(event.target.value), tape.steps - 1) }));
  byId("unit").addEventListener("change", (event) => go({ unit: keep(Number(event.target.value), 1e9) }));
  byId("grid").addEventListener("click", pickFromGrid);
  hovered(byId("grid"), sayOfGrid);
  saved(byId("saveGrid"), () => pictureOfCanvas(byId("grid"), "unrolled"));
  startUnits();
  byId("language").addEventListener("click", () => { page.language = page.language === "en" ? "zh" : "en"; drawAll(); });
  byId("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    drawAll();
  });
  document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  document.addEventListener("keydown", onKey);
  let waiting = 0;
  window.addEventListener("resize", () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(() => go({})); });
  drawAll();
  // The library of the charts is read once the rest of the page is there.
  setTimeout(async () => {
    for (const library of document.querySelectorAll("script.library")) {
      const script = document.createElement("script");
      script.textContent = await inflated(library.textContent);
      document.head.append(script);
    }
    drawCharts();
    document.documentElement.dataset.ready = "true";
  }, 30);
}

start();
