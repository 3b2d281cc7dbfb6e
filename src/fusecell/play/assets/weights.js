// Weights of a cell as a picture, of which one is chosen and changed.

class WeightEditor {
  constructor(pane) {
    Object.assign(this, { pane, row: 0, column: 0 });
    this.box = element(`<details class="weights"><summary data-word="weights"></summary>
      <p class="hint" data-word="weightsHint"></p>
      <div class="controls"><label><span data-word="matrix"></span> <select class="matrix"></select></label>
        <span class="where"></span></div>
      <div class="frame"><canvas class="picture" tabindex="0" role="img" data-label="weights"></canvas>
        <div class="chosen"></div></div>
      <div class="controls"><label><span data-word="weight"></span>
        <input class="number" type="number" step="0.1"></label>
        <input class="range" type="range" min="-4" max="4" step="0.05" data-label="weight">
        <button type="button" class="zero" data-word="zero"></button>
        <button type="button" class="restore" data-word="restore"></button>
        <button type="button" class="take" data-word="take"></button></div></details>`);
    this.find = (name) => this.box.querySelector(`.${name}`);
    this.#listen();
  }

  #listen() {
    const picture = this.find("picture");
    this.box.addEventListener("toggle", () => this.draw());
    this.find("matrix").addEventListener("change", () => this.choose(0, 0));
    picture.addEventListener("pointerdown", (event) => {
      const [rows, columns] = this.shape();
      this.choose(placeIn(event.offsetY, picture.clientHeight, rows), placeIn(event.offsetX, picture.clientWidth, columns));
    });
    picture.addEventListener("keydown", (event) => {
      const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!move) return;
      event.preventDefault();
      this.choose(this.row + move[0], this.column + move[1]);
    });
    for (const name of ["number", "range"]) {
      this.find(name).addEventListener("input", (event) => this.set(Number(event.target.value)));
    }
    this.find("zero").addEventListener("click", () => this.#change(() => this.numbers().fill(0)));
    this.find("restore").addEventListener("click", () => this.#change(() => this.pane.cell.restoreWeights()));
    this.find("take").addEventListener("click", () => this.#change(() => this.pane.cell.takeWeights(this.pane.other().cell)));
  }

  /** Show another cell's weights. */
  open() {
    const names = Object.keys(this.pane.cell.model.weights);
    this.find("matrix").replaceChildren(...names.map((name) => new Option(name.replaceAll("_", " "), name)));
    if (names.includes("weight_hh")) this.find("matrix").value = "weight_hh";
    this.choose(0, 0);
  }

  name() {
    return this.find("matrix").value;
  }

  numbers() {
    return this.pane.cell.weight(this.name());
  }

  /** The matrix's rows and columns; a bias is a single column. */
  shape() {
    const [rows = 1, ...others] = this.pane.cell.model.weights[this.name()];
    return [rows, others.reduce((a, b) => a * b, 1)];
  }

  choose(row, column) {
    const [rows, columns] = this.shape();
    this.row = Math.max(0, Math.min(rows - 1, row));
    this.column = Math.max(0, Math.min(columns - 1, column));
    this.draw();
  }

  set(number) {
    if (Number.isFinite(number)) this.#change(() => { this.numbers()[this.row * this.shape()[1] + this.column] = number; });
  }

  #change(change) {
    change();
    this.pane.rerun();
  }

  draw() {
    if (!this.box.open || !this.pane.cell) return;
    const [rows, columns] = this.shape(), numbers = this.numbers(), most = numbers.reduce((a, b) => Math.max(a, Math.abs(b)), 0.5);
    heatmap(this.find("picture"), rows, columns, (row, column) => numbers[row * columns + column], { most });
    Object.assign(this.find("chosen").style, {
      left: `${(100 * this.column) / columns}%`, top: `${(100 * this.row) / rows}%`,
      width: `${100 / columns}%`, height: `${100 / rows}%`,
    });
    const number = numbers[this.row * columns + this.column];
    if (document.activeElement !== this.find("number")) this.find("number").value = number.toFixed(3);
    this.find("range").value = number;
    this.find("where").textContent = this.#where(columns);
    this.find("take").disabled = !this.pane.other()?.cell || !this.pane.cell.fits(this.pane.other().cell);
  }

  /** To what the chosen weight leads, and from what: "z 3 ← h 7". */
  #where(columns) {
    const { model, units } = this.pane.cell, name = this.name(), letters = model.task === "text";
    const letter = (index) => (letters ? `“${data.alphabet[index]}”` : "x");
    const block = model.blocks[Math.floor(this.row / units)] ?? "";
    const to = name.startsWith("readout") ? letter(this.row) : `${block} ${this.row % units}`.trim();
    if (columns === 1 && model.weights[name].length < 2) return to;
    return `${to} ← ${name.endsWith("_ih") ? letter(this.column) : `h ${this.column}`}`;
  }
}

/** Which of `count` equal parts of a length a point lies in. */
function placeIn(point, length, count) {
  return Math.max(0, Math.min(count - 1, Math.floor((point / length) * count)));
}
