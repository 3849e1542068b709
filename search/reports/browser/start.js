// Draw everything, and begin.

// Draw all from the state; what is drawn anew gives its focus to what takes its place.
function render(from) {
  const key = document.activeElement?.dataset?.key;
  if (from !== "map") {
    renderGraph(); // these two do not depend on the output's place
    renderEditor();
  }
  renderMap();
  renderFacts();
  renderTable();
  renderControls();
  if (from !== "json") renderJson();
  if (key) [...root.querySelectorAll("[data-key]")].find((each) => each.dataset.key === key)?.focus();
  if (from !== "map") pointAt(null);
}

startMap();
startEditor();
startControls();
startJson();
root.hidden = false;
// With the first cell that can be shown; if there is none, with no branches, and saying why.
if (!data.cells.some(show)) {
  const why = part("problem").textContent;
  show({...data.cells[0], cell: "[]", label: ""});
  say(why);
}
openAddress();
addEventListener("hashchange", openAddress);
