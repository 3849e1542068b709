// The editor of a branch: the 81 operations as tiles, and what the branch reads.

const tiles = [];

function startEditor() {
  const tile = (operation, row, column, group) => {
    const [fill, edge] = data.colours[operation.kind];
    const made = element("button", {
      type: "button",
      role: "radio",
      class: "tile-op",
      style: `--fill: ${fill}; --edge: ${edge}`,
      title: operationLabel(operation),
      "aria-label": operationLabel(operation),
    });
    tiles.push({made, operation, row, column, group});
    return made;
  };
  const table = (kind, values, group) =>
    element(
      "div",
      {class: "tiles-op", style: `--columns: ${values.length}`},
      element("span"),
      values.map((value) => element("span", {class: "head"}, `${value}`)),
      values.map((h, row) => [
        element("span", {class: "head"}, `${h}`),
        values.map((w, column) => tile({kind, size: [h, w]}, row, column, group)),
      ]),
    );
  const block = (title, tilesOf) => element("div", {}, element("div", {class: "muted"}, title), tilesOf);
  part("operations").replaceChildren(
    block("3×3 separable: rate, height × width", table("sep3x3", data.rates, 0)),
    element(
      "div",
      {class: "stack"},
      block("pyramid pooling: grid", table("pool", data.gridSizes, 1)),
      block(
        "1×1 conv",
        element(
          "div",
          {class: "tiles-op", style: "--columns: 1"},
          element("span"),
          tile({kind: "conv1x1", size: null}, 0, 0, 2),
        ),
      ),
    ),
  );
  const take = (k) =>
    changeBranch(
      state.selected,
      tiles[k].operation.size
        ? {kind: tiles[k].operation.kind, size: [...tiles[k].operation.size]}
        : {kind: "conv1x1", size: null},
    );
  tiles.forEach(({made}, k) => {
    made.addEventListener("click", () => take(k));
    made.addEventListener("keydown", (event) => {
      const to = besideTile(tiles[k], event.key);
      if (!to) return;
      event.preventDefault();
      take(tiles.indexOf(to));
      to.made.focus();
    });
  });
  // Drag over the tiles to see the field grow and shrink.
  part("operations").addEventListener("pointermove", (event) => {
    const k =
      event.buttons & 1 ? tiles.findIndex(({made}) => made === document.elementFromPoint(event.clientX, event.clientY)) : -1;
    if (k >= 0 && tiles[k].made.getAttribute("aria-checked") !== "true") take(k);
  });
}

function besideTile({row, column, group}, key) {
  const [down, right] = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[key] ?? [0, 0];
  if (!down && !right) return null;
  const at = (g, r, c) => tiles.find((each) => each.group === g && each.row === r && each.column === c);
  const lastRate = data.rates.length - 1,
    lastGrid = data.gridSizes.length - 1;
  const beside = at(group, row + down, column + right);
  if (beside) return beside;
  if (group === 0 && right > 0) return at(1, Math.min(row, lastGrid), 0); // from one table into the next one
  if (group > 0 && right < 0) return at(0, row, lastRate);
  if (group === 1 && down > 0) return at(2, 0, 0);
  return group === 2 && down < 0 ? at(1, lastGrid, 0) : null;
}

// Along which axes an operation is out of reach here, in words; null if its windows, of a pinned size, do not fit the map.
function reachText(operation) {
  try {
    const out = outOfReach(operation, state.size, numbers.options);
    return out.includes(true) ? axesText(out) : "";
  } catch (error) {
    if (!(error instanceof CellError)) throw error;
    return null;
  }
}

function renderEditor() {
  const i = state.selected,
    branch = state.cell.branches[i];
  part("editor").hidden = !branch;
  part("no-branch").hidden = Boolean(branch);
  part("graph-note").hidden = !branch;
  if (!branch) return;
  part("editor-title").textContent = `Branch ${i}`;
  const same = ({kind, size}) => kind === branch.kind && String(size) === String(branch.size);
  const chosen = tiles.find(({operation}) => same(operation)) ?? null;
  tiles.forEach(({made, operation}, k) => {
    const out = reachText(operation);
    made.disabled = out === null;
    made.setAttribute("aria-checked", String(chosen?.made === made));
    made.tabIndex = chosen ? (chosen.made === made ? 0 : -1) : k ? -1 : 0;
    made.classList.toggle("out", Boolean(out));
    made.title = operationLabel(operation) + (out ? `: out of reach on this map (${out})` : "");
  });
  const inputs = [...state.inputs.map((_, k) => -1 - k), ...Array(i).keys()];
  part("reads").replaceChildren(
    element("span", {}, "reads"),
    ...inputs.map((input) =>
      element(
        "label",
        {class: "choice"},
        element("input", {
          type: "radio",
          name: "explorer-reads",
          value: input,
          checked: input === branch.input,
          "data-key": `reads ${input}`,
          onchange: () => changeBranch(i, {input}),
        }),
        inputName(input),
      ),
    ),
  );
  part("size").hidden = branch.kind === "conv1x1";
  part("size-name").textContent = branch.kind === "pool" ? "grid" : "rate";
  setValue("size-h", branch.size?.[0]);
  setValue("size-w", branch.size?.[1]);
  part("windows").textContent = branch.kind === "pool" ? windowsText(branch) : "";
}

function windowsText(branch) {
  const [rows, columns] = pooledSize(branch, state.size, numbers.options);
  if (state.pooling === "grid_cells") return `${rows} × ${columns} means, one of each cell of the grid`;
  const windows = [0, 1].map((axis) => windowSize(state.size[axis], branch.size[axis], state.poolingSize?.[axis]));
  return `windows of ${windows[0]} × ${windows[1]} features: ${rows} × ${columns} means`;
}

// A field's default is what the state has; its value may be what somebody types.
function setValue(name, value) {
  if (value === undefined) return;
  part(name).defaultValue = value;
  if (document.activeElement !== part(name)) part(name).value = value;
}
