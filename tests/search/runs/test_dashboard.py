"""What `optuna-dashboard` shows of a search, asked of its server."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from search.runs.tables import SEARCH
from tests.search.runs.test_study import begin, claim, make_result

pytest.importorskip("optuna_dashboard")

_PATIENCE = 120  # seconds for the server to come up
_POLL = 0.1


@pytest.fixture(params=["a file", "PostgreSQL"])
def storage(request: pytest.FixtureRequest) -> str | None:
    """None for the run's own file."""
    url: str | None = None if request.param == "a file" else request.getfixturevalue("database")
    return url


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def dashboard(url: str, log: Path) -> Iterator[str]:
    """The address of a dashboard of this storage."""
    port = _free_port()
    command = [str(Path(sys.executable).with_name("optuna-dashboard")), url, "--port", str(port), "--server", "wsgiref"]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            deadline = time.monotonic() + _PATIENCE
            while True:
                try:
                    urlopen(f"http://127.0.0.1:{port}/api/studies").close()
                    break
                except URLError:
                    if process.poll() is not None or time.monotonic() > deadline:
                        pytest.fail(f"the dashboard does not answer: {log.read_text()}")
                    time.sleep(_POLL)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def ask(address: str) -> dict[str, Any]:
    with urlopen(address) as answer:
        content: dict[str, Any] = json.load(answer)
    return content


def test_the_dashboard_shows_scores_cells_costs_and_failures(tmp_path: Path, storage: str | None) -> None:
    scores = iter((0.25, 0.5, None, 0.75))
    with begin(tmp_path / "mine", storage=storage) as study:
        told: list[tuple[str, list[float] | None, str]] = []
        while len(told) < 3:
            key, cell, *_ = claim(study)
            if key.name != SEARCH:
                study.tell(key, make_result(0.4))
            elif (score := next(scores)) is None:
                study.tell_failure(key, "the loss was nan at iteration 3")
                told.append(("Fail", None, str(cell)))
            else:
                study.tell(key, make_result(score))
                told.append(("Complete", [score], str(cell)))
        study.show()
    url = storage or f"sqlite:///{tmp_path / 'mine' / 'study.db'}"
    with dashboard(url, tmp_path / "log") as address:
        studies = ask(f"{address}/api/studies")["study_summaries"]
        (of_search,) = (each for each in studies if each["study_name"].endswith(" search"))
        assert of_search["study_name"].startswith("mine")
        shown = ask(f"{address}/api/studies/{of_search['study_id']}")
    assert shown["objective_names"] == ["mIOU"]
    attributes = [{each["key"]: each["value"] for each in trial["user_attrs"]} for trial in shown["trials"]]
    trials = zip(shown["trials"], attributes, strict=True)
    seen = [(trial["state"], trial.get("values"), of_trial["cell"]) for trial, of_trial in trials]
    assert seen == told
    assert float(attributes[0]["multiply-adds"]) == 3e9
    assert attributes[2]["failure"] == "the loss was nan at iteration 3"
