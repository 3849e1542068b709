// What a cell reads and costs: search/cells/receptive_field.py, reach.py and cost.py, to whose numbers tests hold these.
// `options` are {rateMultiplier, pooling, poolingSize}; sizes and positions are [height, width] in features.
//
// A branch reads one map, and every operation goes along the height and along the width, each on its own. So the paths from an
// output back to the feature through a chain of branches are a product: (paths along height) × (paths along width). Two
// vectors say all about a branch, and the whole cell is the sum of these products.

// Positions that output p reads along one axis, each with its weight; a tap beyond the border is left out.
function readAlong({kind, size}, axis, p, extent, options) {
  if (kind === "conv1x1") return [[p, 1]];
  if (kind === "sep3x3") {
    const rate = size[axis] * options.rateMultiplier;
    return [p - rate, p, p + rate].filter((q) => q >= 0 && q < extent).map((q) => [q, 1]);
  }
  const {count, span} = meansOf(extent, size[axis], options.pooling, options.poolingSize?.[axis]);
  const position = extent > 1 ? p * ((count - 1) / (extent - 1)) : 0; // of the resize, with aligned corners
  const lower = Math.min(Math.trunc(position), count - 1),
    fraction = position - lower;
  const read = [];
  for (const [k, weight] of [
    [lower, 1 - fraction],
    [Math.min(lower + 1, count - 1), fraction],
  ]) {
    const [start, stop] = span(k);
    for (let q = start; weight > 0 && q < stop; q++) read.push([q, weight / (stop - start)]);
  }
  return read;
}

// How many means there are along one axis, and where each starts and stops: reference/pyramid_pooling.py.
function meansOf(extent, grid, pooling, pin) {
  if (pooling === "grid_cells") {
    return {count: grid, span: (i) => [Math.floor((i * extent) / grid), Math.ceil(((i + 1) * extent) / grid)]};
  }
  const window = windowSize(extent, grid, pin);
  return {count: extent - window + 1, span: (start) => [start, start + window]};
}

function windowSize(extent, grid, pin) {
  const window = Math.ceil((pin ?? extent) / grid);
  if (window < 1 || window > extent) {
    throw new CellError(
      `pooling window of ${window} (pooling_size ${pin ?? "None"}, grid ${grid}) must be 1 to the map's ${extent}`,
    );
  }
  return window;
}

// Branch i, the branch that it reads, and so on up to a layer of the backbone.
function chainOf(cell, i) {
  const chain = [];
  for (let k = i; k >= 0; k = cell.branches[k].input) chain.push(cell.branches[k]);
  return chain;
}

// How much each position along one axis adds to the output at `at`: the chain's reads, weight by weight.
function pathsAlong(chain, axis, at, extent, options) {
  let paths = new Float64Array(extent);
  paths[at] = 1;
  for (const operation of chain) {
    const before = new Float64Array(extent);
    paths.forEach((count, p) => {
      if (count > 0) for (const [q, weight] of readAlong(operation, axis, p, extent, options)) before[q] += count * weight;
    });
    paths = before;
  }
  return paths;
}

// Paths to the output at `at` from every position, through each branch as two vectors.
function branchPaths(cell, size, at, options) {
  return cell.branches.map((_, i) => [0, 1].map((axis) => pathsAlong(chainOf(cell, i), axis, at[axis], size[axis], options)));
}

// The sum of the branches' products, row by row; a cell without branches reads its own position.
function fieldOf(branches, size, at) {
  const field = new Float64Array(size[0] * size[1]);
  if (!branches.length) field[at[0] * size[1] + at[1]] = 1;
  for (const [rows, columns] of branches) {
    rows.forEach((row, r) => {
      if (row > 0)
        columns.forEach((column, c) => {
          field[r * size[1] + c] += row * column;
        });
    });
  }
  return field;
}

// What is to be said of a field: how many positions are read, first and last row and column, the least and the most paths.
function extentOf(field, size) {
  const found = {positions: 0, first: [...size], last: [-1, -1], least: Infinity, most: 0, paths: 0};
  field.forEach((value, k) => {
    if (!(value > 0)) return;
    const place = [Math.floor(k / size[1]), k % size[1]];
    for (const axis of [0, 1]) {
      found.first[axis] = Math.min(found.first[axis], place[axis]);
      found.last[axis] = Math.max(found.last[axis], place[axis]);
    }
    found.positions += 1;
    found.paths += value;
    found.least = Math.min(found.least, value);
    found.most = Math.max(found.most, value);
  });
  const box = [0, 1].map((axis) => found.last[axis] - found.first[axis] + 1);
  return {...found, box, share: found.positions / (box[0] * box[1])};
}

// The paths to an output far from all borders: nine for one through a convolution; the shares of a mean add up to 1.
const pathsWithoutBorder = (cell, indices) =>
  Math.max(
    indices.reduce(
      (sum, i) => sum + chainOf(cell, i).reduce((product, {kind}) => product * (kind === "sep3x3" ? 9 : 1), 1),
      0,
    ),
    cell.branches.length ? 0 : 1,
  );

// Which of the taps −1, 0 and 1 along one axis lie inside the map, and how many of nine do on average over all outputs.
const tapsInside = ({size}, axis, p, extent, {rateMultiplier}) =>
  [-1, 0, 1].map((tap) => p + tap * size[axis] * rateMultiplier).map((q) => q >= 0 && q < extent);
const meanTapsInside = ({size}, map, {rateMultiplier}) =>
  [0, 1].reduce((product, axis) => product * (1 + (2 * Math.max(0, map[axis] - size[axis] * rateMultiplier)) / map[axis]), 1);

// Along height and width: whether outer taps, or the neighbours in a window, are nowhere on the map.
function outOfReach({kind, size}, map, options) {
  if (kind === "conv1x1") return [false, false];
  return [0, 1].map((axis) => {
    if (kind === "sep3x3") return size[axis] * options.rateMultiplier >= map[axis];
    if (options.pooling === "grid_cells") return size[axis] % map[axis] === 0;
    return windowSize(map[axis], size[axis], options.poolingSize?.[axis]) === 1;
  });
}

const axesText = ([height, width]) => (height && width ? "height and width" : height ? "height" : "width");

function reachRemark(cell, map, options) {
  const groups = new Map();
  cell.branches.forEach((branch, i) => {
    const out = outOfReach(branch, map, options);
    if (!out.includes(true)) return;
    const name = `${branch.kind === "sep3x3" ? "rate" : "grid"} ${sizeText(branch.size)} of branch ${i}`;
    groups.set(axesText(out), [...(groups.get(axesText(out)) ?? []), name]);
  });
  const found = [...groups].map(([axes, names]) => `${names.join(", ")} (${axes})`).join("; ");
  return found && `out of reach on the ${sizeText(map)} map: ${found}`;
}

// The number of means along height and width.
const pooledSize = ({size}, map, options) =>
  [0, 1].map((axis) => meansOf(map[axis], size[axis], options.pooling, options.poolingSize?.[axis]).count);

// Weights and multiply-adds of each branch and of the projection, which Table 1 leaves out of its totals.
function costOf(cell, map, channels, options) {
  const pointwise = (from, to, [height, width]) => ({parameters: from * to, multiplyAdds: from * to * height * width});
  const plus = (a, b) => ({parameters: a.parameters + b.parameters, multiplyAdds: a.multiplyAdds + b.multiplyAdds});
  const branches = cell.branches.map((branch) => {
    const from = branch.input < 0 ? channels.inputs[-1 - branch.input] : channels.branches;
    if (branch.kind === "pool") return pointwise(from, channels.branches, pooledSize(branch, map, options));
    const mixing = pointwise(from, channels.branches, map);
    return branch.kind === "sep3x3" ? plus(pointwise(9, from, map), mixing) : mixing; // nine weights per channel come first
  });
  const projection = pointwise(branches.length * channels.branches, channels.cell, map);
  return {branches, projection, total: branches.reduce(plus, {parameters: 0, multiplyAdds: 0})};
}
