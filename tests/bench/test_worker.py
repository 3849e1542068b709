"""What a function does to its process reaches nobody else."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from bench.worker import Worker, WorkerLost, WorkFailed, has_lost_its_device


def refuse(text: str) -> None:
    raise ValueError(f"{text}\nand a second line")


def count(to: int, say: Callable[[Any], None]) -> str:
    for number in range(to):
        say(number)
    return "counted"


def die(by: int) -> None:
    os.kill(os.getpid(), by)


def start_and_hang(say: Callable[[Any], None]) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    say(child.pid)
    time.sleep(600)


def shout(text: str) -> None:
    print(text, flush=True)
    os.system(f"echo {text} from below")


def test_calls_one_function_after_the_other_and_survives_what_they_raise() -> None:
    said: list[int] = []
    with Worker() as worker:
        assert worker(divmod, 7, 2) == (3, 1)
        with pytest.raises(WorkFailed, match=r"^ValueError: no$"):
            worker(refuse, "no")
        assert worker(count, 3, say=said.append) == "counted"
        assert worker(os.getpid) != os.getpid()
        assert not worker.is_lost
    assert said == [0, 1, 2]


@pytest.mark.parametrize("by", [signal.SIGSEGV, signal.SIGKILL])
def test_a_death_is_named(by: signal.Signals) -> None:
    with Worker() as worker:
        with pytest.raises(WorkerLost, match=by.name):
            worker(die, by.value)
        assert worker.is_lost
        assert worker(divmod, 7, 2) == (3, 1)  # by a new one


@pytest.mark.parametrize("ahead", [False, True])
def test_a_fresh_process_has_done_nothing_yet(ahead: bool) -> None:
    with Worker(ahead=ahead) as worker:
        first = worker.fresh()(os.getpid)
        assert first == worker(os.getpid)
        assert worker.fresh()(os.getpid) != first
        assert not is_running(first)


def test_at_its_limit_it_ends_with_all_that_it_has_started() -> None:
    said: list[int] = []
    with Worker() as worker:
        worker(os.getpid)  # has imported what it needs: the limit is for the function alone
        with pytest.raises(WorkerLost, match="stopped after 5 s"):
            worker(start_and_hang, limit_s=5, say=said.append)
    deadline = time.monotonic() + 60
    while is_running(said[0]):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_does_not_reach_it() -> None:
    with Worker() as worker:
        os.kill(worker._process.pid or 0, signal.SIGINT)
        assert worker(divmod, 7, 2) == (3, 1)


def test_what_it_prints_goes_to_the_log(tmp_path: Path) -> None:
    with Worker(log=tmp_path / "log") as worker:
        worker(shout, "hello")
        with pytest.raises(WorkFailed):
            worker(refuse, "no")
    text = (tmp_path / "log").read_text()
    assert "hello\nhello from below\n" in text
    assert "and a second line" in text


@pytest.mark.parametrize("error", [None, RuntimeError("CUDA error: an illegal memory access was encountered")])
def test_a_broken_context_is_noticed(error: Exception | None) -> None:
    with (
        mock.patch.object(torch.cuda, "is_initialized", return_value=True),
        mock.patch.object(torch.cuda, "synchronize", side_effect=error),
    ):
        assert has_lost_its_device() == (error is not None)


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


NESTED = """
import os, sys, time
from bench.worker import Worker
from tests.bench.test_worker import nest
if __name__ == "__main__":
    with Worker() as worker:
        worker(nest, say=lambda pid: print(pid, flush=True))
"""


def nest(say: Callable[[Any], None]) -> None:
    """A worker's own worker, whose child hangs; all three are named."""
    say(os.getpid())
    with Worker() as worker:
        worker(start_and_hang, say=say)


def test_nobody_is_left_behind_when_the_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "nested.py"
    script.write_text(NESTED)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        pids = [int(process.stdout.readline()) for _ in range(2)]
        assert all(map(is_running, pids))
        process.kill()
    deadline = time.monotonic() + 60
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_another_thread_may_kill_it() -> None:
    with Worker() as worker, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(worker, time.sleep, 600)
        time.sleep(0.5)
        worker.kill()
        with pytest.raises(WorkerLost, match="SIGKILL"):
            waiting.result(30)
        with pytest.raises(WorkerLost):
            worker(os.getpid)  # for good
