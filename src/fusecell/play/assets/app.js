// The page: its state, its controls, the clock that moves it, and experiments to begin with.

const WINDOW = 40; // steps over which gradients are measured

/** Experiments: which cells read what, and what is held in either, from which step on. */
const EXPERIMENTS = {
  free: { task: "text", kinds: ["gru", "rnn_tanh"] },
  frozen: { task: "text", kinds: ["gru", "gru"], holds: [null, { z: 1 }], from: 30 },
  amnesia: { task: "curve", kinds: ["gru", "gru"], holds: [null, { z: 0 }] },
  reset: { task: "text", kinds: ["gru", "gru_reset_before"], holds: [{ r: 0 }, { r: 0 }], take: true },
  forget: { task: "curve", kinds: ["lstm", "lstm"], holds: [null, { f: 0 }] },
  carousel: { task: "text", kinds: ["lstm", "rnn_tanh"], holds: [{ f: 1, i: 0 }, null], from: 30 },
};

const app = {
  task: "text", text: FIRST_TEXT, curve: FIRST_CURVE.slice(), inputs: [], more: 0,
  step: 50, unit: 0, playing: false, panes: [], due: 0, clock: 0, turn: 0,

  /** Run both cells again after the sequence has changed. */
  changed() {
    app.inputs = TASKS[app.task].inputs();
    app.more = Math.min(app.more, MOST_STEPS - app.inputs.length);
    for (const pane of app.shown()) pane.compute();
    app.computed();
  },

  /** Show both cells' new runs. */
  computed() {
    byId("step").max = app.steps() - 1;
    app.step = Math.max(0, Math.min(app.step, app.steps() - 1));
    app.draw();
    app.measureSoon();
  },

  steps: () => app.inputs.length + app.more,
  shown: () => (byId("compare").checked ? app.panes : app.panes.slice(0, 1)),

  draw() {
    byId("panes").classList.toggle("two", byId("compare").checked);
    app.panes[1].box.hidden = !byId("compare").checked;
    for (const pane of app.shown()) pane.draw();
    app.marked();
  },

  moveTo(step) {
    app.step = Math.max(0, Math.min(app.steps() - 1, step));
    app.marked();
    app.measureSoon();
  },

  /** Show the cursor's step and the chosen unit everywhere. */
  marked() {
    byId("step").value = app.step;
    byId("stepNumber").textContent = `${app.step + 1} / ${app.steps()}`;
    byId("unit").value = app.unit;
    byId("unit").max = data.tasks[app.task].units - 1;
    for (const pane of app.shown()) pane.mark();
    if (app.task === "curve") drawing.draw();
  },

  /** Measure gradients once nothing has changed for a moment, as they take many steps. */
  measureSoon() {
    clearTimeout(app.due);
    if (!app.playing) app.due = setTimeout(app.measure, 120);
  },

  measure() {
    const strokes = [colour("--mark"), colour("--bar")];
    const panes = app.shown().filter((pane) => pane.run); // the first cells may still be loading
    const curves = panes.map((pane, index) => ({
      norms: gradientNorms(pane.cell, pane.run, pane.step(), WINDOW), stroke: strokes[index], pane,
    }));
    drawGradients(byId("gradients"), curves, WINDOW);
    byId("lengths").replaceChildren(...curves.map(({ norms, stroke, pane }) => {
      const item = document.createElement("li"), steps = memoryLength(norms);
      item.style.setProperty("--stroke", stroke);
      const facts = { side: pane.side, kind: named(pane.kind), steps, measured: norms.length - 1 };
      item.textContent = say(steps === undefined ? "remembersMore" : "remembers", facts);
      return item;
    }));
    app.measured = curves.map(({ norms }) => norms);
  },

  /** One tick of the clock: the next step, of the sequence or beyond it. */
  tick() {
    if (app.step + 1 >= app.steps()) {
      if (!byId("goOn").checked || app.steps() >= MOST_STEPS) return app.play(false);
      app.more += 1;
      app.step += 1;
      for (const pane of app.shown()) pane.cell.extend(pane.run, TASKS[app.task].next);
      return app.computed();
    }
    app.moveTo(app.step + 1);
  },

  play(on = !app.playing) {
    app.playing = on;
    cancelAnimationFrame(app.clock);
    byId("play").textContent = say(on ? "pause" : "play");
    byId("play").setAttribute("aria-pressed", String(on));
    if (!on) return app.measureSoon();
    if (app.step + 1 >= app.steps() && !byId("goOn").checked) app.moveTo(0);
    let last = performance.now();
    const frame = (now) => {
      const between = 1000 / Number(byId("speed").value);
      // A frame that came late makes up for no more than a few steps.
      for (let due = Math.min(4, Math.floor((now - last) / between)); due > 0 && app.playing; due--) {
        last = Math.max(last + between, now - 4 * between);
        app.tick();
      }
      if (app.playing) app.clock = requestAnimationFrame(frame);
    };
    app.clock = requestAnimationFrame(frame);
  },

  /** Show cells of these kinds, reading a text or a curve; those that are shown already stay as they are. */
  async choose(task, kinds = app.panes.map((pane) => pane.kind), { anew = task !== app.task } = {}) {
    const turn = (app.turn += 1);
    app.play(false);
    const stays = (index) => !anew && app.panes[index].cell && app.panes[index].kind === kinds[index];
    const cells = await Promise.all(kinds.map((kind, index) => (stays(index) ? null : PlayedCell.load(task, kind))));
    if (turn !== app.turn) return false; // something else has been chosen meanwhile
    if (task !== app.task) Object.assign(app, { task, more: 0, unit: 0 });
    for (const radio of document.querySelectorAll("[name=task]")) radio.checked = radio.value === task;
    byId("textControls").hidden = task !== "text";
    byId("curveControls").hidden = task !== "curve";
    byId("pin").checked = false;
    byId("story").hidden = true; // it is of the experiment that was shown
    for (const pane of app.panes) pane.pinned = null;
    cells.forEach((cell, index) => { if (cell) app.panes[index].show(cell); });
    app.changed();
    return true;
  },

  async experiment(name) {
    const { task, kinds, holds = [], from = 0, take = false } = EXPERIMENTS[name];
    if (!(await app.choose(task, kinds, { anew: true }))) return;
    // Not before: while cells load, a second one that was not shown has no run to draw.
    byId("compare").checked = true;
    byId("fromHere").checked = false;
    app.step = app.steps() - 1; // gradients are measured from the cursor backwards
    if (take) app.panes[1].cell.takeWeights(app.panes[0].cell);
    app.panes.forEach((pane, index) => {
      for (const [value, number] of Object.entries(holds[index] ?? {})) {
        const row = pane.rows.find((each) => each.name === value);
        row.find("[type=checkbox]").checked = true;
        row.find("[type=range]").value = number;
        pane.cell.hold(value, number, -1, from);
      }
    });
    byId("story").hidden = false;
    byId("story").dataset.word = `${name}Story`;
    sayAll(byId("story").parentElement);
    app.changed();
  },
};

const drawing = new Drawing(byId("drawing"));

function listen() {
  const on = (id, event, action) => byId(id).addEventListener(event, action);
  on("language", "click", () => { switchLanguage(); speak(); });
  on("theme", "click", () => { switchTheme(); app.draw(); app.measure(); });
  on("text", "input", (event) => { app.text = event.target.value || " "; app.more = 0; app.changed(); });
  on("flat", "click", () => { app.curve.fill(0); app.more = 0; app.changed(); });
  on("wave", "click", () => { app.curve.set(FIRST_CURVE); app.more = 0; app.changed(); });
  on("step", "input", (event) => app.moveTo(Number(event.target.value)));
  on("unit", "input", (event) => {
    app.unit = Math.max(0, Math.min(data.tasks[app.task].units - 1, Math.floor(Number(event.target.value)) || 0));
    app.marked();
  });
  on("play", "click", () => app.play());
  on("back", "click", () => { app.more = 0; app.step = 0; app.changed(); });
  on("next", "click", () => app.tick());
  on("compare", "change", () => app.changed());
  on("release", "click", () => {
    for (const pane of app.panes) pane.free();
    app.changed();
  });
  on("pin", "change", (event) => {
    for (const pane of app.panes) pane.pin(event.target.checked);
    app.draw();
  });
  for (const radio of document.querySelectorAll("[name=task]")) radio.addEventListener("change", () => app.choose(radio.value));
  on("experiments", "click", (event) => { if (event.target.dataset.name) app.experiment(event.target.dataset.name); });
  document.addEventListener("keydown", (event) => {
    if (event.key !== " " || event.target.closest("input, button, select, summary")) return;
    event.preventDefault();
    app.play();
  });
  addEventListener("resize", () => { app.draw(); app.measureSoon(); });
}

/** Say everything in the page's language. */
function speak() {
  byId("play").textContent = say(app.playing ? "pause" : "play");
  for (const pane of app.panes) pane.speak();
  app.marked();
  app.measure();
}

async function start() {
  byId("text").value = app.text;
  const kinds = [...new Set(data.models.map((model) => model.kind))];
  const possible = Object.keys(EXPERIMENTS).filter((name) => EXPERIMENTS[name].kinds.every((kind) => kinds.includes(kind)));
  byId("experiments").parentElement.hidden = !possible.length;
  byId("experiments").replaceChildren(...possible.map((name) =>
    element(`<button type="button" data-name="${name}" data-word="${name}"></button>`)));
  byId("compare").checked = innerWidth > 800;
  const first = possible.includes("free") ? EXPERIMENTS.free.kinds : [kinds[0], kinds[1] ?? kinds[0]];
  app.panes = first.map((kind, index) => new Pane(index, kind));
  byId("panes").replaceChildren(...app.panes.map((pane) => pane.box));
  switchLanguage(language);
  await app.choose("text", first, { anew: true });
  byId("story").hidden = false;
  listen();
  app.measure();
  document.documentElement.dataset.ready = "";
}

start();
