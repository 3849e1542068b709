"""Results of `search.fidelity`: how alike the protocols order the cells, as table, CSV, scatter plots (figure 3) and page."""

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from search.dense_tasks import Measure
from search.files import write_text
from search.folder import Folder
from search.reports.rank_correlation import MIN_POINTS, RankCorrelation, rank_correlation, spearman, ties
from search.reports.scatter import Point, Scatter, write_scatters

_LABELS = {"proxy": "proxy", "long": "long training", "large": "large backbone", "end_to_end": "end to end"}
_MARKED = {"1x1": "1×1", "r6": "rate 6", "r12": "rate 12", "r18": "rate 18", "pool": "pool", "1x1+r6+r12+r18+pool": "ASPP"}


@dataclass(frozen=True)
class Score:
    """The score of a cell under a protocol with a seed, or the reason why its training failed."""

    protocol: str
    cell_name: str
    seed: int
    score: float | None  # on the validation set, 0..1
    seconds: float | None
    failure: str | None


@dataclass(frozen=True)
class Agreement:
    """How alike two protocols order the cells that both have scored, by each cell's mean over seeds.

    `ceiling` is about the ρ that would be seen if both had the same true order and differed in noise alone; nan with a single
    seed, because the noise is not known. `correlation` is None below three cells.
    """

    first: str
    second: str
    correlation: RankCorrelation | None
    ceiling: float


def score_name(cell_name: str, seed: int) -> str:
    """The name of a score in the folder of its protocol."""
    return f"{cell_name}-seed{seed}"


def load_scores(directory: Path, protocols: Sequence[str], cell_names: Sequence[str]) -> list[Score]:
    """Read all scores, in the order of protocol, seed and cell. Raises InputError for a damaged file."""
    scores = []
    for protocol in protocols:
        folder = Folder(directory / protocol)
        names = [path.name for path in folder.path.glob("*-seed*.json")]
        for seed in sorted({int(match[1]) for name in names if (match := re.search(r"-seed(\d+)\.json$", name))}):
            for name in cell_names:
                content = folder.result(score_name(name, seed))
                if content is None:
                    continue
                try:
                    del content["cell"]
                    scores.append(Score(**content))
                except (KeyError, TypeError) as error:
                    raise folder.damaged(score_name(name, seed), error) from error
    return scores


def cell_scores(scores: Sequence[Score], protocol: str) -> dict[str, list[float]]:
    """Each cell's scores, one per seed. A cell that failed with any seed is left out: its mean would lack the worst score."""
    failed = {score.cell_name for score in scores if score.protocol == protocol and score.failure is not None}
    by_cell: dict[str, list[float]] = {}
    for score in scores:
        if score.protocol == protocol and score.cell_name not in failed and score.score is not None:
            by_cell.setdefault(score.cell_name, []).append(score.score)
    return by_cell


def self_agreement(by_cell: dict[str, list[float]]) -> float:
    """ρ of a protocol with itself under another seed, the mean over all pairs of seeds; nan if there are no two.

    Only cells with all seeds count. It measures the noise of one training: a noise-free score would have about √ρ with it.
    """
    seeds = max(map(len, by_cell.values()), default=0)
    columns = list(zip(*(values for values in by_cell.values() if len(values) == seeds), strict=True))
    if seeds < 2 or len(columns[0]) < MIN_POINTS:
        return math.nan
    return float(np.mean([spearman(x, y) for x, y in combinations(columns, 2)]))


def noise_ceiling(first: dict[str, list[float]], second: dict[str, list[float]]) -> float:
    """About the ρ to be seen between two protocols with the same true order, each with the noise of `self_agreement`.

    Spearman's attenuation formula √(R₁·R₂), where R = s·r / (1 + (s − 1)·r) is the reliability of a mean over s seeds if that
    of one is r (Spearman and Brown). Both are exact for linear correlations and equal noise in all cells; here they are
    approximate.

    >>> without_noise = {"a": [0.1, 0.1], "b": [0.3, 0.3], "c": [0.2, 0.2]}
    >>> round(noise_ceiling(without_noise, without_noise), 6)
    1.0
    """
    reliabilities = []
    for by_cell in (first, second):
        seeds, rho = max(map(len, by_cell.values()), default=0), self_agreement(by_cell)
        reliabilities.append(seeds * rho / (1 + (seeds - 1) * rho) if not rho <= 0 else 0.0)  # nan stays nan
    return math.sqrt(reliabilities[0] * reliabilities[1])


def agreements(scores: Sequence[Score], protocols: Sequence[str]) -> list[Agreement]:
    """All pairs of protocols, in their order."""
    by_protocol = {protocol: cell_scores(scores, protocol) for protocol in protocols}
    found = []
    for first, second in combinations(protocols, 2):
        shared = [name for name in by_protocol[first] if name in by_protocol[second]]
        means = [[float(np.mean(by_protocol[protocol][name])) for name in shared] for protocol in (first, second)]
        correlation = rank_correlation(*means) if len(shared) >= MIN_POINTS else None
        found.append(Agreement(first, second, correlation, noise_ceiling(by_protocol[first], by_protocol[second])))
    return found


def write_report(directory: Path, scores: Sequence[Score], protocols: Sequence[str], command: str, measure: Measure) -> str:
    """Write scores.csv, the scatter plots and report.md into the run's folder; return the text to print."""
    found = agreements(scores, protocols)
    _write_csv(directory / "scores.csv", scores, measure)
    scatters = {
        (pair.first, pair.second): _scatter(scores, pair.first, pair.second, measure)
        for pair in found
        if pair.correlation is not None
    }
    for (first, second), scatter in scatters.items():
        write_scatters(directory / f"{first}_{second}.png", [scatter])
    if scatters:
        write_scatters(directory / "fidelity.png", list(scatters.values()))
    summary = "\n".join([*_pair_lines(found), *_self_lines(scores, protocols, measure), *_failure_lines(scores)])
    write_text(directory / "report.md", _page(summary, scores, protocols, command, measure, bool(scatters)))
    return f"{summary}\n\nreport: {directory / 'report.md'}"


def _scatter(scores: Sequence[Score], first: str, second: str, measure: Measure) -> Scatter:
    x, y = cell_scores(scores, first), cell_scores(scores, second)
    points = [Point(x[name], y[name], _MARKED.get(name), name) for name in x if name in y]
    return Scatter(points, measure.name, _LABELS[first], _LABELS[second])


def _pair_lines(found: Sequence[Agreement]) -> list[str]:
    lines = [f"{'order of cells in':<33} {'cells':>5} {'rho':>6} {'95 % interval':>16} {'ceiling':>8}"]
    for pair in found:
        label = f"{_LABELS[pair.first]} – {_LABELS[pair.second]}"
        known = pair.correlation
        count, rho, interval = "–", "–", "–"
        if known is not None:
            count, rho, interval = f"{known.count}", _number(known.rho), f"{_number(known.low)} to {_number(known.high)}"
        lines.append(f"{label:<33} {count:>5} {rho:>6} {interval:>16} {_number(pair.ceiling):>8}")
    return [*lines, ""] if found else []


def _self_lines(scores: Sequence[Score], protocols: Sequence[str], measure: Measure) -> list[str]:
    spread = f"{measure.name}, best to worst cell, %"
    lines = [f"{'itself under another seed':<33} {'cells':>5} {'rho':>6} {spread:>30} {'std of seeds':>12}"]
    for protocol in protocols:
        by_cell = cell_scores(scores, protocol)
        means = [100 * float(np.mean(values)) for values in by_cell.values()] or [math.nan]
        variances = [float(np.var(values, ddof=1)) for values in by_cell.values() if len(values) > 1]
        noise = 100 * math.sqrt(np.mean(variances)) if variances else math.nan
        spread = f"{_number(max(means))} to {_number(min(means))}" if by_cell else "–"
        rho = _number(self_agreement(by_cell))
        lines.append(f"{_LABELS[protocol]:<33} {len(by_cell):>5} {rho:>6} {spread:>30} {_number(noise):>12}")
    for protocol in protocols:
        means = [float(np.mean(values)) for values in cell_scores(scores, protocol).values()]
        if means and (warning := ties(means)):
            lines += ["", f"warning, {_LABELS[protocol]}: {warning}"]
    return lines


def _failure_lines(scores: Sequence[Score]) -> list[str]:
    failed = [score for score in scores if score.failure is not None]
    lines = [f"left out: {s.cell_name} of {_LABELS[s.protocol]}, seed {s.seed}: {s.failure}" for s in failed]
    return ["", *lines] if lines else []


def _page(
    summary: str, scores: Sequence[Score], protocols: Sequence[str], command: str, measure: Measure, has_figure: bool
) -> str:
    """The report in Markdown: the tables that are printed, the figure, and all cells."""
    by_protocol = {protocol: cell_scores(scores, protocol) for protocol in protocols}
    means = {p: {name: float(np.mean(values)) for name, values in by_cell.items()} for p, by_cell in by_protocol.items()}
    names = list(dict.fromkeys(score.cell_name for score in scores))
    names.sort(key=lambda name: -means[protocols[0]].get(name, -1.0))
    rows = []
    for name in names:
        columns = [_cell_column(name, by_protocol[protocol], means[protocol]) for protocol in protocols]
        rows.append(f"| {name} | {' | '.join(columns)} |")
    head = ["| cell | " + " | ".join(_LABELS[protocol] for protocol in protocols) + " |", "|---" * (len(protocols) + 1) + "|"]
    figure = [
        f"![{measure.name} of each cell under each pair of protocols](fidelity.png)",
        "",
        "A dot of [fidelity.svg](fidelity.svg) says on hover which cell it is.",
        "",
    ]
    return "\n".join(
        [
            "# Fidelity",
            "",
            f"    {command}",
            "",
            "```",
            summary,
            "```",
            "",
            *(figure if has_figure else []),
            f"{measure.name} in percent, ± one standard deviation over seeds, and the rank under that protocol:",
            "",
            *head,
            *rows,
            "",
        ]
    )


def _cell_column(name: str, by_cell: dict[str, list[float]], means: dict[str, float]) -> str:
    if name not in by_cell:
        return "–"
    values = [100 * value for value in by_cell[name]]
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    rank = 1 + sum(mean > means[name] for mean in means.values())
    return f"{np.mean(values):.2f}{spread} ({rank})"


def _write_csv(path: Path, scores: Sequence[Score], measure: Measure) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["protocol", "cell", "seed", measure.key, "seconds", "failure"])
    writer.writerows([s.protocol, s.cell_name, s.seed, s.score, s.seconds, s.failure] for s in scores)
    write_text(path, text.getvalue())


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"
