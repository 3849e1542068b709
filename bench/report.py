"""Readable results: the table at the end of a run, and the summary that has it too; the CSV beside it has every number."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

from bench.load import LIMIT_PERCENT
from bench.results import ABOVE_ROOF, DONE, NOT_SUPPORTED, OK, Results, Row, ours, ratio, right
from bench.targets import extrapolation, judged_targets
from search.files import write_text

BUSY = "busy"  # in the place of a ratio
Group = list[Row]  # the rows of one case
_LONG = (  # to be read in files
    *("bytes", "flops", "memory_format", "p20_ms", "p80_ms", "median_low_ms", "median_high_ms", "back_to_back_low_ms"),
    *("back_to_back_high_ms", "ratio_low", "ratio_high", "warm_median_ms", "rounds", "suite"),
)
_BELOW = {
    "back to back, ms": "back_to_back_ms",
    "first call, s": "first_call_s",
    "peak memory, MB": "peak_memory_mb",
    "written, MB": "written_mb",
}


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


def _doubts(results: Results) -> Iterator[str]:
    """Why parts of this run are not judged."""
    disturbed = [row for row in results.rows if row.is_disturbed]
    if disturbed:
        most = max(row.others_percent or 0.0 for row in disturbed)
        cases = len({row.key for row in disturbed})
        yield f"\n**Busy machine.** Others used up to {most:.0f} % of the processor during {cases} of the cases. Above"
        yield f"{LIMIT_PERCENT:g} % a case has no ratio, no share of the roof and no verdict."
    for name, reason in results.roofs.unstable.items():
        roof = "copy" if name == "copy" else f"matrix product in {name}"
        yield f"\n**Unstable roof**, {roof}: {reason}. There is no share of it."


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
    yield "provider / ours, least to largest. Roof: the share of the machine's limit that ours reaches."
    yield from _doubts(results)
    yield ""
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
    mine = [row for row in map(ours, cases) if row]
    is_busy = any(row.is_disturbed for rows in cases for row in right(rows))
    yield (
        f"{kind} ({len(cases)})" if others else first.case,
        first.mode,
        *(_median(rows, "median_ms") for rows in in_all),
        BUSY if is_busy else "-".join(dict.fromkeys([ratios[0], ratios[-1]])) + "×" if ratios else "",
        BUSY if is_busy else _share_of_roof(mine),
    )
    for name, field in () if others else _BELOW.items():
        if any(cells := [_median(rows, field) for rows in in_all]):
            yield (f"· {name}", "", *cells, "", "")


def _share_of_roof(rows: Sequence[Row]) -> str:
    shares = [row.percent_of_roof for row in rows if row.percent_of_roof]
    if any(row.note.startswith(ABOVE_ROOF) for row in rows):
        return "unstable"
    return f"{median(shares):.0f} %" if shares else ""


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
