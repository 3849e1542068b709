// What follows in numbers: the facts beside the map, and the table of the branches.

const NARROW_SPACE = "\u202f";

function renderFacts() {
  const {extent, lost, cost} = numbers,
    [height, width] = state.size,
    [row, column] = position();
  const shown = isAlone() ? chainOf(state.cell, state.selected) : state.cell.branches;
  const canLose = shown.some(({kind}) => kind === "sep3x3");
  const whose = isAlone() ? `of branch ${state.selected} alone` : "of the whole cell";
  const tile = (name, title, value, notes) =>
    element(
      "div",
      {class: "card tile", "data-fact": name},
      element("h3", {}, title),
      element("div", {class: "value"}, value),
      ...notes.map((note) => element("div", {class: "muted"}, note)),
    );
  const reach = [row - extent.first[0], extent.last[0] - row, column - extent.first[1], extent.last[1] - column];
  part("facts").replaceChildren(
    tile("positions", "Positions read", count(extent.positions), [`of ${count(height * width)} on the map`, whose]),
    tile("box", "They span", `${extent.box[0]}${NARROW_SPACE}×${NARROW_SPACE}${extent.box[1]}`, [
      `up ${reach[0]}, down ${reach[1]}, left ${reach[2]}, right ${reach[3]}`,
      `${count(pixels(extent.box[0]))} × ${count(pixels(extent.box[1]))} pixels of the image, on the grid of corners`,
    ]),
    tile("share", "Read within it", percent(extent.share), [extent.share < 1 ? "the rest are holes: gridding" : "no holes"]),
    tile("lost", "Paths lost", percent(lost), [
      "end in the zeros beyond the border",
      lost > 0 ? "" : canLose ? "none here: move the output" : "means and 1×1 convolutions lose none",
    ]),
    tile("parameters", "Parameters", quantity(cost.total.parameters), [
      count(cost.total.parameters),
      `projection ${count(cost.projection.parameters)}`,
    ]),
    tile("multiply-adds", "Multiply-adds", quantity(cost.total.multiplyAdds), [
      `projection ${quantity(cost.projection.multiplyAdds)}`,
      `on ${height} × ${width} features`,
    ]),
  );
  part("summary").textContent =
    `${count(extent.positions)} of ${count(height * width)} positions read, within ${extent.box[0]} × ${extent.box[1]}: ` +
    `${percent(extent.share)} of it; ${percent(lost)} of the paths lost.`;
  part("remark").textContent = numbers.remark;
  part("image").textContent =
    `An image of ${count(pixels(height))} × ${count(pixels(width))} pixels, on the grid of corners, ` +
    `at output stride ${state.stride}` +
    (numbers.options.rateMultiplier > 1
      ? `, where all rates count ${numbers.options.rateMultiplier} times.`
      : state.stride === 16
        ? "."
        : ", where rates count as they stand.");
}

// The nine taps of a convolution, those inside the map filled.
function tapsPicture(branch) {
  const inside = [0, 1].map((axis) => tapsInside(branch, axis, position()[axis], state.size[axis], numbers.options));
  const dots = inside[0].flatMap((rowIn, r) =>
    inside[1].map((columnIn, c) =>
      element("circle", {cx: 4 + 7 * c, cy: 4 + 7 * r, r: 2.4, class: rowIn && columnIn ? "in" : "lost"}),
    ),
  );
  const held = inside.map((taps) => taps.filter(Boolean).length).reduce((a, b) => a * b);
  return [
    element(
      "svg",
      {
        viewBox: "0 0 22 22",
        width: 22,
        height: 22,
        class: "taps",
        role: "img",
        "aria-label": `${held} of 9 taps inside the map`,
      },
      dots,
    ),
    element("span", {}, `${held} of 9`),
  ];
}

function renderTable() {
  const number = (...content) => element("td", {class: "number"}, content);
  const cells = (cost) => [number(count(cost.parameters)), number(quantity(cost.multiplyAdds))];
  const sum = (name, cost) => element("tr", {}, element("th", {colspan: 5}, name), cells(cost));
  const rows = state.cell.branches.map((branch, i) => {
    const {positions, box} = numbers.ofBranches[i],
      isConv = branch.kind === "sep3x3",
      out = reachText(branch);
    const note = out ? `out of reach: ${out}` : branch.kind === "pool" ? windowsText(branch) : "";
    return element(
      "tr",
      {class: i === state.selected ? "compared" : ""},
      element("td", {}, rowButton(branch, i)),
      element("td", {}, operationLabel(branch), element("div", {class: "muted"}, note)),
      element("td", {class: "tapcell"}, isConv ? tapsPicture(branch) : "–"),
      number(isConv ? meanTapsInside(branch, state.size, numbers.options).toFixed(2) : "–"),
      number(count(positions), element("div", {class: "muted"}, `of ${box[0]} × ${box[1]}`)),
      cells(numbers.cost.branches[i]),
    );
  });
  const joined = `projection, ${count(rows.length * state.branchChannels)} → ${count(state.cellChannels)} channels`;
  const linear =
    "A cell without branches is the batch norm of its inputs: the linear probe. " +
    "It has no convolution, and reads the output's own place.";
  part("rows").replaceChildren(
    ...(rows.length
      ? [...rows, sum("all branches, counted as in Table 1", numbers.cost.total), sum(joined, numbers.cost.projection)]
      : [element("tr", {}, element("td", {colspan: 7}, linear))]),
  );
}

const rowButton = ({input, kind}, i) =>
  element(
    "button",
    {
      type: "button",
      class: "chip-button",
      style: `--fill: ${data.colours[kind][0]}`,
      "data-key": `row ${i}`,
      onclick: () => change({selected: i}),
    },
    `${inputName(input)} → ${i}`,
  );
