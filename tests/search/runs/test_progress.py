import io
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.dense_tasks import Measure
from search.runs.progress import Pace, Progress
from search.runs.tables import SEARCH, Key

MIOU = Measure("mIOU", "mean_iou")
HOUR = 3600.0


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 500.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@contextmanager
def on_terminal() -> Iterator[Terminal]:
    """Whatever is written to stderr goes to this terminal, of any width."""
    terminal = Terminal()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(terminal):
        patch.delenv("COLUMNS", raising=False)
        yield terminal


def trial(number: int) -> Key:
    return Key(SEARCH, number)


def last_state(terminal: Terminal) -> str:
    return re.split(r"[\r\n]", terminal.getvalue().strip())[-1].replace("\x1b[A", "").strip()


def test_the_bar_says_score_time_left_rate_workers_and_failures(clock: Clock) -> None:
    with on_terminal() as terminal, Progress(100, 10, MIOU, clock) as progress:
        progress.counted(10, failed=1, best=0.4)
        progress.workers(4)
        for number in range(10, 14):
            progress.started(trial(number))
        clock.now += 60
        progress.finished(trial(10))
        progress.finished(trial(11), "the loss was nan at iteration 3")
        progress.counted(12, failed=2, best=0.5)
        clock.now += 1
        progress.workers(4)
        state = last_state(terminal)
    assert "12/100" in state
    assert "best mIOU 50.00 %, 44 min left, 120/h, 2/4 workers busy, 2 failed" in state
    assert "trial 11 failed: the loss was nan at iteration 3" in terminal.getvalue()


def test_of_a_search_that_is_cut_short_the_bar_shows_the_work_and_how_far_cells_got(clock: Clock) -> None:
    with on_terminal() as terminal, Progress(100, 0, MIOU, clock) as progress:
        progress.started(trial(0))
        clock.now += 60
        progress.counted(100, failed=0, best=0.4, rungs=[100, 25], share=0.25, after=250)
        assert " 25%" in last_state(terminal)
        assert "| 100/100, best mIOU 40.00 % after 250 iterations, 3 min left, 1,500/h, 100 → 25 cells" in last_state(terminal)
        clock.now += 180
        progress.counted(100, failed=0, best=0.5, rungs=[100, 25, 6], share=1.0)
        state = last_state(terminal)
    assert "100%" in state
    assert "best mIOU 50.00 %, 1,500/h, 100 → 25 → 6 cells on the rungs" in state


def test_a_finished_trial_is_seen_at_once(clock: Clock) -> None:
    """Where cells are evaluated in the process itself, nothing more is said before the next one has ended."""
    with on_terminal() as terminal, Progress(100, 0, MIOU, clock) as progress:
        progress.started(trial(0))
        clock.now += HOUR
        progress.finished(trial(0))
        progress.workers(1)
        progress.others(0, 0)
        progress.counted(1, failed=0, best=0.4)
        assert "1/100, best mIOU 40.00 %, 4 d 3 h left, 1.0/h" in last_state(terminal)


def test_comparisons_are_named_and_are_no_trials(clock: Clock) -> None:
    with on_terminal() as terminal, Progress(100, 7, MIOU, clock) as progress:
        progress.started(Key("dpc", 2))
        progress.finished(Key("dpc", 2))
        progress.started(Key("aspp", 0))
        progress.finished(Key("aspp", 0), "out of GPU memory")
    assert "comparison: dpc, seed 2" in terminal.getvalue()
    assert "comparison: aspp, seed 0 failed: out of GPU memory" in terminal.getvalue()
    assert "7/100" in last_state(terminal)
    assert "best" not in last_state(terminal)
    assert "left" not in last_state(terminal)


def test_the_time_left_is_of_the_recent_rate_and_not_of_resumed_trials(clock: Clock) -> None:
    with on_terminal() as terminal, Progress(1000, 900, MIOU, clock) as progress:
        clock.now += 10 * HOUR  # comparisons come first, and are no trials
        progress.started(trial(900))
        for number in range(900, 950):
            clock.now += 60 if number < 920 else 120  # cells have become slower
            progress.counted(number + 1, failed=0, best=None)
    assert "1 h 40 min left, 30/h" in last_state(terminal)


def test_trials_of_other_processes_count(clock: Clock) -> None:
    with on_terminal() as terminal, Progress(30, 0, MIOU, clock) as progress:
        progress.started(trial(0))
        clock.now += HOUR
        progress.counted(1, failed=0, best=0.4)
        progress.others(cells=4, processes=2)
        progress.counted(15, failed=0, best=0.4)
    assert "15/30" in last_state(terminal)
    assert "1 h 0 min left, 15/h" in last_state(terminal)


def test_who_has_nothing_to_do_says_with_whom_the_cells_are(clock: Clock) -> None:
    with on_terminal() as terminal, Progress(100, 88, MIOU, clock) as progress:
        progress.started(trial(88))
        clock.now += 1
        progress.others(cells=12, processes=3)
        assert "12 cells with 3 other processes" in last_state(terminal)
        assert "waiting" not in last_state(terminal)
        progress.finished(trial(88))
        clock.now += 1
        progress.others(cells=12, processes=3)
        assert "waiting: 12 cells are with 3 other processes" in last_state(terminal)
        clock.now += 1
        progress.others(cells=1, processes=1)
        assert last_state(terminal).endswith("waiting: 1 cell is with 1 other process")


def test_of_many_failures_for_one_reason_one_in_ten_is_written(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with Progress(100, 0, MIOU, clock) as progress:
        for number in range(40):
            progress.started(trial(number))
            progress.finished(trial(number), f"the loss was nan at iteration {3 * number}")
        progress.started(trial(40))
        progress.finished(trial(40), "its worker died 3 times")
    lines = [line for line in capsys.readouterr().err.splitlines() if "failed:" in line]
    assert [line.split(" failed:")[0] for line in lines] == [f"trial {k}" for k in (0, 1, 2, 3, 4, 9, 19, 29, 39, 40)]
    assert lines[4].endswith("at iteration 12 (the 5th of its kind; from now on one in 10 is written)")
    assert lines[5].endswith("at iteration 27 (the 10th of its kind)")
    assert lines[-1] == "trial 40 failed: its worker died 3 times"


def test_where_no_bar_is_seen_a_line_is_written_each_minute_or_tenth(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with Progress(1000, 0, MIOU, clock) as progress:
        for number in range(60):  # six minutes without a tenth
            clock.now += 6
            progress.counted(number + 1, failed=0, best=0.25)
        assert len(capsys.readouterr().err.splitlines()) == 6
        clock.now += 1
        progress.counted(100, failed=0, best=0.25)
        assert capsys.readouterr().err.startswith("search: 100 of 1000 trials (10 %), best mIOU 25.00 %, ")
        for _ in range(600):  # nothing is finished, nothing is said
            clock.now += 1
            progress.workers(1)
        assert capsys.readouterr().err == ""
        progress.counted(101, failed=0, best=0.25)
        assert capsys.readouterr().err.startswith("search: 101 of 1000 trials")
        progress.counted(102, failed=0, best=0.25)
        assert capsys.readouterr().err == ""
    assert capsys.readouterr().err.startswith("search: 102 of 1000 trials")  # how it ended


def test_a_run_that_has_nothing_to_do_says_nothing(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    with Progress(12, 12, MIOU, clock) as progress:
        progress.counted(12, failed=0, best=0.25)
    assert capsys.readouterr().err == ""


@given(workers=st.integers(1, 64), seconds=st.floats(0.1, 1e5), rounds=st.integers(1, 30), waited=st.floats(0, 1))
def test_workers_in_step_are_as_fast_as_they_are_whenever_one_asks(
    workers: int, seconds: float, rounds: int, waited: float
) -> None:
    """All cells take the same time, so that the ends come together: the time left is that of the rounds left, exactly where
    the window begins with a round, else a round in `_ROUNDS` off."""
    pace, now = Pace(0.0, 0), 0.0
    for number in range(1, rounds + 1):
        now = number * seconds
        for k in range(workers):
            pace.add(now, (number - 1) * workers + k + 1, workers)
    left = pace.seconds_for(7 * workers, now + waited * seconds, workers)
    assert left is not None
    assert left == pytest.approx((7 - waited) * seconds, rel=0.21, abs=0.21 * seconds)


@given(at_once=st.integers(1, 8), pauses=st.lists(st.floats(0.01, 1e4), min_size=1, max_size=40), waited=st.floats(0, 1e6))
def test_a_time_left_is_never_negative_and_grows_while_nothing_ends(at_once: int, pauses: list[float], waited: float) -> None:
    pace, now = Pace(0.0, 0), 0.0
    for number, pause in enumerate(pauses):
        now += pause
        pace.add(now, number + 1, at_once)
    lefts = [pace.seconds_for(5, now + share * waited, at_once) for share in (0, 0.5, 1)]
    rates = [pace.per_second(now + share * waited, at_once) for share in (0, 0.5, 1)]
    assert all(left is not None and left >= -1e-6 for left in lefts)
    assert all(rate is not None for rate in rates)
    assert rates == sorted(rates, reverse=True)  # type: ignore[type-var]
