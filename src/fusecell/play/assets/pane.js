// One cell on the page: what it reads and predicts, all its values over time, and what holds them.

class Pane {
  constructor(index, kind) {
    Object.assign(this, { index, kind, side: "AB"[index], cell: null, run: null, pinned: null });
    this.box = element(`<section class="pane" aria-live="off">
      <div class="controls"><label><span data-word="cell"></span> <b class="side"></b> <select class="kind"></select></label>
        <span class="loss hint"></span></div>
      <div class="strip" tabindex="0" role="group" data-label="read"></div>
      <canvas class="curve" role="img" data-label="read"></canvas>
      <p class="guess"></p>
      <div class="values"></div>
      <pre class="equations"></pre></section>`);
    this.find = (name) => this.box.querySelector(`.${name}`);
    this.find("side").textContent = this.side;
    this.strip = this.find("strip");
    this.editor = new WeightEditor(this);
    this.box.append(this.editor.box);
    this.strip.addEventListener("click", (event) => {
      if (event.target.dataset.step) app.moveTo(Number(event.target.dataset.step));
    });
    this.strip.addEventListener("keydown", moveByKey);
    this.find("kind").addEventListener("change", (event) => {
      const kinds = app.panes.map((pane) => (pane === this ? event.target.value : pane.kind));
      app.choose(app.task, kinds);
    });
  }

  other() {
    return app.panes[1 - this.index];
  }

  /** The step at which it is shown: the cursor's, or its last. */
  step() {
    return Math.min(app.step, this.run.inputs.length - 1);
  }

  /** Show another cell. */
  show(cell) {
    Object.assign(this, { cell, kind: cell.model.kind });
    const rows = this.cell.names.map((name) => new ValueRow(this, name));
    this.rows = rows;
    this.find("values").replaceChildren(...rows.map((row) => row.box));
    this.speak();
    this.editor.open();
  }

  /** Say all words again, in the page's language. */
  speak() {
    const { kind } = this, kinds = data.models.filter((model) => model.task === app.task);
    this.find("kind").replaceChildren(...kinds.map((model) => new Option(named(model.kind), model.kind, false, model.kind === kind)));
    this.find("loss").textContent = TASKS[app.task].loss(this.cell.model.loss);
    this.find("loss").title = this.cell.model.paper;
    this.strip.hidden = app.task !== "text";
    this.find("curve").hidden = app.task !== "curve";
    sayAll(this.box);
    for (const row of this.rows) row.speak();
  }

  /** Let everything go. */
  free() {
    this.cell.free();
    for (const row of this.rows) row.find("[type=checkbox]").checked = false;
  }

  /** Show from now on how values differ from those of this run; or the values again. */
  pin(on) {
    if (on) this.compute();
    // A copy: the run goes on where the cell goes on by itself.
    this.pinned = on ? { outputs: this.run.outputs.slice() } : null;
  }

  rerun() {
    this.compute();
    this.draw();
    app.measureSoon();
  }

  compute() {
    this.run = this.cell.run(app.inputs, app.more, TASKS[app.task].next);
  }

  draw() {
    TASKS[app.task].draw(this);
    for (const row of this.rows) row.draw();
    this.editor.draw();
    this.mark();
  }

  /** Show the cursor's step. */
  mark() {
    TASKS[app.task].mark(this);
    for (const row of this.rows) row.mark();
    const { equation } = this.cell.model;
    const lines = equation.split("; ").flatMap((statement) => [statement, ...this.#withNumbers(statement)]);
    this.find("equations").textContent = `${lines.join("\n")}\n\n${say("numbersOf", { unit: app.unit, step: this.step() })}`;
  }

  /** A statement's value for the chosen unit, and its numbers where it holds no product with a matrix. */
  #withNumbers(statement) {
    const [left, right] = statement.split(" = "), step = this.step(), own = this.cell.before(this.run, step);
    const look = (name, after) => {
      const state = this.cell.model.states.indexOf(name);
      if (state >= 0 && !after) return own[state * this.cell.units + app.unit];
      return this.cell.names.includes(name) ? this.cell.value(this.run, name, step)[app.unit] : undefined;
    };
    const numbers = left.split(", ").map((name) => look(name.replace("'", ""), true));
    if (numbers.includes(undefined)) return [];
    const results = numbers.map((number) => number.toFixed(4)).join(", ");
    // With a product, or a gate that is named before its sigmoid, there is nothing to put numbers into.
    if (/[A-Zσ]/.test(right)) return [`    ${left} = ${results}`];
    const spelled = right.replace(/([a-z]+)('?)/g, (whole, name, primed) => {
      const number = look(name, Boolean(primed));
      return number === undefined ? whole : number < 0 ? `(${number.toFixed(4)})` : number.toFixed(4);
    });
    return [`    ${left} = ${spelled.replace(/\(\((-[\d.]+)\)\)/g, "($1)")} = ${results}`];
  }
}

/** A value of a cell: its picture over time, its bars at the cursor, and what holds it. */
class ValueRow {
  constructor(pane, name) {
    Object.assign(this, { pane, name, gate: pane.cell.model.gates.includes(name) });
    this.box = element(`<div class="value" data-name="${name}"><div class="name"><b></b> <output></output></div>
      <div class="frame"><canvas class="heat" tabindex="0" role="img"></canvas><div class="cursor"></div></div>
      <canvas class="bars" tabindex="0" role="img"></canvas>
      <div class="hold"><label><input type="checkbox"> <span data-word="hold"></span></label>
        <input type="range" min="${this.gate ? 0 : -1}" max="1" step="0.05" value="${this.gate ? 1 : 0}"> <span class="number"></span>
        <button type="button" class="free" data-word="letGo"></button></div></div>`);
    this.find = (selector) => this.box.querySelector(selector);
    this.find("b").textContent = name;
    this.#listen();
  }

  speak() {
    const facts = { name: this.name };
    this.find(".heat").setAttribute("aria-label", say("heatLabel", facts));
    this.find(".bars").setAttribute("aria-label", say("barsLabel", facts));
    this.find("[type=range]").setAttribute("aria-label", say("holdLabel", facts));
  }

  #listen() {
    const heat = this.find(".heat"), strip = this.find(".bars"), box = this.find("[type=checkbox]"), range = this.find("[type=range]");
    heat.addEventListener("pointerdown", (event) => {
      const { cell, run } = this.pane;
      app.unit = placeIn(event.offsetY, heat.clientHeight, cell.units);
      app.moveTo(placeIn(event.offsetX, heat.clientWidth, run.inputs.length));
    });
    heat.addEventListener("keydown", moveByKey);
    box.addEventListener("change", () => this.hold(box.checked ? Number(range.value) : NaN));
    range.addEventListener("input", () => { box.checked = true; this.hold(Number(range.value)); });
    this.find(".free").addEventListener("click", () => { box.checked = false; this.hold(NaN); });
    strip.addEventListener("pointerdown", (event) => { strip.setPointerCapture(event.pointerId); this.#drag(event); });
    strip.addEventListener("pointermove", (event) => { if (event.buttons) this.#drag(event); });
    strip.addEventListener("dblclick", () => this.hold(NaN, app.unit));
    strip.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Hold the value of a unit, or of all, at a number; NaN lets it go. */
  hold(number, unit = -1) {
    this.pane.cell.hold(this.name, number, unit, byId("fromHere").checked ? app.step : 0);
    if (unit >= 0) this.find("[type=checkbox]").checked = false;
    this.pane.rerun();
  }

  #drag(event) {
    const strip = this.find(".bars"), share = 1 - event.offsetY / strip.clientHeight;
    const number = this.gate ? share : (2 * share - 1) * this.most;
    app.unit = placeIn(event.offsetX, strip.clientWidth, this.pane.cell.units);
    this.hold(this.gate ? Math.max(0, Math.min(1, number)) : number, app.unit);
    app.marked();
  }

  #key(event) {
    const { cell, run } = this.pane, move = { ArrowLeft: -1, ArrowRight: 1 }[event.key], lift = { ArrowUp: 0.05, ArrowDown: -0.05 }[event.key];
    const lets = ["Delete", "Backspace", "Escape"].includes(event.key), holds = event.key === "Enter";
    if (move === undefined && lift === undefined && !lets && !holds) return;
    event.preventDefault();
    if (move !== undefined) app.unit = Math.max(0, Math.min(cell.units - 1, app.unit + move));
    const number = cell.value(run, this.name, this.pane.step())[app.unit] + (lift ?? 0);
    if (lets) this.hold(NaN, app.unit);
    else if (holds || lift !== undefined) this.hold(this.gate ? Math.max(0, Math.min(1, number)) : number, app.unit);
    app.marked();
  }

  draw() {
    const { cell, run, pinned } = this.pane, steps = run.inputs.length, [start, stop] = cell.model.values[this.name];
    const at = (unit, t) => run.outputs[t][start + unit];
    this.most = 1; // the largest size that is shown: more where a memory grows beyond 1
    for (const output of run.outputs) {
      for (let index = start; index < stop; index++) this.most = Math.max(this.most, Math.abs(output[index]));
    }
    const change = (unit, t) => at(unit, t) - (pinned.outputs[t]?.[start + unit] ?? 0);
    if (pinned) heatmap(this.find(".heat"), cell.units, steps, change, { most: 0.5 });
    else heatmap(this.find(".heat"), cell.units, steps, at, this);
    this.find(".number").textContent = Number(this.find("[type=range]").value).toFixed(2);
  }

  mark() {
    const { cell, run } = this.pane, step = this.pane.step(), steps = run.inputs.length;
    const numbers = Array.from(cell.value(run, this.name, step)), { numbers: held, from } = cell.holds[this.name];
    Object.assign(this.find(".cursor").style, { left: `${(100 * step) / steps}%`, width: `${100 / steps}%` });
    this.find("output").textContent = numbers[app.unit].toFixed(3);
    const holds = held.map((number, unit) => (step >= from[unit] ? number : NaN));
    bars(this.find(".bars"), numbers, { gate: this.gate, most: this.most, held: holds, chosen: app.unit });
  }
}

/** The arrow keys, Home and End: left and right along the steps, up and down along the units. */
function moveByKey(event) {
  const to = {
    ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], Home: [-1e6, 0], End: [1e6, 0],
  }[event.key];
  if (!to) return;
  event.preventDefault();
  app.unit = Math.max(0, Math.min(data.tasks[app.task].units - 1, app.unit + to[1]));
  app.moveTo(app.step + to[0]);
}
