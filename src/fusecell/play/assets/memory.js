// How long a cell remembers: the gradient of its state with respect to earlier ones, measured on the running step.

const FORGOTTEN = 0.1; // of the gradient there is at distance 0

/**
 * Norms of d h(T) / d state(T - k) for k = 0, 1, ..., each over the root of the units, so that the first is 1.
 * They are products of the steps' Jacobians: what backpropagation multiplies, and what vanishes or explodes.
 */
function gradientNorms(cell, run, last, most) {
  const size = cell.model.stateSize, units = cell.units;
  let product = new Float64Array(units * size); // d h(T) / d state(T - k)
  for (let unit = 0; unit < units; unit++) product[unit * size + unit] = 1;
  const norms = [norm(product) / Math.sqrt(units)];
  for (let t = last; t >= 0 && norms.length <= most; t--) {
    product = times(product, cell.jacobian(run, t), units, size);
    norms.push(norm(product) / Math.sqrt(units));
  }
  return norms;
}

function norm(numbers) {
  let sum = 0;
  for (const number of numbers) sum += number * number;
  return Math.sqrt(sum);
}

/** The product of a (rows, size) and a (size, size) matrix. */
function times(left, right, rows, size) {
  const result = new Float64Array(rows * size);
  for (let row = 0; row < rows; row++) {
    for (let k = 0; k < size; k++) {
      const factor = left[row * size + k];
      if (factor === 0) continue;
      for (let column = 0; column < size; column++) result[row * size + column] += factor * right[k * size + column];
    }
  }
  return result;
}

/** After how many steps the gradient is below a tenth; undefined if it isn't within those measured. */
function memoryLength(norms) {
  const found = norms.findIndex((each) => each < FORGOTTEN);
  return found < 0 ? undefined : found;
}
