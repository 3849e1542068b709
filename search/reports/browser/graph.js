// The graph of the cell, laid out as search/reports/diagram.py does.

// A branch is one row below what it reads, children share the width below their parent, and every branch with children has a
// lane to their left for its own arrow to the concatenation: no arrows cross. Boxes are [x, y, width, height] of centres.
function layoutCell(cell, layers) {
  const {boxWidth, boxHeight, barHeight, columnGap, layerGap, laneWidth, margin} = data.layout;
  const read = [...new Set(cell.branches.map((branch) => branch.input).filter((input) => input < 0))].sort((a, b) => b - a);
  const inputs = read.length ? read : Array.from({length: layers}, (_, k) => -1 - k);
  const children = (i) => cell.branches.flatMap((branch, k) => (branch.input === i ? [k] : []));
  const depths = cell.branches.map((_, i) => chainOf(cell, i).length);
  const centres = [],
    lanes = [],
    ends = new Map();

  const place = (i, left) => {
    const below = children(i);
    if (!below.length) {
      centres[i] = lanes[i] = left + boxWidth / 2;
      return left + boxWidth;
    }
    lanes[i] = left + laneWidth / 2;
    const right = placeRow(below, left + laneWidth);
    centres[i] = (centres[below[0]] + centres[below.at(-1)]) / 2;
    return right;
  };
  const placeRow = (row, left) => row.reduce((x, i) => place(i, x) + columnGap, left) - columnGap;

  let left = margin;
  for (const i of inputs) {
    ends.set(i, [left, children(i).length ? placeRow(children(i), left) : left + boxWidth]);
    left = ends.get(i)[1] + columnGap;
  }
  const width = left - columnGap + margin,
    layersBelow = Math.max(0, ...depths);
  const height = 2 * (margin + barHeight) + layersBelow * boxHeight + (layersBelow + 1) * layerGap;
  const top = margin + barHeight / 2;
  const rows = depths.map((depth) => margin + barHeight + layerGap + boxHeight / 2 + (depth - 1) * (boxHeight + layerGap));
  const branches = cell.branches.map((_, i) => [centres[i], rows[i], boxWidth, boxHeight]);
  const bars = new Map([...ends].map(([i, [from, to]]) => [i, [(from + to) / 2, top, to - from, barHeight]]));
  const projection = [width / 2, height - margin - barHeight / 2, width - 2 * margin, barHeight];
  const end = projection[1] - barHeight / 2;
  const arrows = cell.branches.flatMap(({input}, i) => {
    const [x, y] = branches[i];
    const source = input < 0 ? [x, top + barHeight / 2] : [branches[input][0], branches[input][1] + boxHeight / 2];
    const laneStart = lanes[i] === x ? x : x - 0.35 * boxWidth; // apart from the arrows to the children
    return [arrow(source, x, y - boxHeight / 2, layerGap), arrow([laneStart, y + boxHeight / 2], lanes[i], end, layerGap)];
  });
  if (!cell.branches.length) for (const [x, y] of bars.values()) arrows.push(arrow([x, y + barHeight / 2], x, end, layerGap));
  return {width, height, bars, projection, branches, arrows};
}

// The turn is made at once, between two layers, and the rest is straight.
function arrow([startX, startY], x, y, gap) {
  if (x === startX) return `M${x} ${startY}V${y}`;
  const middle = startY + gap / 2,
    turned = startY + gap;
  return `M${startX} ${startY}C${startX} ${middle} ${x} ${middle} ${x} ${turned}${y > turned + 1e-9 ? `V${y}` : ""}`;
}

function renderGraph() {
  const layout = layoutCell(state.cell, state.inputs.length),
    scale = 100; // user units per inch
  const box = ([x, y, width, height], attributes, lines, extra = {}) => {
    const first = y * scale - (lines.length - 1) * 7 + 4.5;
    return element(
      "g",
      extra,
      element("rect", {
        x: (x - width / 2) * scale,
        y: (y - height / 2) * scale,
        width: width * scale,
        height: height * scale,
        rx: 8,
        ...attributes,
      }),
      lines.map((line, k) => element("text", {x: x * scale, y: first + 14 * k, "text-anchor": "middle"}, line)),
    );
  };
  const choose = (patch) => ({
    tabindex: 0,
    role: "button",
    onclick: () => change(patch),
    onkeydown: (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        change(patch);
      }
    },
  });
  const [barFill, barEdge] = data.colours.bar;
  const svg = element(
    "svg",
    {
      viewBox: `0 0 ${layout.width * scale} ${layout.height * scale}`,
      width: layout.width * scale,
      height: layout.height * scale,
      style: `min-width: ${0.7 * layout.width * scale}px`,
      role: "group",
      "aria-label": "the graph of the cell",
    },
    element(
      "defs",
      {},
      element(
        "marker",
        {id: "explorer-tip", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto"},
        element("path", {d: "M0 0L8 4L0 8z", class: "tip"}),
      ),
    ),
    element(
      "g",
      {transform: `scale(${scale})`},
      layout.arrows.map((d) => element("path", {d, class: "arrow", "marker-end": "url(#explorer-tip)"})),
    ),
    [...layout.bars].map(([i, place]) => box(place, {fill: barFill, stroke: barEdge}, [`feature ${inputName(i)}`])),
    state.cell.branches.map((branch, i) => {
      const [fill, edge] = data.colours[branch.kind],
        [x, y, width, height] = layout.branches[i];
      const isSelected = i === state.selected;
      const extra = {
        ...choose({selected: i}),
        class: isSelected ? "branch selected" : "branch",
        "data-branch": i,
        "data-key": `branch ${i}`,
        "aria-pressed": String(isSelected),
        "aria-label": `branch ${i}: ${operationLabel(branch)}, reads ${inputName(branch.input)}`,
      };
      const made = box(layout.branches[i], {fill, stroke: edge}, operationLabel(branch).split(", "), extra);
      const [left, top] = [(x - width / 2) * scale + 3, (y - height / 2) * scale - 2];
      made.append(
        element("circle", {cx: left, cy: top, r: 8.5, fill: "white", stroke: edge}),
        element("text", {x: left, y: top + 3.5, "text-anchor": "middle", class: "index"}, `${i}`),
      );
      return made;
    }),
    box(layout.projection, {fill: barFill, stroke: barEdge}, [state.cell.branches.length ? "concat + 1×1" : "batch norm"], {
      ...choose({alone: false}),
      class: isAlone() ? "output faded" : "output",
      "data-key": "output",
      "aria-pressed": String(!isAlone()),
      "aria-label": "the output of the whole cell",
    }),
  );
  part("graph").replaceChildren(svg);
}
