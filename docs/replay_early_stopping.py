"""What early stopping would have saved, from the learning curves of all cells: `python docs/replay_early_stopping.py FILE`.

FILE is the `rungs.csv` of a search with a reduction factor of 1, in which every cell has a score on every rung. The rules of
`search.runs.halving` are replayed on it, with the cells in many random orders. Cells without all scores are left out.
"""

import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from search.runs.halving import Halving, Rule, Rungs, Step

ORDERS = 200
LAG = 4  # that of a search with one worker
REDUCTIONS, MOST_RUNGS = (2, 4), 4
NEAR = 0.1  # a rung may be so far, relatively, from where the reduction would have it

Curves = NDArray[np.float64]  # (cells, rungs), ascending


class Replay(NamedTuple):
    """What a search came to: iterations as a share of those of all cells in full, and how much worse its best cell is."""

    cost: float
    regret: float


def read(path: Path) -> tuple[tuple[int, ...], Curves]:
    """The iterations of the rungs, and the cells' scores on them."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    rungs = tuple(int(name) for name in rows[0] if name.isdigit())
    return rungs, np.array([[float(row[str(rung)]) for rung in rungs] for row in rows if row[str(rungs[-1])]])


def replay(curves: Curves, rungs: Sequence[int], halving: Halving) -> Replay:
    """Search these cells in this order; `rungs` are those of the curves."""
    jobs, begun, cost = Rungs(halving), 0, 0
    columns = [rungs.index(rung) for rung in halving.rungs]
    in_full = []
    while isinstance(step := jobs.next(len(curves)), Step):
        number = begun if step.number is None else step.number
        begun += step.number is None
        score = float(curves[number, columns[step.rung]])
        jobs.begin(number, step.rung, step.bound)
        jobs.finish(len(jobs) - 1, score)
        cost += halving.rungs[step.rung] - (halving.rungs[step.rung - 1] if step.rung else 0)
        in_full += [score] if step.rung == halving.top else []
    return Replay(cost / (len(curves) * rungs[-1]), float(curves[:, -1].max()) - max(in_full))


def replay_short(curves: Curves, rungs: Sequence[int], column: int) -> Replay:
    """Train all cells up to one rung, and keep the best; how good that is, is seen once it is trained in full."""
    cost = (len(curves) - 1) * rungs[column] + rungs[-1]
    regret = curves[:, -1].max() - curves[curves[:, column].argmax(), -1]
    return Replay(cost / (len(curves) * rungs[-1]), float(regret))


def choices(rungs: Sequence[int]) -> Iterator[Halving]:
    """Rules with as many rungs as there are for them."""
    for rule in get_args(Rule):
        for reduction in REDUCTIONS:
            chosen = [rungs[-1]]
            while len(chosen) < MOST_RUNGS:
                wanted = chosen[0] / reduction
                near = min(rungs, key=lambda rung: abs(rung - wanted))
                if abs(near - wanted) > NEAR * wanted:
                    break
                chosen.insert(0, near)
                yield Halving(rule, tuple(chosen), reduction, LAG)


def correlations(rungs: Sequence[int], curves: Curves) -> Iterator[str]:
    """A row for each rung: how far its scores order the cells as the last ones do."""
    yield "| iterations | Spearman's ρ with the last | the best cell here is at last | the best at last is here |"
    yield "|---:|---:|---:|---:|"
    places = (-curves).argsort(axis=0).argsort(axis=0) + 1
    for column, rung in enumerate(rungs[:-1]):
        rho = spearmanr(curves[:, column], curves[:, -1]).statistic
        best, last = places[curves[:, column].argmax(), -1], places[curves[:, -1].argmax(), column]
        yield f"| {rung:,} | {rho:.2f} | {best} of {len(curves)} | {last} of {len(curves)} |"


def savings(rungs: Sequence[int], curves: Curves) -> Iterator[str]:
    """A row for each rule, over random orders of the cells."""
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(curves)) for _ in range(ORDERS)]
    yield "| rule | one of | rungs | of all iterations | saves | worse than the best: median | 3 of 4 | at most |"
    yield "|---|---:|---|---:|---:|---:|---:|---:|"
    for halving in choices(rungs):
        yield row(halving.rule, str(halving.reduction), halving.rungs, [replay(curves[o], rungs, halving) for o in orders])
    for column, rung in enumerate(rungs[:-1]):
        yield row("all short, the best in full", "", (rung, rungs[-1]), [replay_short(curves, rungs, column)])


def row(rule: str, reduction: str, rungs: Sequence[int], replays: Sequence[Replay]) -> str:
    """A row of the table; regrets in percent points."""
    cost, regret = np.mean([each.cost for each in replays]), 100 * np.array([each.regret for each in replays])
    spread = " | ".join(f"{value:.2f}" for value in (np.median(regret), np.quantile(regret, 0.75), regret.max()))
    return f"| {rule} | {reduction} | {' '.join(map(str, rungs))} | {100 * cost:.1f} % | {1 / cost:.1f} × | {spread} |"


def main(path: Path) -> None:
    """Print both tables, in Markdown."""
    rungs, curves = read(path)
    print(f"{len(curves)} cells, {rungs[-1]:,} iterations in full\n")
    print("\n".join([*correlations(rungs, curves), "", *savings(rungs, curves)]))


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit("usage: python docs/replay_early_stopping.py runs/camvid/rungs.csv")
    main(Path(sys.argv[1]))
