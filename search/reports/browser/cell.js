// A cell as plain data, read from and written to the authors' JSON: reference/cell.py, with its sentences for what is wrong.
// A cell is {branches: [{input, kind, size}]}; size is the rate of a "sep3x3", the grid of a "pool", null of a "conv1x1".

const KNOWN_KEYS = new Map([
  ["conv", ["input", "kernel", "op", "rate"]],
  ["pyramid_pooling", ["grid_size", "input", "op"]],
]);
const MOST_BRANCHES = 50,
  MOST_LAYERS = 16; // that can still be drawn; the files themselves know no limit

class CellError extends Error {}

// A number of a file that is not an integer, also 1.0, or one too large to be exact.
class Inexact {
  constructor(text) {
    this.value = Number(text);
    this.text = text;
  }
  toString() {
    if (!/[.eE]/.test(this.text)) return this.text;
    return Number.isInteger(this.value) && Math.abs(this.value) < 1e16 ? `${this.value}.0` : `${this.value}`;
  }
}

function parseCell(text) {
  let items;
  try {
    items = JSON.parse(text, (key, value, context) => {
      const isExact =
        typeof value !== "number" || (context?.source ? /^-?\d+$/.test(context.source) : Number.isInteger(value));
      return isExact && (typeof value !== "number" || Number.isSafeInteger(value))
        ? value
        : new Inexact(context?.source ?? `${value}`);
    });
  } catch (error) {
    throw new CellError(`not valid JSON: ${error.message}`);
  }
  if (!Array.isArray(items)) {
    throw new CellError(`a cell is a JSON list with one object per branch, got ${pythonType(items)}`);
  }
  return checkedCell({branches: items.map(branchFromJson)});
}

function branchFromJson(item, i) {
  const refuse = (message) => {
    throw new CellError(`branch ${i}: ${message}`);
  };
  if (pythonType(item) !== "dict") refuse(`must be a JSON object, got ${pythonText(item)}`);
  const known = KNOWN_KEYS.get(item.op);
  if (!known) refuse(`op must be "conv" or "pyramid_pooling", got ${pythonText(item.op)}`);
  for (const key of Object.keys(item).filter((each) => !known.includes(each))) {
    refuse(`unknown key ${pythonText(key)} for op ${pythonText(item.op)}; known keys are ${known.join(", ")}`);
  }
  if (!Object.hasOwn(item, "input")) refuse("key 'input' is missing; -1 is the backbone feature, i is branch i");
  return {input: item.input, ...operationFromJson(item, refuse)};
}

function operationFromJson(item, refuse) {
  if (item.op === "pyramid_pooling") return {kind: "pool", size: heightWidth(item.grid_size, "grid_size", refuse)};
  const isSquare = (size) => item.kernel === size || (isPair(item.kernel) && item.kernel.every((each) => each === size));
  if (isSquare(1)) {
    const neutral = (rate) => rate == null || isOne(rate) || (isPair(rate) && rate.every(isOne));
    if (!neutral(item.rate)) refuse(`rate has no effect on a 1x1 kernel, remove it, got ${pythonText(item.rate)}`);
    return {kind: "conv1x1", size: null};
  }
  if (isSquare(3)) return {kind: "sep3x3", size: heightWidth(item.rate, "rate", refuse)};
  return refuse(`kernel must be 1 or 3, got ${pythonText(item.kernel)}`);
}

function heightWidth(value, field, refuse) {
  if (isPair(value) && value.every((size) => Number.isInteger(size) && size >= 1)) return [...value];
  return refuse(`${field} must be two integers of at least 1, as [height, width], got ${pythonText(value)}`);
}

function checkedCell(cell) {
  cell.branches.forEach(({input}, i) => {
    if (!Number.isInteger(input) || input >= i) {
      const earlier = i ? ` or an earlier branch, 0 to ${i - 1}` : "";
      const choices = `-1 (the backbone feature), -2 and so on (its other layers)${earlier}`;
      throw new CellError(`branch ${i}: input must be ${choices}, got ${pythonText(input)}`);
    }
    cell.branches[i].input = input + 0; // no −0
  });
  if (cell.branches.length > MOST_BRANCHES)
    throw new CellError(`this page shows up to ${MOST_BRANCHES} branches, got ${cell.branches.length}`);
  if (numInputs(cell) > MOST_LAYERS)
    throw new CellError(`this page shows up to ${MOST_LAYERS} layers, got input ${-numInputs(cell)}`);
  return cell;
}

const isPair = (value) => Array.isArray(value) && value.length === 2;
// As Python compares with 1.
const isOne = (value) => value === 1 || value === true || (value instanceof Inexact && value.value === 1);

// How many layers of a backbone the cell needs, at least 1.
const numInputs = (cell) => Math.max(1, ...cell.branches.map((branch) => -branch.input));

function pythonType(value) {
  if (value === null || value === undefined) return "NoneType";
  if (Array.isArray(value)) return "list";
  if (value instanceof Inexact) return /[.eE]/.test(value.text) ? "float" : "int";
  return {boolean: "bool", number: "int", string: "str"}[typeof value] ?? "dict";
}

// `repr` of Python, in which the sentences of reference/cell.py speak of what they got.
function pythonText(value) {
  switch (pythonType(value)) {
    case "NoneType":
      return "None";
    case "bool":
      return value ? "True" : "False";
    case "str": {
      const quote = value.includes("'") && !value.includes('"') ? '"' : "'";
      const escaped = value.replace(/\\/g, "\\\\").replace(/\n/g, "\\n").replace(/\r/g, "\\r").replace(/\t/g, "\\t");
      return quote + (quote === "'" ? escaped.replace(/'/g, "\\'") : escaped) + quote;
    }
    case "list":
      return `[${value.map(pythonText).join(", ")}]`;
    case "dict":
      return `{${Object.entries(value)
        .map(([key, each]) => `${pythonText(key)}: ${pythonText(each)}`)
        .join(", ")}}`;
    default:
      return String(value);
  }
}

// The authors' format, one branch per line, as Python writes it.
function cellToJson(cell) {
  const lines = cell.branches.map(({input, kind, size}) => {
    const pair = size && `[${size[0]}, ${size[1]}]`;
    const fields = {
      conv1x1: '"kernel": 1, "op": "conv"',
      sep3x3: `"kernel": 3, "rate": ${pair}, "op": "conv"`,
      pool: `"grid_size": ${pair}, "op": "pyramid_pooling"`,
    }[kind];
    return `{${fields}, "input": ${input}}`;
  });
  return `[${lines.join(",\n ")}]\n`;
}

// F for the backbone feature, F2, F3 and so on for its other layers, or the number of a branch.
const inputName = (input) => (input === -1 ? "F" : input < 0 ? `F${-input}` : `${input}`);

const operationLabel = ({kind, size}) =>
  ({
    conv1x1: () => "1×1 conv",
    sep3x3: () => `3×3 sep, rate ${sizeText(size)}`,
    pool: () => `pyramid pooling, ${sizeText(size)}`,
  })[kind]();

const sizeText = (size) => `${size[0]}×${size[1]}`;
