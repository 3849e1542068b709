"""Readable results: the table at the end of a run, and the summary beside the CSV."""

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from bench.results import DONE, FAILED, OK, WRONG, Results, Row, best_other, ours, ratio
from bench.targets import NOT_MEASURED, extrapolation, is_separable, judged_targets
from reference.cell import RATES
from search.files import write_text

Group = list[Row]  # the rows of one case
_GREEN, _RED, _BOLD, _PLAIN = "\033[32m", "\033[31m", "\033[1m", "\033[0m"
_LONG = ("bytes", "flops", "memory_format", "p20_ms", "p80_ms", "warm_median_ms", "rounds", "suite")  # to be read in files


def table(results: Results, *, colour: bool = False) -> str:
    """Format a line per case, with rates, grids and random cells of one kind together; at most 120 columns."""
    head = f"{'case':36} {'mode':9} {'dtype':8} {'ours ms':>8} {'other ms':>10} {'best other':20} {'ratio':>13} {'roof %':>6}"
    lines = [head, "-" * len(head)]
    for name, groups in _kinds(results):
        lines.append(_table_line(name, groups, colour))
        wrong = [row for group in groups for row in group if row.status in (WRONG, FAILED)]
        lines += [f"    {row.provider}: {row.status}: {row.note}"[:120] for row in wrong]
    below = (textwrap.fill(line, 120, subsequent_indent="  ") for line in _below_the_table(results))
    return "\n".join([*lines, "", *below])


def _below_the_table(results: Results) -> Iterator[str]:
    yield from (f"left out: {omission}" for omission in results.omissions)
    yield from extrapolation(results)
    targets = judged_targets(results)
    yield from (f"target: {text}: {verdict}" for _, text, verdict in targets if verdict != NOT_MEASURED)
    unknown = sum(verdict == NOT_MEASURED for _, _, verdict in targets)
    yield f"targets that were not measured: {unknown}, in the summary"
    if not results.is_complete:
        yield "the run was stopped before its end"


def _kinds(results: Results) -> Iterator[tuple[str, list[Group]]]:
    """Cases that differ only in rate, grid or random cell, under one name."""
    kinds: dict[tuple[str, ...], list[Group]] = {}
    for group in results.groups():
        first = group[0]
        kind = first.case.rsplit(" ", 1)[0] if first.suite == "ops" or first.case.startswith("random") else first.case
        kinds.setdefault((first.suite, kind, first.mode, first.dtype, first.shape), []).append(group)
    for (suite, kind, _, _, shape), groups in kinds.items():
        name = groups[0][0].case if len(groups) == 1 else f"{kind} ({len(groups)})"
        yield f"{suite}: {name}" + (f" {shape}" if suite == "ops" else ""), groups


def _table_line(name: str, groups: list[Group], colour: bool) -> str:
    """Medians over the groups; a case whose ratio is not known has no other either."""
    first = groups[0][0]
    start = f"{name[:36]:36} {first.mode:9} {first.dtype:8}"
    if first.case == "all":
        return f"{start} {first.status}"
    ratios = sorted(value for group in groups if (value := ratio(group)) is not None)
    mine = [row for row in map(ours, groups) if row]
    others = [row for row in map(best_other, groups) if row and ratios]
    names = {row.provider.removeprefix("torch.") for row in others}
    who = f"{len(names)} of them" if len(names) > 1 else "".join(names)
    roofs = [row.percent_of_roof for row in mine if row.percent_of_roof is not None]
    roof = f"{median(roofs):.1f}" if roofs else ""
    times = f"{_median_ms(mine) or '-':>8} {_median_ms(others):>10}"
    return f"{start} {times} {who:20} {_ratio_column(ratios, colour)} {roof:>6}".rstrip()


def _median_ms(rows: Sequence[Row]) -> str:
    times = [row.median_ms for row in rows if row.median_ms]
    return in_ms(median(times)) if times else ""


def _ratio_column(ratios: Sequence[float], colour: bool) -> str:
    """The least and the largest of the sorted ratios, 13 characters wide."""
    if not ratios:
        return " " * 13
    shown = f"{ratios[0]:.2f}×" if len(ratios) == 1 else f"{ratios[0]:.2f}-{ratios[-1]:.2f}×"
    return f"{_BOLD}{_GREEN if ratios[0] >= 1 else _RED}{shown:>13}{_PLAIN}" if colour else f"{shown:>13}"


def in_short(line: Mapping[str, object], leave_out: Sequence[str] = ()) -> str:
    """Format a number of a stage, or a row, as a line of text."""
    shown = {key: value for key, value in line.items() if key not in (*leave_out, *_LONG) and value not in (None, "")}
    return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items())


def write_markdown(path: Path, results: Results) -> None:
    """The human summary."""
    lines = [*_heading(results, path.with_suffix(".png").name), *_targets(results), *_stages(results), *_suites(results)]
    write_text(path, "\n".join(lines) + "\n")


def _heading(results: Results, picture: str) -> Iterator[str]:
    env, roofs = results.environment, results.roofs
    yield f"# {env.device}, {env.timestamp[:10]}, {env.commit}\n"
    if not results.is_complete:
        yield "**This run was stopped before its end.**\n"
    if results.parts > 1:
        yield f"This run was stopped and went on: it was made in {results.parts} parts.\n"
    yield f"![Ratios and times of this run]({picture})\n"
    matrix = ", ".join(f"{rate:,.0f} GFLOP/s in {dtype}" for dtype, rate in roofs.matrix_gflops.items())
    facts = {
        "device": f"{env.device}; {env.threads} threads",
        "versions": f"Python {env.python}, torch {env.torch}, triton {env.triton}, CUDA {env.cuda}",
        "commit, time": f"{env.commit}, {env.timestamp}",
        "roofs of this run": f"copy {roofs.copy_gb_per_s:,.1f} GB/s read and written; matrix product {matrix}",
    }
    yield from _rows_of(("", ""), facts.items())


def _targets(results: Results) -> Iterator[str]:
    yield "\n## Targets\n"
    yield from _rows_of(("on", "target", "verdict"), judged_targets(results))
    yield from (f"\n{line}." for line in extrapolation(results))
    if results.omissions:
        yield "\n## Left out\n"
        yield from (f"- {omission}" for omission in results.omissions)


def _stages(results: Results) -> Iterator[str]:
    """How each stage of a run of limited minutes ended, and its numbers; kernels of an iteration in a table of their own."""
    stages = [(name, list(numbers)) for name, numbers in groupby(results.numbers, lambda number: str(number["stage"]))]
    if stages:
        yield "\n## Stages\n"
        yield from _rows_of(("stage", "s", "ended", "numbers"), [_stage_row(*stage) for stage in stages])
    for name, numbers in stages:
        kernels = [number for number in numbers if "kernel" in number][:40]
        if kernels:
            yield f"\n## {name}: by kernel, per iteration\n"
            rows = [(k["kernel"][:80], str(k["launches"]), _number(k["us"]), _number(k["predicted_us"])) for k in kernels]
            yield from _rows_of(("kernel", "launches", "µs", "predicted µs"), rows)


def _stage_row(name: str, numbers: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    end: Mapping[str, Any] = next((number for number in numbers if "status" in number), {"status": "not ended"})
    status = DONE if end["status"] == DONE else f"**{end['status']}** {end.get('note', '')}"
    text = "; ".join(in_short(number, ("stage",)) for number in numbers if not {"status", "kernel"} & number.keys())
    return name, _number(end.get("seconds")), status, text


def _suites(results: Results) -> Iterator[str]:
    """A table of all rows of a suite; separable convolutions at all rates are told by a matrix, their rows are in the CSV."""
    for suite in dict.fromkeys(row.suite for row in results.rows):
        yield f"\n## {suite}\n"
        groups = [group for group in results.groups(suite) if group[0].shape]
        matrices = {key: ratios for key, ratios in rate_ratios(groups).items() if len(ratios) == len(RATES) ** 2}
        for key, ratios in matrices.items():
            yield f"Separable convolution, {', '.join(key)}: best other time / our time, by rate (rows: height).\n"
            yield from _rows_of(
                ("", *map(str, RATES)), [(f"**{h}**", *(f"{ratios[h, w]:.2f}×" for w in RATES)) for h in RATES]
            )
            yield ""
        yield from _suite_table([group for group in groups if not (_rate_key(group) in matrices and _is_right(group))])


def _rate_key(group: Group) -> tuple[str, str, str] | None:
    """Shape, mode and dtype of a separable convolution."""
    row = group[0]
    return (row.shape, row.mode, row.dtype) if is_separable(row) else None


def _is_right(group: Group) -> bool:
    return all(row.status == OK for row in group)


def rate_ratios(groups: Iterable[Group]) -> dict[tuple[str, str, str], dict[tuple[int, int], float]]:
    """(shape, mode, dtype) -> (rate_h, rate_w) -> ratio, of the separable convolutions."""
    ratios: dict[tuple[str, str, str], dict[tuple[int, int], float]] = {}
    for group in groups:
        key, value = _rate_key(group), ratio(group)
        if key is not None and value is not None:
            height, width = group[0].case.removeprefix("sep3x3 ").split("x")
            ratios.setdefault(key, {})[int(height), int(width)] = value
    return ratios


def _suite_table(groups: Sequence[Group]) -> Iterator[str]:
    rows = [_cells_of(row) for group in groups for row in group]
    if rows:
        yield from _rows_of([*rows[0]], [[*row.values()] for row in rows])


def _cells_of(row: Row) -> dict[str, str]:
    """A row's line, by the names of the columns."""
    time = f"{in_ms(row.median_ms)} ({in_ms(row.p20_ms)} to {in_ms(row.p80_ms)})" if row.median_ms else ""
    return {
        "case": row.case,
        "shape": row.shape,
        "mode": row.mode,
        "dtype": row.dtype,
        "provider": f"{row.provider} ({row.memory_format})",
        "ms (20 to 80 %)": time if row.status == OK else f"**{row.status}** {time} {row.note}",
        "warm ms": in_ms(row.warm_median_ms),
        "back to back ms": in_ms(row.back_to_back_ms),
        "**ratio**": "" if row.ratio_to_best_other is None else f"**{row.ratio_to_best_other:.2f}×**",
        "roof %": "" if row.percent_of_roof is None else f"{row.percent_of_roof:.1f}",
        "first call s": _number(row.first_call_s),
        "memory MB": _number(row.peak_memory_mb),
        "max error": _number(row.max_error),
        "RMS error": _number(row.rms_error),
    }


def _rows_of(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    yield from (f"| {' | '.join(row)} |" for row in rows)


def in_ms(value: float | None) -> str:
    """Milliseconds in four digits, without an exponent."""
    return "" if value is None else f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}" if value < 10 else f"{value:.0f}"
