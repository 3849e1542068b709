// The explorer's one state, and how it changes; everything on the page is drawn from it again after each change.
// `data` has what Python knows: rates, grids, colours, the graph's measures and the cells to open.

const data = JSON.parse(document.getElementById("explorer-data").textContent);
const root = document.getElementById("explorer");
const part = (name) => root.querySelector(`[data-part="${name}"]`);
const LARGEST_MAP = Math.max(1025, ...data.cells.flatMap(({featureSize}) => featureSize)); // features per side
let state, numbers; // what is chosen, and what follows from it

// For `change`, which fits what follows from the cell: layers, the selected branch, the output's place.
function opened(given) {
  return {
    cell: parseCell(given.cell),
    label: given.label,
    inputs: given.inChannels,
    size: [...given.featureSize],
    at: given.at ?? null,
    stride: given.outputStride,
    pooling: given.pooling,
    poolingSize: given.poolingSize ?? null,
    branchChannels: given.branchChannels,
    cellChannels: given.cellChannels,
    selected: given.selected ?? 0,
    alone: given.alone ?? false,
  };
}

const centre = ([height, width]) => [Math.floor(height / 2), Math.floor(width / 2)];
const position = () => state.at ?? centre(state.size);
const optionsOf = ({stride, pooling, poolingSize}) => ({rateMultiplier: data.rateMultipliers[stride], pooling, poolingSize});
const isAlone = () => state.alone && state.selected >= 0;
const pixels = (features) => state.stride * (features - 1) + 1; // of the grid of corners, reference/grid.py

// Everything that is shown about a state. Raises CellError for windows that do not fit the map.
function computed(from) {
  const {cell, size} = from,
    options = optionsOf(from),
    at = from.at ?? centre(size);
  const branches = branchPaths(cell, size, at, options);
  const shown = from.alone && from.selected >= 0 ? [from.selected] : cell.branches.map((_, i) => i);
  const field = fieldOf(
    shown.map((i) => branches[i]),
    size,
    at,
  );
  const channels = {inputs: from.inputs, branches: from.branchChannels, cell: from.cellChannels};
  const extent = extentOf(field, size);
  const lost = 1 - extent.paths / pathsWithoutBorder(cell, shown);
  return {
    branches,
    field,
    extent,
    options,
    lost: lost > 1e-9 ? lost : 0, // less is rounding
    cost: costOf(cell, size, channels, options),
    remark: reachRemark(cell, size, options),
    ofBranches: branches.map((each) => {
      const [rows, columns] = each.map((paths) => extentOf(paths, [paths.length, 1]));
      return {positions: rows.positions * columns.positions, box: [rows.box[0], columns.box[0]]};
    }),
  };
}

// What `make` gives; null, after saying why, for what cannot be shown.
function attempt(make, name = "") {
  try {
    return make();
  } catch (error) {
    if (!(error instanceof CellError)) throw error;
    say(name ? `${name}: ${error.message}` : error.message);
    return null;
  }
}

// Take over a change, or say why not and leave all as it was. Returns whether it was taken.
function change(patch, from = null) {
  const next = {...state, ...patch};
  next.inputs = [...next.inputs];
  while (next.inputs.length < numInputs(next.cell)) next.inputs.push(next.inputs.at(-1));
  next.selected = Math.max(next.cell.branches.length ? 0 : -1, Math.min(next.selected, next.cell.branches.length - 1));
  next.at = next.at && next.at.map((place, axis) => Math.min(Math.max(place, 0), next.size[axis] - 1));
  const found = attempt(() => computed(next));
  if (!found) return false;
  [state, numbers] = [next, found];
  say("");
  render(from);
  rememberSoon();
  return true;
}

function changeBranch(i, patch) {
  const branches = state.cell.branches.map((branch, k) => (k === i ? {...branch, ...patch} : branch));
  return change({cell: {branches}, label: ""});
}

// A new branch reads what the selected one reads, with the same operation: change it then.
function addBranch() {
  if (state.cell.branches.length >= MOST_BRANCHES) return say(`this page shows up to ${MOST_BRANCHES} branches`);
  const model = state.cell.branches[state.selected] ?? {input: -1, kind: "sep3x3", size: [data.rates[0], data.rates[0]]};
  return change({cell: {branches: [...state.cell.branches, {...model}]}, selected: state.cell.branches.length, label: ""});
}

// Who read the branch that goes now reads what it read.
function removeBranch(i) {
  const gone = state.cell.branches[i].input;
  const left = state.cell.branches
    .filter((_, k) => k !== i)
    .map((branch) => {
      const input = branch.input === i ? gone : branch.input;
      return {...branch, input: input > i ? input - 1 : input};
    });
  change({cell: {branches: left}, selected: i === left.length ? i - 1 : i, label: ""});
}

// Uniform in the paper's space, over the layers that there are.
function randomCell() {
  const below = (limit) => Math.floor(Math.random() * limit);
  const pair = (from) => [from[below(from.length)], from[below(from.length)]];
  const numRates = data.rates.length ** 2,
    numGrids = data.gridSizes.length ** 2;
  return {
    branches: Array.from({length: data.numBranches}, (_, i) => {
      const input = below(i + state.inputs.length) - state.inputs.length,
        drawn = below(1 + numRates + numGrids);
      if (drawn === 0) return {input, kind: "conv1x1", size: null};
      return drawn <= numRates
        ? {input, kind: "sep3x3", size: pair(data.rates)}
        : {input, kind: "pool", size: pair(data.gridSizes)};
    }),
  };
}

// Show a cell that was given, and its question if it has one. Returns whether it can be shown.
function show(given) {
  const next = attempt(() => opened(given), given.label);
  if (!next || !change(next)) return false;
  ask(given);
  return true;
}

// As `show`, from elsewhere on the page: what is shown comes into view, and whoever uses keys goes on there.
function openCell(given) {
  if (!show(given)) return;
  root.scrollIntoView({block: "start"});
  root.focus({preventScroll: true});
}

// The question that goes with what was opened, if there is one, stands above the cell.
function ask({question, answer}) {
  part("asked").hidden = !question;
  part("question").textContent = question ?? "";
  part("answer").textContent = answer ?? "";
  part("asked").querySelector("details").open = false;
}

function say(message) {
  part("problem").textContent = message;
  part("problem").hidden = !message;
}
