// A cell of the page: its step runs in WebAssembly, as fusecell exports it; here are its weights and what is held.

const data = JSON.parse(document.getElementById("data").textContent);
const EPSILON = 1 / 64; // of central differences, whose errors from float32 and from curvature are then alike

class PlayedCell {
  /** Compile the step of a kind of cell that was trained for a task. */
  static async load(task, kind) {
    const model = data.models.find((each) => each.task === task && each.kind === kind);
    const script = `data:text/javascript;charset=utf-8,${encodeURIComponent(model.script)}`;
    const { Stream } = await import(script);
    const bytes = Uint8Array.from(atob(model.wasm), (character) => character.charCodeAt(0));
    return new PlayedCell(model, await Stream.create(bytes));
  }

  constructor(model, stream) {
    Object.assign(this, { model, stream });
    this.names = Object.keys(model.values);
    this.units = data.tasks[model.task].units;
    this.features = data.tasks[model.task].features;
    this.state = stream.state; // the initial state, then all weights
    this.trained = this.state.slice();
    this.input = new Float32Array(this.features + this.names.length * this.units);
    this.places = {};
    let at = model.stateSize;
    for (const [name, shape] of Object.entries(model.weights)) {
      const size = shape.reduce((a, b) => a * b, 1);
      this.places[name] = [at, at + size];
      at += size;
    }
    this.free();
  }

  /** A weight's numbers, row-major; what is written to them counts from the next run on. */
  weight(name) {
    return this.state.subarray(...this.places[name]);
  }

  restoreWeights() {
    this.state.set(this.trained);
  }

  /** Take the weights of a cell of the same shapes. */
  takeWeights(other) {
    this.state.set(other.state.subarray(other.model.stateSize), this.model.stateSize);
  }

  fits(other) {
    return JSON.stringify(this.model.weights) === JSON.stringify(other.model.weights);
  }

  /** Hold nothing, or nothing of one value. */
  free(name) {
    for (const each of name ? [name] : this.names) this.hold(each, NaN);
  }

  /** Hold a value of a unit, or of all, at a number, from a step on; NaN lets it go. */
  hold(name, number, unit = -1, from = 0) {
    this.holds ??= {};
    this.holds[name] ??= { numbers: new Float32Array(this.units).fill(NaN), from: new Int32Array(this.units) };
    const { numbers, from: begins } = this.holds[name];
    for (let u = 0; u < this.units; u++) {
      if (unit >= 0 && u !== unit) continue;
      numbers[u] = number;
      begins[u] = from;
    }
  }

  /** The step's input: x, and behind it what is held at a step. */
  #inputOf(x, t) {
    this.input.fill(NaN);
    this.input.set(x);
    for (const name of this.names) {
      const { numbers, from } = this.holds[name], at = this.model.holds[name][0];
      for (let u = 0; u < this.units; u++) if (t >= from[u]) this.input[at + u] = numbers[u];
    }
    return this.input;
  }

  /** Run over inputs, and then for some steps on inputs that `next` makes of each prediction. */
  run(inputs, more = 0, next = null) {
    const run = { inputs: [], outputs: [] };
    this.stream.state = this.state;
    for (const x of inputs) this.#advance(run, x);
    for (let t = inputs.length; t < inputs.length + more; t++) this.#advance(run, next(this.prediction(run, t - 1), t));
    return run;
  }

  /** Run one more step, on the input that `next` makes of the last prediction. */
  extend(run, next) {
    const t = run.inputs.length, state = this.state.slice();
    state.set(this.before(run, t));
    this.stream.state = state;
    this.#advance(run, next(this.prediction(run, t - 1), t));
  }

  #advance(run, x) {
    run.outputs.push(this.stream.step(this.#inputOf(x, run.inputs.length)));
    run.inputs.push(x);
  }

  /** What a run predicts after a step: scores of letters, or the next point. */
  prediction(run, t) {
    return run.outputs[t].subarray(0, this.features);
  }

  /** A value at a step of a run, one number for each unit. */
  value(run, name, t) {
    return run.outputs[t].subarray(...this.model.values[name]);
  }

  /** The cell's own states before a step of a run, one behind the other. */
  before(run, t) {
    return t === 0 ? this.state.slice(0, this.model.stateSize) : this.#own(run.outputs[t - 1]);
  }

  #own(output) {
    const own = new Float32Array(this.model.stateSize);
    this.model.states.forEach((name, index) => own.set(output.subarray(...this.model.values[name]), index * this.units));
    return own;
  }

  /** d states after / d states before a step of a run, row-major, by central differences of the step. */
  jacobian(run, t) {
    const size = this.model.stateSize, found = new Float64Array(size * size), own = this.before(run, t);
    const input = this.#inputOf(run.inputs[t], t), state = this.state.slice();
    const stepFrom = (column, number) => {
      state.set(own);
      state[column] = number;
      this.stream.state = state;
      return this.#own(this.stream.step(input));
    };
    for (let column = 0; column < size; column++) {
      const up = stepFrom(column, own[column] + EPSILON), down = stepFrom(column, own[column] - EPSILON);
      for (let row = 0; row < size; row++) found[row * size + column] = (up[row] - down[row]) / (2 * EPSILON);
    }
    return found;
  }
}
