// The map: what an output reads, and the output that is dragged over it.

const MAP_HEIGHT = 460,
  LARGEST_FEATURE = 44; // pixels of the screen

const COLOURS = Uint32Array.from(data.colourMap, (hex) => {
  const [red, green, blue] = [0, 2, 4].map((k) => parseInt(hex.slice(k, k + 2), 16));
  return ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0; // as the bytes of a picture lie in memory
});

function renderMap() {
  const {field, extent} = numbers,
    [height, width] = state.size,
    canvas = part("field");
  canvas.width = width;
  canvas.height = height;
  const image = new ImageData(width, height),
    colours = new Uint32Array(image.data.buffer);
  const dark = Math.log(extent.least / 4),
    span = Math.log(Math.max(extent.most, 2 * extent.least)) - dark; // as draw_paths of diagram.py
  field.forEach((paths, k) => {
    colours[k] = paths > 0 ? COLOURS[Math.round(((Math.log(paths) - dark) / span) * (COLOURS.length - 1))] : 0xff000000;
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
  const frame = part("map");
  frame.style.aspectRatio = `${width} / ${height}`;
  frame.style.width = `min(100%, ${(MAP_HEIGHT * width) / height}px, ${LARGEST_FEATURE * width}px)`;
  renderMarks();
  renderScale();
}

function renderMarks() {
  const [height, width] = state.size,
    {first, box} = numbers.extent,
    [row, column] = position();
  const marks = part("marks");
  marks.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const lines = [];
  if (Math.max(height, width) <= 40) {
    for (let x = 1; x < width; x++) lines.push(`M${x} 0V${height}`);
    for (let y = 1; y < height; y++) lines.push(`M0 ${y}H${width}`);
  }
  marks.replaceChildren(
    element("path", {d: lines.join(""), class: "features"}),
    element("rect", {x: first[1], y: first[0], width: box[1], height: box[0], class: "box"}),
    element("path", {d: `M${column} ${row}h1v1h-1z`, class: "at"}),
    element("path", {
      d:
        `M${column + 0.5} 0V${row}M${column + 0.5} ${row + 1}V${height}` +
        `M0 ${row + 0.5}H${column}M${column + 1} ${row + 0.5}H${width}`,
      class: "cross",
    }),
  );
  marks.setAttribute(
    "aria-label",
    `Map of ${height} rows and ${width} columns; the output is at row ${row}, column ${column}. Arrow keys move it.`,
  );
}

// The colours from the least to the most paths that are there.
function renderScale() {
  const {least, most} = numbers.extent,
    from = Math.log(4) / Math.log((4 * Math.max(most, 2 * least)) / least);
  const to = most > least ? 1 : from;
  const stops = Array.from(
    {length: 12},
    (_, k) => data.colourMap[Math.round((from + ((to - from) * k) / 11) * (COLOURS.length - 1))],
  );
  part("scale").style.background = `linear-gradient(to right, ${stops.map((hex) => `#${hex}`).join(", ")})`;
  part("least").textContent = most > least ? pathsText(least) : "";
  part("most").textContent = pathsText(most);
}

function placeUnder(event) {
  const frame = part("marks").getBoundingClientRect();
  const along = (offset, extent, length) => Math.min(Math.max(Math.floor((offset / length) * extent), 0), extent - 1);
  return [
    along(event.clientY - frame.top, state.size[0], frame.height),
    along(event.clientX - frame.left, state.size[1], frame.width),
  ];
}

// What is read at a position, and through which branches: others fade in the graph, as do those that the map leaves out.
function pointAt(place) {
  const chain = isAlone() ? chainOf(state.cell, state.selected) : state.cell.branches;
  numbers.branches.forEach(([rows, columns], i) => {
    const isRead = chain.includes(state.cell.branches[i]) && (!place || rows[place[0]] * columns[place[1]] > 0);
    part("graph").querySelector(`[data-branch="${i}"]`).classList.toggle("faded", !isRead);
  });
  if (!place) {
    part("pointed").textContent =
      "Drag the white square, or click: it is the output. Point at a position to see which branches read it.";
    return;
  }
  const [row, column] = place,
    [down, right] = place.map((index, axis) => index - position()[axis]);
  const paths = numbers.field[row * state.size[1] + column];
  const offsets = [
    down ? `${Math.abs(down)} ${down > 0 ? "below" : "above"}` : [],
    right ? `${Math.abs(right)} ${right > 0 ? "to the right" : "to the left"}` : [],
  ].flat();
  const where = offsets.length ? ` (${offsets.join(", ")})` : ", the output's own place";
  part("pointed").textContent = `Row ${row}, column ${column}${where}: ${paths > 0 ? pathsText(paths) : "never read"}.`;
}

function startMap() {
  const marks = part("marks");
  let isDragged = false,
    waiting = null;
  const soon = (event) => {
    // at most one drawing per frame
    if (waiting === null)
      requestAnimationFrame(() => {
        const last = waiting;
        waiting = null;
        if (isDragged) change({at: placeUnder(last)}, "map");
        pointAt(placeUnder(last));
      });
    waiting = event;
  };
  marks.addEventListener("pointerdown", (event) => {
    isDragged = true;
    marks.setPointerCapture(event.pointerId);
    change({at: placeUnder(event)}, "map");
  });
  marks.addEventListener("pointermove", soon);
  for (const name of ["pointerup", "pointercancel"])
    marks.addEventListener(name, () => {
      isDragged = false;
    });
  marks.addEventListener("pointerleave", () => requestAnimationFrame(() => pointAt(null)));
  marks.addEventListener("keydown", (event) => {
    const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
    if (!step && event.key !== "Home") return;
    event.preventDefault();
    const speed = event.shiftKey ? 8 : 1;
    change({at: step ? position().map((place, axis) => place + speed * step[axis]) : null}, "map");
  });
}
