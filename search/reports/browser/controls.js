// All that is chosen besides the cell itself, and the buttons that open one.

function renderControls() {
  setValue("height", state.size[0]);
  setValue("width", state.size[1]);
  setValue("row", position()[0]);
  setValue("column", position()[1]);
  setValue("branch-channels", state.branchChannels);
  setValue("cell-channels", state.cellChannels);
  const stride = part("stride");
  if (![...stride.options].some((option) => option.value === String(state.stride)))
    stride.append(element("option", {value: state.stride}, `${state.stride}`));
  stride.value = state.stride;
  part("pooling").value = state.pooling;
  part("pinned").hidden = !state.poolingSize;
  part("pinned-size").textContent = state.poolingSize ? sizeText(state.poolingSize) : "";
  part("show-whole").checked = !isAlone();
  part("show-branch").checked = isAlone();
  part("show-branch").disabled = state.selected < 0;
  part("show-branch-name").textContent = state.selected < 0 ? "one branch" : `branch ${state.selected} alone`;
  renderLayers();
  part("remove-layer").disabled = state.inputs.length <= numInputs(state.cell);
  part("cells")
    .querySelectorAll("button")
    .forEach((button) => button.setAttribute("aria-pressed", String(button.textContent === state.label)));
}

// A field for the channels of each layer; fields stay as long as the layers are as many, so that one can go on typing.
function renderLayers() {
  const fields = part("layers");
  if (fields.childElementCount !== state.inputs.length) {
    fields.replaceChildren(
      ...state.inputs.map((_, k) => {
        const name = inputName(-1 - k);
        const input = element("input", {
          type: "number",
          min: 1,
          "data-part": `layer ${k}`,
          "aria-label": `channels of ${name}`,
        });
        onNumber(input, 1, MOST_CHANNELS, (value) => change({inputs: replaced(state.inputs, k, value)}));
        return element("label", {}, `${name} `, input);
      }),
    );
  }
  state.inputs.forEach((channels, k) => setValue(`layer ${k}`, channels));
}

const LARGEST_SIZE = 4096; // of a rate or a grid that is typed
const MOST_CHANNELS = () => 65536;
const replaced = (values, k, value) => values.map((each, j) => (j === k ? value : each));

const nameOf = (input) => input.getAttribute("aria-label") ?? input.closest("label").textContent.trim();

// Take a number while it is typed; what is none, or is refused, is marked, and on leaving the field the last good one comes
// back. `take` returns whether it took the number.
function onNumber(input, least, most, take) {
  input.addEventListener("input", () => {
    const value = Number(input.value),
      isGood = input.value.trim() !== "" && Number.isInteger(value) && value >= least && value <= most();
    input.setAttribute("aria-invalid", String(!(isGood && take(value))));
    if (!isGood) say(`${nameOf(input)}: give an integer from ${least} to ${most()}`);
  });
  input.addEventListener("blur", () => {
    if (input.getAttribute("aria-invalid") !== "true") return;
    input.setAttribute("aria-invalid", "false");
    input.value = input.defaultValue; // nothing is drawn again: what is being clicked has to stay
    say("");
  });
}

function startControls() {
  for (const axis of [0, 1]) {
    const take = (name, least, most, taken) => onNumber(part(name[axis]), least, most, taken);
    take(
      ["height", "width"],
      1,
      () => LARGEST_MAP,
      (value) => change({size: replaced(state.size, axis, value)}),
    );
    take(
      ["row", "column"],
      0,
      () => state.size[axis] - 1,
      (value) => change({at: replaced(position(), axis, value)}),
    );
    take(
      ["size-h", "size-w"],
      1,
      () => LARGEST_SIZE,
      (value) => changeBranch(state.selected, {size: replaced(state.cell.branches[state.selected].size, axis, value)}),
    );
  }
  onNumber(part("branch-channels"), 1, MOST_CHANNELS, (value) => change({branchChannels: value}));
  onNumber(part("cell-channels"), 1, MOST_CHANNELS, (value) => change({cellChannels: value}));
  part("stride").addEventListener("change", (event) => {
    // of the same image
    const stride = Number(event.target.value);
    const size = state.size.map((features) => Math.min(Math.ceil((pixels(features) - 1) / stride) + 1, LARGEST_MAP));
    const at = state.at && state.at.map((place) => Math.round((place * state.stride) / stride));
    if (!change({stride, size, at})) renderControls(); // the list shows what is, not what was refused
  });
  part("pooling").addEventListener("change", (event) => {
    if (!change({pooling: event.target.value})) renderControls();
  });
  part("release").addEventListener("click", () => change({poolingSize: null}));
  part("show-whole").addEventListener("change", () => change({alone: false}));
  part("show-branch").addEventListener("change", () => change({alone: true}));
  part("centre").addEventListener("click", () => change({at: null}));
  part("corner").addEventListener("click", () => change({at: [0, 0]}));
  part("add-branch").addEventListener("click", addBranch);
  part("remove-branch").addEventListener("click", () => removeBranch(state.selected));
  part("add-layer").addEventListener("click", () => {
    if (state.inputs.length < MOST_LAYERS) change({inputs: [...state.inputs, state.inputs.at(-1)]});
  });
  part("remove-layer").addEventListener("click", () => change({inputs: state.inputs.slice(0, -1)}));
  part("random").addEventListener("click", () => {
    if (change({cell: randomCell(), selected: 0, label: ""})) ask({});
  });
  data.cells.forEach((given) =>
    part("cells").append(
      element(
        "button",
        {
          type: "button",
          title: given.about ?? "",
          onclick: () => show(given),
        },
        given.label,
      ),
    ),
  );
  for (const button of document.querySelectorAll("[data-open]")) {
    button.hidden = false;
    button.addEventListener("click", () => openCell(data.cells[button.dataset.open]));
  }
  for (const button of document.querySelectorAll("[data-question]")) {
    button.hidden = false;
    button.addEventListener("click", () => openCell(data.questions[button.dataset.question]));
  }
}
