"""What this project wants to reach, judged by the rows of one run, and what the paper's search would take here."""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import median

from bench.cases import Suite
from bench.estimates import Estimate
from bench.plans import NEW_CELL, PAPER
from bench.results import Results, Row, best_other, eager, ours, right, speed
from bench.study_case import ASK_TELL, AT_ONCE, REPORT

_PAPER_CELLS, _PAPER_ITERATIONS = 28_000, 30_000
_PAPER_GPU_DAYS = 370 * 7  # "370 GPUs over one week" (paper, section 4.1)
_MS_PER_DAY = 86_400_000
_BEYOND_CACHES = "{}×{}×{}×{}".format(*PAPER.maps[-1])


def judged_targets(results: Results) -> list[tuple[str, str]]:
    """(target, verdict) of all targets for a device of this kind."""
    return list((_judged_on_a_cpu if results.environment.cuda == "none" else _judged_on_a_gpu)(results))


def _judged_on_a_cpu(results: Results) -> Iterable[tuple[str, str]]:
    iterations, new_cells = _cases(results, "proxy", "iteration"), _cases(results, "proxy", NEW_CELL)
    beside_eager = [filter(None, (ours(rows), eager(rows))) for rows in iterations if rows[0].dtype == "float32"]
    memory = [Estimate.exact(row.peak_memory_mb) for row in _ours(iterations) if row.peak_memory_mb is not None]
    starts = [row.time.times(1e-3) for row in _ours(new_cells) if row.time]
    yield _judged("proxy iteration, float32: at least 5× as quick as eager PyTorch", map(speed, beside_eager), at_least=5.0)
    yield _judged("proxy iteration: at least 4× as quick as the best of PyTorch", map(speed, iterations), at_least=4.0)
    yield _judged("peak memory of an iteration: under 1000 MB", memory, max, "{:.3g} MB", at_most=1000.0)
    yield _judged("a new cell has trained its first iteration within 1 s", starts, max, "{:.3g} s", at_most=1.0)
    yield _judged_caching(results)
    yield from _judged_study(results)


def _judged_on_a_gpu(results: Results) -> Iterable[tuple[str, str]]:
    iterations, new_cells = _cases(results, "proxy", "iteration"), _cases(results, "proxy", NEW_CELL)
    steps = {row.dtype: row.step for row in _ours(iterations) if row.step}
    starts = {row.dtype: row.time for row in _ours(new_cells) if row.time}
    both = steps.keys() & starts.keys()
    all_in = [steps[dtype].times(_PAPER_ITERATIONS).plus(starts[dtype]).times(1e-3) for dtype in both]
    yield _judged("proxy iteration: at most 0.67 ms", steps.values(), min, "{:.3g} ms", at_most=0.67)
    yield _judged("a cell all in, 30,000 iterations and its start: at most 21.6 s", all_in, min, "{:.1f} s", at_most=21.6)

    separable, in_training, in_inference = (
        [speed(rows) for rows in _cases(results, "ops", "sep3x3", mode)] for mode in ("", "training", "inference")
    )
    yield _judged("separable convolution, training: at least 2× the best of PyTorch", in_training, at_least=2.0)
    yield _judged("separable convolution, inference: at least 3× the best of PyTorch", in_inference, at_least=3.0)
    yield _judged("separable convolution: never slower, at any rate", separable, min, "least {:.2f}×", at_least=1.0)

    losses = _cases(results, "loss", mode="training")
    memory = map(_percent_of_memory, losses)
    yield _judged("loss and its gradient: at least 5× the best of PyTorch", map(speed, losses), at_least=5.0)
    yield _judged("loss: at most 5 % of its memory", memory, max, "{:.1f} %", at_most=5.0)

    depthwise = [row for row in _ours(_cases(results, "ops", "depthwise", "inference")) if row.shape == _BEYOND_CACHES]
    text = "depthwise at the size beyond any cache: at least 85 % of the copy bandwidth"
    yield _judged(text, map(_percent_of_roof, depthwise), form="{:.0f} %", at_least=85.0)
    yield _judged_caching(results)


def _judged_caching(results: Results) -> tuple[str, str]:
    """The row of a backbone's features, on any device."""
    text = "caching features: at least 0.91× as quick as the model alone"
    return _judged(text, map(speed, _cases(results, "features")), at_least=1 / 1.1)


def _judged_study(results: Results) -> Iterable[tuple[str, str]]:
    """The rows of what the paper's search costs to keep."""
    rows = {name: _largest_study(results, name) for name in (ASK_TELL, REPORT, AT_ONCE)}
    times = [row.time for row in rows[ASK_TELL] if row.time]
    starts = [Estimate.exact(row.first_call_s) for row in rows[ASK_TELL] if row.first_call_s is not None]
    pages = [Estimate.exact(row.written_mb) for row in rows[REPORT] if row.written_mb is not None]
    per_s = [Estimate.exact(1e3 * PAPER.study.at_once).over(row.time) for row in rows[AT_ONCE] if row.time]
    after, many = f"after {PAPER.study.trials[-1]:,} trials", f"by {PAPER.study.processes} processes"
    yield _judged(f"ask + tell {after}: under 50 ms", times, max, "{:.3g} ms", at_most=50.0)
    yield _judged(f"first ask + tell of a process {after}: under 5 s", starts, max, "{:.3g} s", at_most=5.0)
    yield _judged(f"trials {many} {after}: at least 20 a second", per_s, min, "{:.3g} a second", at_least=20.0)
    yield _judged(f"report {after}: under 5 MB", pages, max, "{:.3g} MB", at_most=5.0)


def _largest_study(results: Results, name: str) -> list[Row]:
    """Our rows of this name after as many trials as the paper's search has, in each database."""
    cases = [case for case in PAPER.study.all_cases() if case.name == name and case.trials == PAPER.study.trials[-1]]
    shapes = {case.shape for case in cases}
    return [row for row in _ours(_cases(results, "study", name)) if row.shape in shapes]


def _cases(results: Results, suite: Suite, name: str = "", mode: str = "") -> list[list[Row]]:
    """The rows of each case of the suite whose name begins so; without a mode, of both."""
    return [rows for rows in results.groups(suite) if rows[0].case.startswith(name) and mode in ("", rows[0].mode)]


def _ours(cases: Iterable[list[Row]]) -> list[Row]:
    return [row for row in map(ours, cases) if row]


def _percent_of_memory(rows: Sequence[Row]) -> Estimate | None:
    """Our peak memory, in percent of that of the quickest other provider."""
    mine, other = (row and row.peak_memory_mb for row in (ours(rows), best_other(rows)))
    return Estimate.exact(100 * mine / other) if mine and other else None


def _percent_of_roof(row: Row) -> Estimate | None:
    """The share of the roof; its interval is that of the time."""
    if row.percent_of_roof is None or row.time is None:
        return None
    return Estimate.exact(row.percent_of_roof * row.time.value).over(row.time)


def _judged(
    text: str,
    numbers: Iterable[Estimate | None],
    choose: Callable[[Sequence[float]], float] = median,
    form: str = "{:.2f}×",
    *,
    at_least: float = -math.inf,
    at_most: float = math.inf,
) -> tuple[str, str]:
    """The target and its verdict on the number that `choose` takes of the cases' numbers, a median, a least or a largest.

    What `choose` takes of the intervals' ends is the interval of that number, which has to be within the bounds as a whole.
    """
    known = [number for number in numbers if number is not None]
    if not known:
        return text, "not measured"
    values = [number.value for number in known]
    value = form.format(choose(values))
    if any(number.is_disturbed for number in known):
        return text, f"no verdict: {value} (busy machine)"
    lows, highs = ([end for end in ends if end is not None] for ends in zip(*((n.low, n.high) for n in known), strict=True))
    if len(lows) < len(known) or len(highs) < len(known):
        return text, f"undecided: {value} (too few rounds)"
    low, high = choose(lows), choose(highs)
    is_met, is_missed = at_least <= low and high <= at_most, high < at_least or low > at_most
    verdict = f"{'met' if is_met else 'missed' if is_missed else 'undecided'}: {value}"
    first, last = (form.removeprefix("least ").format(end) for end in (low, high))
    details = [f"{first} to {last}"] if first != last else []
    if choose is median and len(known) > 1:
        details.append(f"median of {len(known)}")
    return text, f"{verdict} ({', '.join(details)})" if details else verdict


def extrapolation(results: Results) -> list[str]:
    """What the paper's search would take here, from the proxy iteration alone, and cells per hour of a small search."""
    lines = []
    for rows in _cases(results, "proxy", "iteration"):
        known = [row for row in (ours(rows), best_other(rows)) if row and row.step]
        steps = {row.provider: row.step.value for row in known if row.step}
        days = (f"{ms * _PAPER_CELLS * _PAPER_ITERATIONS / _MS_PER_DAY:,.0f} by {name}" for name, ms in steps.items())
        start = f"{_PAPER_CELLS:,} cells × {_PAPER_ITERATIONS:,} iterations in {rows[0].dtype}"
        if steps:
            line = f"{start}: device-days {', '.join(days)} (the paper: {_PAPER_GPU_DAYS:,} GPU-days)"
            lines.append(line + _on_a_busy_machine(known))
    for row in (row for rows in results.groups("search") for row in right(rows)):
        line = f"{row.shape}, {row.provider}, {row.dtype}: {cells_per_hour(row):,.0f} cells per hour"
        lines.append(line + _on_a_busy_machine([row]))
    return lines


def _on_a_busy_machine(rows: Iterable[Row]) -> str:
    return ", on a busy machine" if any(row.is_disturbed for row in rows) else ""


def cells_per_hour(row: Row) -> float:
    """From a row of the search suite, whose shape begins with the number of cells."""
    return 3_600_000 * int(row.shape.split()[0]) / (row.median_ms or math.nan)
