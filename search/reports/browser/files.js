// The cell as JSON: typed, opened, dropped, copied, saved.

const LARGEST_FILE = 1e6; // bytes

function renderJson() {
  if (document.activeElement === part("json")) return; // where somebody writes
  part("json").value = cellToJson(state.cell);
  part("json").setAttribute("aria-invalid", "false");
}

function takeText(text, name = "") {
  const cell = attempt(() => parseCell(text), name);
  if (!cell || !change({cell, selected: 0, alone: false, label: ""}, "json")) return false;
  ask({}); // which was of another cell
  return true;
}

async function openFile(file) {
  if (!file) return;
  if (file.size > LARGEST_FILE) {
    say(`${file.name}: a cell's file has some hundred bytes, this one ${count(file.size)}`);
    return;
  }
  let text;
  try {
    text = new TextDecoder("utf-8", {fatal: true}).decode(await file.arrayBuffer());
  } catch {
    say(`${file.name}: not a text in UTF-8`);
    return;
  }
  part("json").blur();
  if (takeText(text, file.name)) {
    renderJson();
    part("said").textContent = `${file.name} is open`;
  }
}

async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // browsers without a clipboard for such pages
    const field = element("textarea", {}, text);
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  part("said").textContent = `${what} copied`;
}

function startJson() {
  part("json").addEventListener("input", (event) => {
    event.target.setAttribute("aria-invalid", String(!takeText(event.target.value)));
  });
  part("copy").addEventListener("click", () => copy(cellToJson(state.cell), "JSON"));
  part("link").addEventListener("click", () => copy(location.href.split("#")[0] + addressOf(), "link"));
  part("save").addEventListener("click", () => {
    const address = URL.createObjectURL(new Blob([cellToJson(state.cell)], {type: "application/json"}));
    element("a", {href: address, download: "cell.json"}).click();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  });
  root.querySelectorAll("[data-opens]").forEach((button) => button.addEventListener("click", () => part("file").click()));
  part("file").addEventListener("change", (event) => {
    openFile(event.target.files[0]);
    event.target.value = "";
  });
  addEventListener("dragover", (event) => {
    event.preventDefault();
    root.classList.add("dropping");
  });
  addEventListener("dragleave", () => root.classList.remove("dropping"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    root.classList.remove("dropping");
    openFile(event.dataTransfer.files[0]);
  });
}
