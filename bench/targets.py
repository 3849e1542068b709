"""What this project wants to reach, judged by the rows of one run, and what the paper's search would take here."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from bench.plans import NEW_CELL, PAPER
from bench.results import Results, Row, best_other, eager, ours, ratio, right

PAPER_CELLS, PAPER_ITERATIONS = 28_000, 30_000
_PAPER_GPU_DAYS = 370 * 7  # "370 GPUs over one week" (paper, section 4.1)
_MS_PER_DAY = 86_400_000
_BEYOND_CACHES = "{}×{}×{}×{}".format(*PAPER.maps[-1])
NOT_MEASURED = "not measured"

Selection = Callable[[Row], bool]
Figures = Callable[[Results], list[float]]


def is_separable(row: Row) -> bool:
    """A separable convolution alone, at any rate."""
    return row.suite == "ops" and row.case.startswith("sep3x3")


def _is_iteration(row: Row) -> bool:
    return row.suite == "proxy" and row.case == "iteration"


def _is_new_cell(row: Row) -> bool:
    return row.case == NEW_CELL


def _is_loss(row: Row) -> bool:
    return row.suite == "loss" and row.mode == "training"


def _in_mode(mode: str) -> Selection:
    return lambda row: is_separable(row) and row.mode == mode


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _ours(results: Results, select: Selection) -> list[Row]:
    return [row for row in map(ours, results.groups()) if row and select(row)]


def _ratios(select: Selection) -> Figures:
    """To the best other, by case."""
    return lambda results: _known(ratio(group) for group in results.groups() if select(group[0]))


def _numbers(select: Selection, number: Callable[[Row], float | None]) -> Figures:
    """One of our rows' numbers, by case."""
    return lambda results: _known(map(number, _ours(results, select)))


def _eager_over_ours(results: Results) -> list[float]:
    """For float32 iterations."""
    groups = [group for group in results.groups() if _is_iteration(group[0]) and group[0].dtype == "float32"]
    pairs = [(ours(group), eager(group)) for group in groups]
    return [other.median_ms / mine.median_ms for mine, other in pairs if mine and other and mine.median_ms and other.median_ms]


def _loss_memory_shares(results: Results) -> list[float]:
    """Percent of what the best other takes."""
    pairs = [(ours(group), best_other(group)) for group in results.groups() if _is_loss(group[0])]
    memories = [(mine.peak_memory_mb, other.peak_memory_mb) for mine, other in pairs if mine and other]
    return [100 * mine_mb / other_mb for mine_mb, other_mb in memories if mine_mb and other_mb]


def _cell_seconds(results: Results) -> list[float]:
    """A cell all in, by dtype: 30,000 iterations, and the start of a new cell."""
    starts = {row.dtype: row.median_ms or 0.0 for row in _ours(results, _is_new_cell)}
    steps = {row.dtype: row.step_ms or 0.0 for row in _ours(results, _is_iteration) if row.dtype in starts}
    return [(PAPER_ITERATIONS * step_ms + starts[dtype]) / 1e3 for dtype, step_ms in steps.items()]


def _is_beyond_caches(row: Row) -> bool:
    return row.case.startswith("depthwise") and row.mode == "inference" and row.shape == _BEYOND_CACHES


@dataclass(frozen=True)
class Target:
    """`figures` are what was measured, `choose` takes the one that counts, `form` writes it."""

    device: str  # CPU or GPU
    text: str
    figures: Figures
    choose: Callable[[Sequence[float]], float] = median
    form: str = "{:.2f}×"
    at_least: float = -math.inf
    at_most: float = math.inf

    def verdict(self, results: Results) -> str:
        is_there = self.device == ("CPU" if results.environment.cuda == "none" else "GPU")
        values = self.figures(results) if is_there else []
        if not values:
            return NOT_MEASURED
        value = self.choose(values)
        span = f" (median of {len(values)}; {self.form.format(min(values))} to {self.form.format(max(values))})"
        spread = span if self.choose is median and len(values) > 1 else ""
        return f"{'met' if self.at_least <= value <= self.at_most else 'missed'}: {self.form.format(value)}{spread}"


_SEPARABLE = "separable convolution"
TARGETS = (
    Target("CPU", "proxy iteration, float32: at least 5× as quick as eager PyTorch", _eager_over_ours, at_least=5.0),
    Target("CPU", "proxy iteration: at least 4× as quick as the best of PyTorch", _ratios(_is_iteration), at_least=4.0),
    Target(
        "CPU",
        "peak memory of an iteration: under 1000 MB",
        *(_numbers(_is_iteration, lambda row: row.peak_memory_mb), max, "{:.3g} MB"),
        at_most=1000.0,
    ),
    Target(
        "CPU",
        "a new cell has trained its first iteration within 1 s",
        *(_numbers(_is_new_cell, lambda row: (row.median_ms or 0.0) / 1e3), max, "{:.3g} s"),
        at_most=1.0,
    ),
    Target(
        "GPU",
        "proxy iteration: at most 0.67 ms",
        *(_numbers(_is_iteration, lambda row: row.step_ms), min, "{:.3g} ms"),
        at_most=0.67,
    ),
    Target(
        "GPU", "a cell all in, 30,000 iterations and its start: at most 21.6 s", _cell_seconds, min, "{:.1f} s", at_most=21.6
    ),
    Target("GPU", f"{_SEPARABLE}, training: at least 2× the best of PyTorch", _ratios(_in_mode("training")), at_least=2.0),
    Target("GPU", f"{_SEPARABLE}, inference: at least 3× the best of PyTorch", _ratios(_in_mode("inference")), at_least=3.0),
    Target("GPU", f"{_SEPARABLE}: never slower, at any rate", _ratios(is_separable), min, "least {:.2f}×", at_least=1.0),
    Target("GPU", "loss and its gradient: at least 5× the best of PyTorch", _ratios(_is_loss), at_least=5.0),
    Target("GPU", "loss: at most 5 % of its memory", _loss_memory_shares, max, "{:.1f} %", at_most=5.0),
    Target(
        "GPU",
        "depthwise at the size beyond any cache: at least 85 % of the copy bandwidth",
        _numbers(_is_beyond_caches, lambda row: row.percent_of_roof),
        form="{:.0f} %",
        at_least=85.0,
    ),
)


def judged_targets(results: Results) -> list[tuple[str, str, str]]:
    """(device, target, verdict) for every target; those of the other kind of device read "not measured"."""
    return [(target.device, target.text, target.verdict(results)) for target in TARGETS]


def extrapolation(results: Results) -> list[str]:
    """What the paper's search would take here, from the proxy iteration alone, and cells per hour of a small search."""
    lines = []
    for group in (group for group in results.groups() if _is_iteration(group[0])):
        steps = {row.provider: row.step_ms for row in (ours(group), best_other(group)) if row and row.step_ms}
        if steps:
            days = {name: step_ms * PAPER_CELLS * PAPER_ITERATIONS / _MS_PER_DAY for name, step_ms in steps.items()}
            lines.append(
                f"{PAPER_CELLS:,} cells × {PAPER_ITERATIONS:,} iterations in {group[0].dtype}: device-days "
                + ", ".join(f"{value:,.0f} by {name}" for name, value in days.items())
                + f" (the paper: {_PAPER_GPU_DAYS:,} GPU-days)"
            )
    for row in (row for group in results.groups("search") for row in right(group)):
        lines.append(f"{row.shape}, {row.provider}, {row.dtype}: {cells_per_hour(row):,.0f} cells per hour")
    return lines


def cells_per_hour(row: Row) -> float:
    """From a row of the search suite, whose shape begins with the number of cells."""
    return 3_600_000 * int(row.shape.split()[0]) / (row.median_ms or math.nan)
