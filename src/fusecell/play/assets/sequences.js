// What cells read: a text, or a curve that is drawn; and what they predict of it.

const MOST_STEPS = 240, TEMPERATURE = 0.5;

/** A number between 0 and 1 for each step, the same in every run, so that runs differ by what is changed alone. */
function chance(t) {
  let mixed = Math.imul(t + 1, 0x9e3779b1);
  mixed = Math.imul(mixed ^ (mixed >>> 15), 0x85ebca6b);
  return ((mixed ^ (mixed >>> 13)) >>> 0) / 2 ** 32;
}

function probabilities(scores, temperature = 1) {
  const most = Math.max(...scores), weights = Array.from(scores, (score) => Math.exp((score - most) / temperature));
  const sum = weights.reduce((a, b) => a + b, 0);
  return weights.map((weight) => weight / sum);
}

function oneHot(index) {
  const x = new Float32Array(data.alphabet.length);
  x[index] = 1;
  return x;
}

const letterOf = (x) => data.alphabet[x.indexOf(1)];

const TASKS = {
  text: {
    inputs: () => [...app.text.toLowerCase()].map((letter) => oneHot(Math.max(0, data.alphabet.indexOf(letter)))),
    next(scores, t) {
      let rest = chance(t);
      const index = probabilities(scores, TEMPERATURE).findIndex((each) => (rest -= each) < 0);
      return oneHot(index < 0 ? 0 : index);
    },
    /** The letters it has read, each on the colour of how much it was expected. */
    draw(pane) {
      const { cell, run, strip } = pane;
      while (strip.children.length > run.inputs.length) strip.lastChild.remove();
      while (strip.children.length < run.inputs.length) strip.append(document.createElement("span"));
      run.inputs.forEach((x, t) => {
        const letter = strip.children[t], text = letterOf(x).replace(" ", "\u00a0");
        const expected = t ? probabilities(cell.prediction(run, t - 1))[x.indexOf(1)] : 0;
        if (letter.textContent !== text) letter.textContent = text;
        letter.style.setProperty("--expected", `${Math.round(70 * expected)}%`);
        letter.classList.toggle("written", t >= app.inputs.length);
        letter.dataset.step = t;
      });
    },
    mark(pane) {
      const { strip, cell, run } = pane, step = pane.step();
      for (const letter of strip.querySelectorAll(".here")) letter.classList.remove("here");
      strip.children[step]?.classList.add("here");
      const chances = probabilities(cell.prediction(run, step)).map((each, index) => [each, data.alphabet[index]]);
      const best = chances.sort((a, b) => b[0] - a[0]).slice(0, 5);
      const spelled = best.map(([each, letter]) => `${letter === " " ? "␣" : letter} ${Math.round(100 * each)} %`);
      pane.find("guess").textContent = `${say("next")} ${spelled.join("   ")}`;
    },
    loss: (loss) => say("bits", { loss: loss.toFixed(2) }),
  },
  curve: {
    inputs: () => Array.from(app.curve, (y) => Float32Array.of(y)),
    next: (prediction) => Float32Array.of(prediction[0]),
    /** The curve, and before each of its points the cell's prediction of it. */
    draw(pane) {
      const { cell, run } = pane, steps = run.inputs.length;
      const points = run.inputs.map((x, t) => [t, x[0]]), drawn = points.slice(0, app.inputs.length);
      const predicted = run.inputs.map((_, t) => [t + 1, cell.prediction(run, t)[0]]);
      const { draw, width, height } = brush(pane.find("curve")), place = ([t, y]) => [(t + 0.5) * (width / steps), height * (0.5 - 0.42 * y)];
      line(draw, points.map(place), colour("--mark"), { dashed: true });
      line(draw, drawn.map(place), colour("--fore"));
      line(draw, predicted.slice(0, -1).map(place), colour("--bar"), { thick: 1.5 });
    },
    mark(pane) {
      const { cell, run } = pane, step = pane.step();
      const [x, y] = [run.inputs[step][0], cell.prediction(run, step)[0]].map((each) => each.toFixed(3));
      pane.find("guess").textContent = say("point", { x, y });
    },
    loss: (loss) => say("error", { loss: loss.toFixed(4) }),
  },
};

const FIRST_TEXT = "the value of the object is returned by the call of the function";
const FIRST_CURVE = Float32Array.from({ length: 70 }, (_, t) => 0.7 * Math.sin(t / 3) * (t < 45 ? 1 : 0));

/** The canvas to draw on: pointers draw, arrow keys move along the curve and lift its point. */
class Drawing {
  constructor(canvas) {
    this.canvas = canvas;
    this.last = null;
    canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); this.#draws(event, true); });
    canvas.addEventListener("pointermove", (event) => { if (event.buttons) this.#draws(event, false); });
    canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  #draws(event, begins) {
    const step = placeIn(event.offsetX, this.canvas.clientWidth, app.curve.length);
    const y = Math.max(-1, Math.min(1, (0.5 - event.offsetY / this.canvas.clientHeight) / 0.42));
    const [from, start] = begins || !this.last ? [step, y] : this.last;
    const count = Math.max(1, Math.abs(step - from));
    // A quick pointer skips steps: the curve goes straight between two of its places.
    for (let k = 0; k <= count; k++) app.curve[Math.round(from + ((step - from) * k) / count)] = start + ((y - start) * k) / count;
    this.last = [step, y];
    app.step = step;
    app.changed();
  }

  #key(event) {
    const lift = { ArrowUp: 0.05, ArrowDown: -0.05 }[event.key], move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (lift === undefined && move === undefined) return;
    event.preventDefault();
    const step = Math.min(app.step, app.curve.length - 1);
    if (move !== undefined) return app.moveTo(step + move);
    app.step = step;
    app.curve[step] = Math.max(-1, Math.min(1, app.curve[step] + lift));
    app.changed();
  }

  draw() {
    const { draw, width, height } = brush(this.canvas), count = app.curve.length;
    const place = (t) => [(t + 0.5) * (width / count), height * (0.5 - 0.42 * app.curve[t])];
    line(draw, [[0, height / 2], [width, height / 2]], colour("--line"), { thick: 1 });
    line(draw, Array.from(app.curve, (_, t) => place(t)), colour("--fore"));
    if (app.step >= count) return;
    draw.fillStyle = colour("--mark");
    draw.beginPath();
    draw.arc(...place(app.step), 5, 0, 7);
    draw.fill();
  }
}
