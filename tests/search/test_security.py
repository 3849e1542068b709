"""Files and databases of others: nothing in them is run, no name leads out of a folder, and other versions are refused."""

import ast
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.cells.space import load_cells
from search.errors import InputError, require_file_name
from search.folder import Folder
from search.pipeline import SearchSettings
from search.runs.database import has_password, shown
from search.runs.mirror import Mirror
from search.runs.study import head_path
from tests.search.runs.free_search import SPACE, TASK
from tests.search.runs.test_study import begin
from tests.test_architecture import called_name

ROOT = Path(__file__).parents[2]
READERS = [path for folder in ("reference", "fast", "search") for path in sorted((ROOT / folder).rglob("*.py"))]

RUN_WHAT_THEY_READ = {"cloudpickle", "dill", "jsonpickle", "joblib", "marshal", "shelve", "yaml"}  # modules
RUN = {"load", "loads", "Unpickler", "read_pickle", "load_module", "unsafe_load", "full_load"}
OWNERS = {"pickle", "_pickle", "torch", "np", "numpy", "pd", "pandas"}


def unsafe_reads(source: str) -> list[str]:
    """What could run code that a file or a peer names: unpickling by whatever name, and code in texts."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in RUN_WHAT_THEY_READ]
        elif isinstance(node, ast.ImportFrom):
            of_pickle = [alias.name for alias in node.names if node.module == "pickle" and alias.name in RUN]
            found += of_pickle + [node.module or ""] * ((node.module or "").split(".")[0] in RUN_WHAT_THEY_READ)
        elif isinstance(node, ast.Call):
            found += unsafe_call(node)
    return found


def unsafe_call(node: ast.Call) -> Iterator[str]:
    name = called_name(node)
    owner, _, last = name.rpartition(".")
    given_values = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
    if given_values.get("allow_pickle", False) is not False:
        yield f"{name}(allow_pickle)"
    is_of_arrays = owner in {"np", "numpy"} and last == "load"  # as it is, it refuses pickles
    is_of_weights = owner == "torch" and given_values.get("weights_only") is True
    runs_texts = isinstance(node.func, ast.Name) and last in {"eval", "exec"}
    if runs_texts or (last in RUN and owner in OWNERS and not is_of_arrays and not is_of_weights):
        yield name


@pytest.mark.parametrize("path", READERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_runs_what_it_reads(path: Path) -> None:
    assert unsafe_reads(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle\npickle.load(file)", ["pickle.load"]),
        ("from pickle import loads as read", ["loads"]),
        ("import pickle\npickle.Unpickler(file).load()", ["pickle.Unpickler"]),
        ("torch.load(path)", ["torch.load"]),
        ("torch.load(path, weights_only=False)", ["torch.load"]),
        ("torch.load(path, weights_only=True)\nnp.load(path)\nnp.savez(path, allow_pickle=False)\njson.load(file)", []),
        ("np.load(path, allow_pickle=True)", ["np.load(allow_pickle)"]),
        ("np.load(path, allow_pickle=flag)", ["np.load(allow_pickle)"]),
        ("pd.read_pickle(path)", ["pd.read_pickle"]),
        ("import joblib", ["joblib"]),
        ("from yaml import safe_load", ["yaml"]),
        ("eval(text)\nmodel.eval()", ["eval"]),
        ("import pickle, pickletools", []),
    ],
)
def test_unsafe_reads_are_noticed(source: str, found: list[str]) -> None:
    assert unsafe_reads(source) == found


BAD_NAMES = ["../x", "..", ".", "", "/etc/x", "a/b", "a\\b", "a\0b", ".hidden", "x" * 201, "ü" * 101]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_leads_out_of_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="which is no name of a file: use a short one without slashes"):
        head_path(tmp_path, name)
    with pytest.raises(InputError, match="which is no name of a file"):
        Folder(tmp_path).write_result(name, {})
    assert list(tmp_path.iterdir()) == []


@given(st.text())
def test_a_name_that_is_taken_stays_in_its_folder(name: str) -> None:
    folder = Path("/runs/one")
    try:
        path = folder / f"{require_file_name(name, 'a head')}.safetensors"
    except InputError:
        return
    assert path.parent == folder
    assert len(path.name.encode(errors="surrogatepass")) <= 255


def test_a_head_in_the_database_is_not_written_elsewhere(tmp_path: Path) -> None:
    """Whoever may write into the database may not write into the folders of those who use it."""
    directory = tmp_path / "runs" / "one"
    with begin(directory):
        pass
    with closing(sqlite3.connect(directory / "study.db")) as connection, connection:
        connection.execute("INSERT INTO dpc_heads (run, name, revision, content) VALUES (1, '../../../stolen', 99, x'00')")
    words = r"a head of \S+ is called '../../../stolen', which is no name"
    with pytest.raises(InputError, match=words), begin(directory) as study:
        study.show()
    assert not list(tmp_path.rglob("*stolen*"))


def test_a_compared_cell_has_a_name_that_a_file_can_have(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"`compare` .* is called 'x{40}…', which is no name of a file"):
        load_cells([f"{tmp_path}/{'x' * 201}.json"])


def test_studies_of_another_version_of_optuna_are_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    Mirror(url, "run", TASK, SPACE)
    with closing(sqlite3.connect(tmp_path / "study.db")) as connection, connection:
        connection.execute("UPDATE version_info SET schema_version = 99")
        connection.execute("UPDATE alembic_version SET version_num = 'v99'")
    with pytest.raises(InputError, match="the studies of run are of another version of Optuna: install that one"):
        Mirror(url, "run", TASK, SPACE)


@pytest.mark.parametrize(
    "url", ["postgresql+psycopg://me:secret@host/db", "postgresql://host/db?user=me&password=secret"], ids=["user", "query"]
)
def test_a_password_in_the_url_of_a_storage_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InputError, match="`storage` has a password in it") as error:
        SearchSettings(storage=url).check()
    assert "secret" not in str(error.value)
    assert has_password(url)


@pytest.mark.parametrize(
    "url", ["postgresql+psycopg://me@host/db", "sqlite:///study.db", "no url", "postgresql://host/db?host=h"]
)
def test_a_url_without_a_password_is_taken(url: str) -> None:
    assert not has_password(url)
    assert shown(url) == url


def test_messages_hide_a_password_that_an_earlier_version_took() -> None:
    assert shown("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
