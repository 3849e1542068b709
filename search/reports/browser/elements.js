// Elements of the page, and numbers as they are written in it.

function element(name, attributes = {}, ...children) {
  const made = ["svg", "g", "rect", "path", "text", "tspan", "circle", "title", "defs", "marker", "pattern", "line"].includes(
    name,
  )
    ? document.createElementNS("http://www.w3.org/2000/svg", name)
    : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null));
  return made;
}

const count = (value) => Math.round(value).toLocaleString("en-US");
const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;

// A number of paths; through poolings it is a share.
function pathsText(value) {
  const text =
    value >= 1 || value === 0 ? String(Number(value.toFixed(value < 100 ? 2 : 0))) : String(Number(value.toPrecision(2)));
  return `${text} ${text === "1" ? "path" : "paths"}`;
}

// Three digits and a unit, as search/reports/page.py writes large counts.
function quantity(value) {
  const rounded = value < 1000 ? value : threeDigits(value);
  for (const [limit, unit] of [
    [1e9, "B"],
    [1e6, "M"],
    [1e3, "K"],
  ]) {
    if (rounded >= limit)
      return `${(rounded / limit).toFixed(Math.max(0, 2 - Math.floor(Math.log10(rounded / limit))))} ${unit}`;
  }
  return String(value);
}

// Of an integer; a half goes to the even digit, as in Python.
function threeDigits(value) {
  const unit = 10 ** (String(value).length - 3),
    below = Math.floor(value / unit),
    rest = value / unit - below;
  return (below + (rest > 0.5 || (rest === 0.5 && below % 2 === 1) ? 1 : 0)) * unit;
}
