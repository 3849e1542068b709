import html
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from search.errors import InputError
from search.reports.run import Running, write_report
from search.reports.run_files import ReportRefresher
from search.runs.study import Run
from tests.search.test_report import BASELINES, make_run, write_examples

RELOADS = '<meta http-equiv="refresh"'


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def reader(run: Run, clock: Clock, seconds: list[float]) -> Callable[[], Run]:
    """Reads this run; the k-th time takes so many seconds of the clock. The list is used up."""

    def read() -> Run:
        clock.now += seconds.pop(0)
        return run

    return read


def test_pages_of_a_running_search_are_a_minute_apart_or_fifty_times_what_one_takes(tmp_path: Path) -> None:
    clock, seconds = Clock(), [0.5, 4.0, 0.5]
    refresher = ReportRefresher(reader(make_run(tmp_path, [0.4]), clock, seconds), 10, clock)
    written = []
    for _ in range(500):
        clock.now += 1.0
        before = len(seconds)
        refresher.tick()
        if len(seconds) < before:
            written.append(clock.now - 1000)
        if not seconds:
            break
    first, second, third = written
    assert first == 60 + 0.5
    assert second == first + 60 + 4.0
    assert third == second + 4 * 50 + 0.5


def test_a_page_says_how_far_a_running_search_is_and_loads_itself_until_it_is_finished(tmp_path: Path) -> None:
    run = make_run(tmp_path, [0.4, None, 0.3], BASELINES)
    page = write_report(run, running=Running(28_000, datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC))).read_text(encoding="utf-8")
    text = " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())
    assert "running As of 2026-05-04 03:02:01 UTC, 3 of 28,000 trials." in text
    assert page.index(RELOADS) < page.index("<body>")
    finished = write_report(run).read_text(encoding="utf-8")
    assert RELOADS not in finished
    assert "As of" not in finished


def test_the_page_of_a_running_search_is_without_heads_and_examples_of_an_earlier_end(tmp_path: Path) -> None:
    run = make_run(tmp_path, [0.4])
    write_examples(run)
    assert "data:image/jpeg" in write_report(run).read_text(encoding="utf-8")
    (tmp_path / "heads").mkdir()
    (tmp_path / "heads" / "best.safetensors").write_bytes(b"of no use")
    with pytest.raises(InputError, match=r"best\.safetensors"):
        write_report(run)
    assert "data:image/jpeg" not in write_report(run, running=Running(3, datetime.now(UTC))).read_text(encoding="utf-8")


def test_a_page_that_cannot_be_written_is_said_once_and_the_search_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clock, run = Clock(), make_run(tmp_path, [0.4])
    tries = []

    def read() -> Run:
        tries.append(clock.now)
        if len(tries) < 3:
            raise InputError("the study cannot be read: disk full")
        return run

    refresher = ReportRefresher(read, 10, clock)
    for _ in range(3):
        clock.now += 60
        refresher.tick()
    assert len(tries) == 3
    assert capsys.readouterr().err.count("the study cannot be read: disk full") == 1
    assert (tmp_path / "report.html").exists()
