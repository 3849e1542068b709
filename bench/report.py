"""Readable results: the table at the end of a run, and the summary that has it too; the CSV beside it has every number."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from bench.results import DONE, NOT_SUPPORTED, OK, Results, Row, ours, ratio, right
from bench.targets import extrapolation, judged_targets
from search.files import write_text

Group = list[Row]  # the rows of one case
_LONG = ("bytes", "flops", "memory_format", "p20_ms", "p80_ms", "warm_median_ms", "rounds", "suite")  # to be read in files
_BELOW = {"back to back, ms": "back_to_back_ms", "first call, s": "first_call_s", "peak memory, MB": "peak_memory_mb"}


def table(results: Results) -> str:
    """Times, targets and what was left out, as Markdown that a terminal of 120 columns shows well."""
    return "\n".join([*_times(results), *_targets(results)])


def write_markdown(path: Path, results: Results) -> None:
    """The summary: the table, and on what and by which stages it was measured."""
    lines = [*_heading(results, path.with_suffix(".png").name), table(results), *_stages(results)]
    write_text(path, "\n".join(lines) + "\n")


def _heading(results: Results, picture: str) -> Iterator[str]:
    env, roofs = results.environment, results.roofs
    yield f"# {env.device}, {env.timestamp[:10]}, {env.commit}\n"
    if not results.is_complete:
        yield "**This run was stopped before its end.**\n"
    if results.parts > 1:
        yield f"This run was stopped and went on: it was made in {results.parts} parts.\n"
    yield f"![Ratios and times of this run]({picture})\n"
    yield f"- device: {env.device}; {env.threads} threads"
    yield f"- versions: Python {env.python}, torch {env.torch}, triton {env.triton}, CUDA {env.cuda}"
    yield f"- commit, time: {env.commit}, {env.timestamp}"
    matrix = ", ".join(f"{rate:,.0f} GFLOP/s in {dtype}" for dtype, rate in roofs.matrix_gflops.items())
    yield f"- roofs of this run: copy {roofs.copy_gb_per_s:,.1f} GB/s read and written; matrix product {matrix}"


def tables_of(results: Results) -> dict[str, dict[tuple[str, str], list[Group]]]:
    """Cases by suite, shape and dtype (the title of a table), then by kind and mode; all rates are one kind."""
    tables: dict[str, dict[tuple[str, str], list[Group]]] = {}
    for rows in results.groups():
        first = rows[0]
        if first.status != NOT_SUPPORTED:  # a whole dtype, which is named among what was left out
            kinds = tables.setdefault(f"{first.suite}, {first.shape}, {first.dtype}", {})
            has_number = first.suite == "ops" or first.case.startswith("random")  # a rate, a grid or a cell's
            kind = first.case.rsplit(" ", 1)[0] if has_number else first.case
            kinds.setdefault((kind, first.mode), []).append(rows)
    return tables


def _times(results: Results) -> Iterator[str]:
    """The tables, with a column for each provider; below each, every row that is not right."""
    yield "\nTimes are medians in ms; a line of several cases has the median of theirs. Ratio: time of the quickest other"
    yield "provider / ours, least to largest. Roof: the share of the machine's limit that ours reaches.\n"
    for title, kinds in tables_of(results).items():
        rows = [row for cases in kinds.values() for case in cases for row in case]
        providers = list(dict.fromkeys(row.provider for row in rows))
        short = [name.removeprefix("torch.").removeprefix("eager ").removeprefix("compile ") for name in providers]
        yield f"## {title}\n"
        lines = (line for (kind, _), cases in kinds.items() for line in _lines(kind, cases, providers))
        yield from _aligned(("case", "mode", *short, "ratio", "roof"), lines, texts=2)
        yield ""
        wrong = [row for row in rows if row.status != OK]
        yield from (f"- **{row.status}**: {in_short(vars(row), ('status', 'shape', 'dtype'))}\n" for row in wrong)


def _lines(kind: str, cases: Sequence[Group], providers: Sequence[str]) -> Iterator[Sequence[str]]:
    """The times of the cases of one kind; below those of a single case, what else was measured of it."""
    first, *others = (rows[0] for rows in cases)
    by_provider = [[row for rows in cases for row in rows if row.provider == provider] for provider in providers]
    in_all = [rows if len(rows) == len(cases) else [] for rows in by_provider]  # medians of other cases are no comparison
    ratios = [f"{value:.2f}" for value in sorted(filter(None, map(ratio, cases)))]
    roofs = [row.percent_of_roof for row in map(ours, cases) if row and row.percent_of_roof]
    yield (
        f"{kind} ({len(cases)})" if others else first.case,
        first.mode,
        *(_median(rows, "median_ms") for rows in in_all),
        "-".join(dict.fromkeys([ratios[0], ratios[-1]])) + "×" if ratios else "",
        f"{median(roofs):.0f} %" if roofs else "",
    )
    for name, field in () if others else _BELOW.items():
        if any(cells := [_median(rows, field) for rows in in_all]):
            yield (f"· {name}", "", *cells, "", "")


def _median(rows: Sequence[Row], field: str) -> str:
    known = [value for row in right(rows) if (value := getattr(row, field)) is not None]
    return in_digits(median(known)) if known else ""


def _targets(results: Results) -> Iterator[str]:
    yield "## Targets\n"
    yield from _aligned(("target", "verdict"), judged_targets(results), texts=2)
    yield from (f"\n{line}" for line in extrapolation(results))
    if results.omissions:
        yield "\n## Left out\n"
        yield from (f"- {omission}" for omission in results.omissions)


def _stages(results: Results) -> Iterator[str]:
    """How the stages ended that are no case, and their numbers; kernels of an iteration in a table."""
    if results.numbers:
        yield "\n## Stages\n"
    for name, group in groupby(results.numbers, lambda number: str(number["stage"])):
        numbers = list(group)
        end: Mapping[str, Any] = next((number for number in numbers if "status" in number), {"status": "not ended"})
        status = DONE if end["status"] == DONE else f"**{end['status']}** {end.get('note', '')}".rstrip()
        seconds = f", {in_digits(end['seconds'])} s" if "seconds" in end else ""
        text = "; ".join(in_short(number, ("stage",)) for number in numbers if not {"status", "kernel"} & number.keys())
        yield f"- {name}, {status}{seconds}: {text}".removesuffix(": ")
        kernels = [number for number in numbers if "kernel" in number][:40]
        columns = ("launches", "us", "predicted_us")
        rows = [(kernel["kernel"][:80], *(in_digits(kernel[column]) for column in columns)) for kernel in kernels]
        if rows:
            yield from ("", *_aligned(("kernel, per iteration", "launches", "µs", "predicted µs"), rows, texts=1), "")


def in_short(line: Mapping[str, object], leave_out: Sequence[str] = ()) -> str:
    """Format a number of a stage, or a row, as a line of text."""
    shown = {key: value for key, value in line.items() if key not in (*leave_out, *_LONG) and value not in (None, "")}
    return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items())


def in_digits(value: float | None) -> str:
    """Four digits or more, without an exponent; smaller numbers than 0.0001 do not occur."""
    return "" if value is None else f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def _aligned(header: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int) -> Iterator[str]:
    """A Markdown table whose columns are as wide as their longest cell; the first `texts` of them are not numbers."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width if k < texts else "-" * (width - 1) + ":" for k, width in enumerate(widths)]
    for cells in (header, rule, *lines[1:]):
        padded = (cell.ljust(w) if k < texts else cell.rjust(w) for k, (cell, w) in enumerate(zip(cells, widths, strict=True)))
        yield f"| {' | '.join(padded)} |"
