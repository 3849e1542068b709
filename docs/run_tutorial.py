"""Run tutorial.ipynb and write it back with its outputs: `python docs/run_tutorial.py`, in some two minutes on two cores.

It runs in a folder of its own, which is empty, so nothing that is kept from earlier is shown. What differs from run to run or
from machine to machine, and is no result, is not kept: progress bars, times, and all outputs of cells with the tag `live`. A
cell that fails or warns ends the command, and the notebook stays as it was. Needs the extra `notebook` or `test`.
"""

import base64
import os
import re
from argparse import ArgumentParser
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

from search.files import write_text

NOTEBOOK = Path(__file__).with_name("tutorial.ipynb")
LIVE = "live"  # tag of cells whose outputs are for those who run them
PNG = "image/png"
_SECONDS = 900  # a cell, at most


def executed(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """The notebook with the outputs of a run in `folder`, by this Python and this checkout.

    Raises nbclient's CellExecutionError for a cell that fails, and RuntimeError for one that warns.
    """
    paths = str(NOTEBOOK.parents[1]), os.environ.get("PYTHONPATH", "")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    client = NotebookClient(
        notebook,
        timeout=_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    )
    with TemporaryDirectory() as profile:  # not the user's own, whose start-up files change what cells do
        client.execute(env=environment | {"IPYTHONDIR": profile})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            _require_no_warning(cell)
            live = LIVE in cell.metadata.get("tags", ())
            cell.outputs = [_reduced(output) for output in cell.outputs if not (live or _is_log(output))]
    notebook.metadata.language_info = {"name": "python"}  # not this Python's version
    return notebook


def _is_log(output: NotebookNode) -> bool:
    return bool(output.output_type == "stream" and output.name == "stderr")


def _require_no_warning(cell: NotebookNode) -> None:
    for output in cell.outputs:
        if _is_log(output) and "Warning" in output.text:
            raise RuntimeError(f"cell {cell.id} of {NOTEBOOK.name} warns: {output.text}")


def _reduced(output: NotebookNode) -> NotebookNode:
    """With 256 colours if it is a picture, as in docs/images: a third of the bytes."""
    if PNG in output.get("data", {}):
        with Image.open(BytesIO(base64.b64decode(output.data[PNG]))) as picture:
            reduced = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
        reduced.save(buffer := BytesIO(), format="png", optimize=True)
        output.data[PNG] = base64.b64encode(buffer.getvalue()).decode("ascii")
    return output


def with_iterations(notebook: NotebookNode, iterations: int) -> NotebookNode:
    """The notebook with another number of training steps of a cell. Raises ValueError if it does not set one, once."""
    changed = 0
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source, count = re.subn(r"^ITERATIONS = \d+", f"ITERATIONS = {iterations}", cell.source, flags=re.MULTILINE)
            changed += count
    if changed != 1:
        raise ValueError(f"{NOTEBOOK.name} sets ITERATIONS {changed} times, not once")
    return notebook


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the notebook as the command line asks."""
    parser = ArgumentParser(description="Run tutorial.ipynb and write it with its outputs.")
    parser.add_argument("--out", type=Path, default=NOTEBOOK, help="notebook to write; default: the one that is run")
    parser.add_argument("--folder", type=Path, help="empty folder to run in, which is kept; default: a temporary one")
    parser.add_argument("--iterations", type=int, help="training steps of a cell, to try it quickly; default: the notebook's")
    asked = parser.parse_args(arguments)
    if asked.folder is not None and (not asked.folder.is_dir() or any(asked.folder.iterdir())):
        parser.error(f"--folder {asked.folder}: is no empty folder; give one")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    if asked.iterations is not None:
        notebook = with_iterations(notebook, asked.iterations)
    with TemporaryDirectory() as temporary:
        notebook = executed(notebook, asked.folder or Path(temporary))
    nbformat.validate(notebook)
    write_text(asked.out, nbformat.writes(notebook) + "\n")
    print(f"notebook: {asked.out}")


if __name__ == "__main__":
    main()
