"""What others take of the processor while something is timed: other programs, and other virtual machines (steal time).

Linux counts the busy time of each core in /proc/stat, and that of each process in /proc/<pid>/stat. What is busy on the cores
that this process may use, and is not the benchmark's own, is others'. It is measured during the timing itself, because a load
average of before says nothing about it.
"""

import multiprocessing
import os
import time
from pathlib import Path
from typing import NamedTuple, Self

LIMIT_PERCENT = 5.0  # of the cores; more is no idle machine
_LEAST_S = 0.05  # less is not told from nothing: the kernel counts in ticks of 10 ms


class _CpuTimes(NamedTuple):
    clock_s: float
    busy_s: float
    own_s: float


class Others:
    """Measures over a `with` block how much of the processor others have taken, in percent of this process's cores.

    `percent` is None within the block, and where the system does not tell.
    """

    percent: float | None = None

    def __enter__(self) -> Self:
        self._before = _cpu_times()
        return self

    def __exit__(self, *exception: object) -> None:
        after = _cpu_times()
        if self._before is not None and after is not None:
            self.percent = percent_between(self._before, after, len(os.sched_getaffinity(0)))


def percent_between(before: _CpuTimes, after: _CpuTimes, cores: int) -> float:
    """What others took of so many cores between two readings.

    >>> round(percent_between(_CpuTimes(0, 50, 20), _CpuTimes(10, 65, 30), cores=2), 6)  # 15 s busy, of which 10 s our own
    25.0
    """
    clock_s, busy_s, own_s = (late - early for early, late in zip(before, after, strict=True))
    others_s = busy_s - own_s
    return 100 * others_s / (cores * clock_s) if others_s >= _LEAST_S else 0.0


def _cpu_times() -> _CpuTimes | None:
    """Read the clock, the busy seconds of our cores, and those of the benchmark's processes; None if this is not Linux."""
    try:
        ticks = os.sysconf("SC_CLK_TCK")
        return _CpuTimes(time.monotonic(), _busy_ticks() / ticks, _own_ticks() / ticks)
    except (OSError, AttributeError, ValueError):
        return None


def _busy_ticks() -> int:
    """Everything but idle and waiting for the disk; time that the host gave to another virtual machine counts as busy."""
    cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    lines = (line.split() for line in Path("/proc/stat").read_text().splitlines())
    times = [[int(value) for value in values] for name, *values in lines if name in cores]
    return sum(user + nice + system + irq + softirq + steal for user, nice, system, _, _, irq, softirq, steal, *_ in times)


def _own_ticks() -> int:
    """Those of the benchmark's main process and all that descend from it, also those that have ended."""
    parents, ticks = dict[int, int](), dict[int, int]()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()  # behind the name, which may contain anything
        except OSError:  # it has ended meanwhile
            continue
        pid = int(path.parent.name)
        parents[pid], ticks[pid] = int(fields[1]), sum(map(int, fields[11:15]))
    parent = multiprocessing.parent_process()
    own = {os.getpid() if parent is None or parent.pid is None else parent.pid}
    while more := {pid for pid, its_parent in parents.items() if its_parent in own} - own:
        own |= more
    return sum(ticks.get(pid, 0) for pid in own)
