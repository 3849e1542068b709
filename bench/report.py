"""Readable results: the table at the end of a run, and the summary beside the CSV."""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

from bench.results import DONE, FAILED, OK, WRONG, Results, Row, best_other, eager, ours, ratio, right
from bench.suites import NEW_CELL, PAPER
from reference.cell import RATES
from search.files import write_text

PAPER_CELLS, PAPER_ITERATIONS = 28_000, 30_000
_PAPER_GPU_DAYS = 370 * 7  # "370 GPUs over one week" (paper, section 4.1)
_MS_PER_DAY = 86_400_000
_GREEN, _RED, _BOLD, _PLAIN = "\033[32m", "\033[31m", "\033[1m", "\033[0m"
NOT_MEASURED = "not measured"


def table(results: Results, *, colour: bool) -> str:
    """Format a line per case, with rates, grids and random cells of one kind together; at most 120 columns."""
    head = f"{'case':36} {'mode':9} {'dtype':8} {'ours ms':>8} {'other ms':>10} {'best other':20} {'ratio':>13} {'roof %':>6}"
    lines = [head, "-" * len(head)]
    for kind, groups in _kinds(results):
        lines.append(_table_line(kind, groups, colour))
        wrong = [row for group in groups for row in group if row.status in (WRONG, FAILED)]
        lines += [f"    {row.provider}: {row.status}: {row.note}"[:120] for row in wrong]
    below = [*(f"left out: {omission}" for omission in results.omissions), *extrapolation(results)]
    targets = [(text, verdict) for _, text, verdict in judged_targets(results)]
    below += [f"target: {text}: {verdict}" for text, verdict in targets if verdict != NOT_MEASURED]
    below.append(f"targets that were not measured: {sum(verdict == NOT_MEASURED for _, verdict in targets)}, in the summary")
    if not results.is_complete:
        below.append("the run was stopped before its end")
    lines += ["", *(textwrap.fill(line, 120, subsequent_indent="  ") for line in below)]
    return "\n".join(lines)


def _kinds(results: Results) -> Iterator[tuple[str, list[list[Row]]]]:
    """Cases that differ only in rate, grid or random cell, under one name."""
    kinds: dict[tuple[str, ...], list[list[Row]]] = {}
    for group in results.groups():
        first = group[0]
        kind = first.case.rsplit(" ", 1)[0] if first.suite == "ops" or first.case.startswith("random") else first.case
        kinds.setdefault((first.suite, kind, first.mode, first.dtype, first.shape), []).append(group)
    for (suite, kind, _, _, shape), groups in kinds.items():
        name = groups[0][0].case if len(groups) == 1 else f"{kind} ({len(groups)})"
        place = f" {shape}" if suite == "ops" else ""
        yield f"{suite}: {name}{place}", groups


def _table_line(kind: str, groups: list[list[Row]], colour: bool) -> str:
    first = groups[0][0]
    start = f"{kind[:36]:36} {first.mode:9} {first.dtype:8}"
    if first.case == "all":
        return f"{start} {first.status}"
    ratios = sorted(value for group in groups if (value := ratio(group)) is not None)
    times = [row.median_ms for row in map(ours, groups) if row and row.median_ms]
    roofs = [row.percent_of_roof for row in map(ours, groups) if row and row.percent_of_roof is not None]
    roof = f"{median(roofs):.1f}" if roofs else ""
    if not ratios:
        return f"{start} {_ms(median(times)) if times else '-':>8} {'':>10} {'':20} {'':>13} {roof:>6}".rstrip()
    others = [row for row in map(best_other, groups) if row]
    names = list(dict.fromkeys(row.provider.removeprefix("torch.") for row in others))
    who = names[0] if len(names) == 1 else f"{len(names)} of them"
    shown = f"{ratios[0]:.2f}×" if len(ratios) == 1 else f"{ratios[0]:.2f}-{ratios[-1]:.2f}×"
    marked = f"{_BOLD}{_GREEN if ratios[0] >= 1 else _RED}{shown:>13}{_PLAIN}" if colour else f"{shown:>13}"
    other_ms = median([row.median_ms or 0.0 for row in others])
    return f"{start} {_ms(median(times)):>8} {_ms(other_ms):>10} {who:20} {marked} {roof:>6}"


def extrapolation(results: Results) -> list[str]:
    """How long the paper's search would take here, by the proxy iteration alone, and cells per hour of a small search."""
    lines = []
    for group in results.groups("proxy"):
        if group[0].case != "iteration":
            continue
        days = {
            row.provider: row.step_ms * PAPER_CELLS * PAPER_ITERATIONS / _MS_PER_DAY
            for row in (ours(group), best_other(group))
            if row and row.step_ms
        }
        if days:
            stated = ", ".join(f"{value:,.0f} by {provider}" for provider, value in days.items())
            lines.append(
                f"{PAPER_CELLS:,} cells × {PAPER_ITERATIONS:,} iterations in {group[0].dtype}: device-days {stated} "
                f"(the paper: {_PAPER_GPU_DAYS:,} GPU-days)"
            )
    for group in results.groups("search"):
        for row in right(group):
            lines.append(f"{row.shape}, {row.provider}, {row.dtype}: {cells_per_hour(row):,.0f} cells per hour")
    return lines


def cells_per_hour(row: Row) -> float:
    """Cells per hour of a row of the search suite, whose shape begins with the number of cells."""
    return 3_600_000 * int(row.shape.split()[0]) / (row.median_ms or float("nan"))


@dataclass(frozen=True)
class Target:
    """A goal of this project; `reached` gives the figure and whether it is enough, or None if not measured."""

    device: str  # cpu or cuda
    text: str
    reached: Callable[[Results], tuple[str, bool] | None]


def _least_ratio(select: Callable[[Row], bool], least: float) -> Callable[[Results], tuple[str, bool] | None]:
    def reached(results: Results) -> tuple[str, bool] | None:
        ratios = [value for group in results.groups() if select(group[0]) and (value := ratio(group)) is not None]
        if not ratios:
            return None
        spread = "" if len(ratios) == 1 else f" (median of {len(ratios)}; {min(ratios):.2f}× to {max(ratios):.2f}×)"
        return f"{median(ratios):.2f}×{spread}", median(ratios) >= least

    return reached


def _never_slower(results: Results) -> tuple[str, bool] | None:
    ratios = [value for group in results.groups("ops") if _is_separable(group[0]) and (value := ratio(group)) is not None]
    return (f"least {min(ratios):.2f}×", min(ratios) >= 1.0) if ratios else None


def _against_eager(results: Results) -> tuple[str, bool] | None:
    for group in results.groups("proxy"):
        mine, other = ours(group), eager(group)
        if group[0].case == "iteration" and group[0].dtype == "float32" and mine and other:
            value = (other.median_ms or 0.0) / (mine.median_ms or 1.0)
            return f"{value:.2f}×", value >= 5.0
    return None


def _at_most(
    select: Callable[[Row], bool],
    number: Callable[[Row], float | None],
    most: float,
    unit: str,
    of_dtypes: Callable[[Iterable[float]], float] = max,
) -> Callable[[Results], tuple[str, bool] | None]:
    def reached(results: Results) -> tuple[str, bool] | None:
        mine = [row for row in map(ours, results.groups()) if row and select(row)]
        values = [value for row in mine if (value := number(row)) is not None]
        return (f"{of_dtypes(values):.3g} {unit}", of_dtypes(values) <= most) if values else None

    return reached


def _least_percent(results: Results) -> tuple[str, bool] | None:
    """The median over rates at the size beyond any cache."""
    large = "{}×{}×{}×{}".format(*PAPER.maps[-1])
    rows = [row for row in map(ours, results.groups("ops")) if row and row.case.startswith("depthwise") and row.shape == large]
    values = [row.percent_of_roof for row in rows if row.mode == "inference" and row.percent_of_roof is not None]
    return (f"{median(values):.0f} %", median(values) >= 85.0) if values else None


def _loss_memory(results: Results) -> tuple[str, bool] | None:
    shares = []
    for group in results.groups("loss"):
        mine, other = ours(group), best_other(group)
        if group[0].mode == "training" and mine and other and mine.peak_memory_mb and other.peak_memory_mb:
            shares.append(100 * mine.peak_memory_mb / other.peak_memory_mb)
    return (f"{max(shares):.1f} %", max(shares) <= 5.0) if shares else None


def _cell_seconds(results: Results) -> tuple[str, bool] | None:
    """Seconds of a whole cell: 30,000 iterations and the start of a new cell."""
    totals = []
    for group in results.groups("proxy"):
        start = next(
            (ours(g) for g in results.groups("proxy") if g[0].case == NEW_CELL and g[0].dtype == group[0].dtype), None
        )
        mine = ours(group)
        if group[0].case == "iteration" and mine and start:
            totals.append((PAPER_ITERATIONS * (mine.step_ms or 0.0) + (start.median_ms or 0.0)) / 1e3)
    return (f"{min(totals):.1f} s", min(totals) <= 21.6) if totals else None


def _is_separable(row: Row) -> bool:
    return row.suite == "ops" and row.case.startswith("sep3x3")


def _is_iteration(row: Row) -> bool:
    return row.suite == "proxy" and row.case == "iteration"


TARGETS = (
    Target("cpu", "proxy iteration, float32: at least 5× as quick as eager PyTorch", _against_eager),
    Target("cpu", "proxy iteration: at least 4× as quick as the best of PyTorch", _least_ratio(_is_iteration, 4.0)),
    Target(
        "cpu", "peak memory of an iteration: under 1000 MB", _at_most(_is_iteration, lambda r: r.peak_memory_mb, 1000.0, "MB")
    ),
    Target(
        "cpu",
        "a new cell has trained its first iteration within 1 s",
        _at_most(lambda r: r.case == NEW_CELL, lambda r: (r.median_ms or 0.0) / 1e3, 1.0, "s"),
    ),
    Target("cuda", "proxy iteration: at most 0.67 ms", _at_most(_is_iteration, lambda r: r.step_ms, 0.67, "ms", min)),
    Target("cuda", "a cell all in, 30,000 iterations and its start: at most 21.6 s", _cell_seconds),
    Target(
        "cuda",
        "separable convolution, training: at least 2× the best of PyTorch",
        _least_ratio(lambda r: _is_separable(r) and r.mode == "training", 2.0),
    ),
    Target(
        "cuda",
        "separable convolution, inference: at least 3× the best of PyTorch",
        _least_ratio(lambda r: _is_separable(r) and r.mode == "inference", 3.0),
    ),
    Target("cuda", "separable convolution: never slower, at any rate", _never_slower),
    Target(
        "cuda",
        "loss and its gradient: at least 5× the best of PyTorch",
        _least_ratio(lambda r: r.suite == "loss" and r.mode == "training", 5.0),
    ),
    Target("cuda", "loss: at most 5 % of its memory", _loss_memory),
    Target("cuda", "depthwise at the size beyond any cache: at least 85 % of the copy bandwidth", _least_percent),
)


def judged_targets(results: Results) -> list[tuple[str, str, str]]:
    """(device, target, verdict) for every target; targets of the other kind of device are "not measured"."""
    kind = "cpu" if results.environment.cuda == "none" else "cuda"
    judged = []
    for target in TARGETS:
        reached = target.reached(results) if target.device == kind else None
        verdict = NOT_MEASURED if reached is None else f"{'met' if reached[1] else 'missed'}: {reached[0]}"
        judged.append(({"cpu": "CPU", "cuda": "GPU"}[target.device], target.text, verdict))
    return judged


def write_markdown(path: Path, results: Results) -> None:
    """Write the summary in Markdown."""
    write_text(path, "\n".join(_markdown(results, path.with_suffix(".png").name)) + "\n")


def _markdown(results: Results, picture: str) -> Iterator[str]:
    env, roofs = results.environment, results.roofs
    yield f"# {env.device}, {env.timestamp[:10]}, {env.commit}"
    yield ""
    if not results.is_complete:
        yield "**This run was stopped before its end.**\n"
    if results.parts > 1:
        yield f"This run was stopped and went on: it was made in {results.parts} parts.\n"
    yield f"![Ratios and times of this run]({picture})\n"
    matrix = ", ".join(f"{rate:,.0f} GFLOP/s in {dtype}" for dtype, rate in roofs.matrix_gflops.items())
    yield from _rows_of(
        ("", ""),
        [
            ("device", f"{env.device}; {env.threads} threads"),
            ("versions", f"Python {env.python}, torch {env.torch}, triton {env.triton}, CUDA {env.cuda}"),
            ("commit, time", f"{env.commit}, {env.timestamp}"),
            ("roofs of this run", f"copy {roofs.copy_gb_per_s:,.1f} GB/s read and written; matrix product {matrix}"),
        ],
    )
    yield "\n## Targets\n"
    yield from _rows_of(("on", "target", "verdict"), judged_targets(results))
    for line in extrapolation(results):
        yield f"\n{line}."
    if results.omissions:
        yield "\n## Left out\n"
        yield from (f"- {omission}" for omission in results.omissions)
    yield from _stages(results)
    for suite in dict.fromkeys(row.suite for row in results.rows):
        yield f"\n## {suite}\n"
        groups = [group for group in results.groups(suite) if group[0].shape]
        yield from _rate_matrices(groups)
        yield from _suite_table([group for group in groups if not _is_rate_of_matrix(group[0], groups)])


def in_short(line: Mapping[str, object], leave_out: Sequence[str] = ()) -> str:
    """Format a number of a stage, or a row, as a line of text."""
    shown = {key: value for key, value in line.items() if key not in (*leave_out, *_LONG) and value not in (None, "")}
    return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items())


_LONG = ("bytes", "flops", "memory_format", "p20_ms", "p80_ms", "warm_median_ms", "rounds", "suite")  # to be read in files


def _stages(results: Results) -> Iterator[str]:
    """How each stage of a run of limited minutes ended, and its numbers; kernels of an iteration in a table of their own."""
    if not results.numbers:
        return
    yield "\n## Stages\n"
    stages: dict[str, list[dict[str, Any]]] = {}
    for number in results.numbers:
        stages.setdefault(number["stage"], []).append(number)
    rows = []
    for name, numbers in stages.items():
        ends = [number for number in numbers if "status" in number]
        text = "; ".join(in_short(number, ("stage",)) for number in numbers if not {"status", "kernel"} & number.keys())
        end = ends[-1] if ends else {"status": "not ended"}
        status = end["status"] if end["status"] == DONE else f"**{end['status']}** {end.get('note', '')}"
        rows.append((name, _number(cast(float | None, end.get("seconds"))), status, text))
    yield from _rows_of(("stage", "s", "ended", "numbers"), rows)
    for name, numbers in stages.items():
        kernels = [number for number in numbers if "kernel" in number]
        if kernels:
            yield f"\n## {name}: by kernel, per iteration\n"
            yield from _rows_of(
                ("kernel", "launches", "µs", "predicted µs"),
                [(k["kernel"][:80], str(k["launches"]), _number(k["us"]), _number(k["predicted_us"])) for k in kernels[:40]],
            )


def _suite_table(groups: Sequence[list[Row]]) -> Iterator[str]:
    header = ("case", "shape", "mode", "dtype", "provider", "ms (20 to 80 %)", "warm ms", "back to back ms")
    rows = []
    for row in (row for group in groups for row in group):
        time = f"{_ms(row.median_ms)} ({_ms(row.p20_ms)} to {_ms(row.p80_ms)})" if row.median_ms else ""
        rows.append(
            (
                *(row.case, row.shape, row.mode, row.dtype, f"{row.provider} ({row.memory_format})"),
                time if row.status == OK else f"**{row.status}** {time} {row.note}",
                *(_ms(row.warm_median_ms), _ms(row.back_to_back_ms)),
                "" if row.ratio_to_best_other is None else f"**{row.ratio_to_best_other:.2f}×**",
                "" if row.percent_of_roof is None else f"{row.percent_of_roof:.1f}",
                *(_number(value) for value in (row.first_call_s, row.peak_memory_mb, row.max_error, row.rms_error)),
            )
        )
    if rows:
        yield from _rows_of((*header, "**ratio**", "roof %", "first call s", "memory MB", "max error", "RMS error"), rows)


def _is_rate_of_matrix(row: Row, groups: Sequence[list[Row]]) -> bool:
    """Whether the case is shown in a matrix of rates; its providers' rows are in the CSV."""
    alike = [
        g for g in groups if _is_separable(g[0]) and (g[0].shape, g[0].mode, g[0].dtype) == (row.shape, row.mode, row.dtype)
    ]
    return (
        _is_separable(row)
        and len(alike) == len(RATES) ** 2
        and all(r.status == OK for g in groups for r in g if r.key == row.key)
    )


def rate_ratios(groups: Iterable[list[Row]]) -> dict[tuple[str, str, str], dict[tuple[int, int], float]]:
    """(shape, mode, dtype) -> (rate_h, rate_w) -> ratio, of the separable convolutions."""
    ratios: dict[tuple[str, str, str], dict[tuple[int, int], float]] = {}
    for group in groups:
        row, value = group[0], ratio(group)
        if _is_separable(row) and value is not None:
            height, width = row.case.removeprefix("sep3x3 ").split("x")
            ratios.setdefault((row.shape, row.mode, row.dtype), {})[int(height), int(width)] = value
    return ratios


def _rate_matrices(groups: Sequence[list[Row]]) -> Iterator[str]:
    for (shape, mode, dtype), ratios in rate_ratios(groups).items():
        if len(ratios) < len(RATES) ** 2:
            continue
        yield f"Separable convolution, {shape}, {mode}, {dtype}: best other time / our time, by rate (rows: height).\n"
        rows = [(f"**{h}**", *(f"{ratios[h, w]:.2f}×" for w in RATES)) for h in RATES]
        yield from _rows_of(("", *map(str, RATES)), rows)
        yield ""


def _rows_of(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    for row in rows:
        assert len(row) == len(header), "a cell under a name that is not its own"
        yield f"| {' | '.join(row)} |"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}" if value < 10 else f"{value:.0f}"
