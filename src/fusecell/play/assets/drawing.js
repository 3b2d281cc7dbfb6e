// Colours, heat maps, bars and curves, on canvases.

const SEQUENTIAL = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const DIVERGING = [[33, 102, 172], [146, 197, 222], [247, 247, 247], [244, 165, 130], [178, 24, 43]];
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** The colour of a place between 0 and 1. */
function shade(stops, place) {
  const x = Math.max(0, Math.min(1, place)) * (stops.length - 1), low = Math.min(Math.floor(x), stops.length - 2);
  return stops[low].map((channel, index) => Math.round(channel + (x - low) * (stops[low + 1][index] - channel)));
}

/** 256 colours each, as the words of a picture's memory, in which red comes first. */
const TABLES = [SEQUENTIAL, DIVERGING].map((stops) => {
  const bytes = Array.from({ length: 256 }, (_, i) => [...shade(stops, i / 255), 255]).flat();
  return new Uint32Array(Uint8Array.from(bytes).buffer);
});

/** Fit a canvas to its place on the screen; return what draws on it, in CSS pixels, and its size. */
function brush(canvas) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const draw = canvas.getContext("2d");
  draw.setTransform(ratio, 0, 0, ratio, 0, 0);
  draw.font = "12px system-ui, sans-serif";
  return { draw, width, height };
}

/** A picture of numbers, a pixel each: gates from 0 to 1, others from -most to most. */
function heatmap(canvas, rows, columns, at, { gate = false, most = 1 } = {}) {
  canvas.width = Math.max(1, columns);
  canvas.height = rows;
  const draw = canvas.getContext("2d"), picture = draw.createImageData(canvas.width, rows);
  const pixels = new Uint32Array(picture.data.buffer), table = TABLES[gate ? 0 : 1];
  const low = gate ? 0 : -most, scale = gate ? 255 : 255 / (2 * most);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const place = Math.round((at(row, column) - low) * scale);
      pixels[row * canvas.width + column] = table[Math.max(0, Math.min(255, place || 0))];
    }
  }
  draw.putImageData(picture, 0, 0);
}

/** One bar for each number; those that are held in another colour, with a knob to drag. */
function bars(canvas, numbers, { gate, most, held, chosen }) {
  const { draw, width, height } = brush(canvas), step = width / numbers.length;
  const zero = gate ? height - 1 : height / 2, unit = gate ? height - 2 : (height - 2) / 2 / most;
  const plain = colour("--bar"), mark = colour("--mark");
  numbers.forEach((number, index) => {
    const isHeld = !Number.isNaN(held[index]), top = zero - number * unit;
    if (index === chosen) {
      draw.fillStyle = colour("--line");
      draw.fillRect(index * step, 0, step, height);
    }
    draw.fillStyle = isHeld ? mark : plain;
    draw.fillRect(index * step + 0.5, Math.min(zero, top), Math.max(1, step - 1), Math.max(1, Math.abs(zero - top)));
    if (isHeld) draw.fillRect(index * step + 0.5, top - 1.5, Math.max(1, step - 1), 3);
  });
  draw.fillStyle = colour("--dim");
  draw.fillRect(0, zero, width, 1);
}

/** A line through points. */
function line(draw, points, stroke, { dashed = false, thick = 2 } = {}) {
  draw.beginPath();
  draw.strokeStyle = stroke;
  draw.lineWidth = thick;
  draw.setLineDash(dashed ? [5, 4] : []);
  points.forEach(([x, y], index) => (index ? draw.lineTo(x, y) : draw.moveTo(x, y)));
  draw.stroke();
  draw.setLineDash([]);
}

const DECADES = 6; // shown below 1 in the picture of gradients, and two above

/** Gradients over the distance in steps, on a logarithmic scale; one curve for each cell. */
function drawGradients(canvas, curves, most) {
  const { draw, width, height } = brush(canvas), left = 44, bottom = height - 22;
  const x = (distance) => left + (distance / most) * (width - left - 8);
  const y = (norm) => {
    const decades = norm > 0 ? Math.log10(norm) : -Infinity;
    return 8 + ((2 - Math.max(-DECADES, Math.min(2, decades))) / (2 + DECADES)) * (bottom - 8);
  };
  draw.fillStyle = colour("--dim");
  for (let decade = 2; decade >= -DECADES; decade -= 2) {
    draw.fillText(decade === 0 ? "1" : `1e${decade}`, 4, y(10 ** decade) + 4);
    line(draw, [[left, y(10 ** decade)], [width - 8, y(10 ** decade)]], colour("--line"), { thick: 1 });
  }
  for (let distance = 0; distance <= most; distance += 10) draw.fillText(String(distance), x(distance) - 6, height - 6);
  line(draw, [[left, y(FORGOTTEN)], [width - 8, y(FORGOTTEN)]], colour("--dim"), { dashed: true, thick: 1 });
  for (const { norms, stroke } of curves) {
    const gone = norms.findIndex((norm) => norm < 10 ** -DECADES), shown = gone < 0 ? norms : norms.slice(0, gone + 1);
    line(draw, shown.map((norm, k) => [x(k), y(norm)]), stroke);
  }
}
