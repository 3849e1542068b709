// The address of the page: #cell=…&map=65x129 opens the same again, also from a file.

function addressOf() {
  const compact = JSON.stringify(JSON.parse(cellToJson(state.cell)));
  const fields = {
    cell: compact,
    map: state.size.join("x"),
    stride: state.stride,
    channels: state.inputs.join(","),
    widths: `${state.branchChannels},${state.cellChannels}`,
    pooling: state.pooling,
    windows: state.poolingSize?.join("x") ?? "none", // all is written: what another page begins with is another
  };
  if (state.at) fields.at = state.at.join(",");
  if (isAlone()) fields.branch = state.selected;
  return `#${new URLSearchParams(fields)}`;
}

// What an address asks for, else what the page begins with. Raises CellError, naming the field.
function fromAddress(hash, given) {
  const fields = new URLSearchParams(hash.slice(1));
  const integers = (name, separator, check, what) => {
    const values = fields.get(name).split(separator).map(Number);
    if (!values.every(Number.isSafeInteger) || !check(values))
      throw new CellError(`the address has ${name}=${fields.get(name)}: ${what}`);
    return values;
  };
  const isSize = (values) => values.length === 2 && values.every((value) => value >= 1 && value <= LARGEST_MAP);
  const arePositive = (values) => values.every((value) => value >= 1);
  const found = {...given, label: "", at: null, selected: 0, alone: false};
  const sizes = `give height x width, 1 to ${LARGEST_MAP} each, as in 65x129`;
  if (fields.has("cell")) found.cell = fields.get("cell");
  if (fields.has("map")) found.featureSize = integers("map", "x", isSize, sizes);
  if (fields.has("windows"))
    found.poolingSize = fields.get("windows") === "none" ? null : integers("windows", "x", isSize, `${sizes}, or none`);
  if (fields.has("stride"))
    [found.outputStride] = integers("stride", ",", ([stride]) => stride in data.rateMultipliers, "give 4 to 32");
  if (fields.has("channels")) found.inChannels = integers("channels", ",", arePositive, "give integers of at least 1");
  if (fields.has("widths")) {
    [found.branchChannels, found.cellChannels] = integers(
      "widths",
      ",",
      (v) => v.length === 2 && arePositive(v),
      "give two integers of at least 1",
    );
  }
  if (fields.has("at")) found.at = integers("at", ",", (values) => values.length === 2, "give row,column");
  if (fields.has("pooling")) {
    found.pooling = fields.get("pooling");
    if (!data.poolings.includes(found.pooling))
      throw new CellError(`the address has pooling=${found.pooling}: give ${data.poolings.join(" or ")}`);
  }
  if (fields.has("branch"))
    [found.selected, found.alone] = [integers("branch", ",", ([i]) => i >= 0, "give a branch's number")[0], true];
  return found;
}

let timer,
  ownAddress = "";

// Browsers allow few changes of the address in a short time, and a drag makes many.
function rememberSoon() {
  clearTimeout(timer);
  timer = setTimeout(() => {
    ownAddress = addressOf();
    try {
      history.replaceState(null, "", ownAddress);
    } catch {
      /* an address that may not change: the button still copies one */
    }
  }, 250);
}

function openAddress() {
  if (location.hash === ownAddress || !location.hash.includes("=")) return;
  const asked = attempt(() => fromAddress(location.hash, data.cells[0]));
  if (asked) show(asked);
}
