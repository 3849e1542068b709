"""What there is to say of a search with two objectives: the cells on its Pareto front, beside those that were made by hand."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from reference.cell import Cell
from search.cells.pareto import dominates, pareto_front, roomiest
from search.reports.charts import Group
from search.reports.page import quantity
from search.runs.study import Run, TrialRecord
from search.settings import known
from search.tasks.proxy import CostKind

MOST_SHOWN = 20  # cells of a front, in tables of all that is known of each
_MOST_NAMED = 3  # cells that beat another one


@dataclass(frozen=True)
class FrontRow:
    """A cell on the front, or one to compare with. `remark` says which of the other kind beat it."""

    label: str
    score: float  # of several seeds the mean
    cost: float
    cell: Cell
    is_compared: bool
    remark: str = ""

    @property
    def values(self) -> tuple[float, float]:
        return self.score, -self.cost


def front_of(run: Run, best: Sequence[TrialRecord], most: int | None = None) -> list[TrialRecord]:
    """Of the ranked cells of a run those that no other one beats in both objectives, the best score first.

    Of more than `most` those with the most room around them, and so the ends first.
    """
    kind = run.cost_kind
    assert kind is not None
    values = [(known(record.score), -record.cost(kind)) for record in best]
    front = pareto_front(values)
    chosen = set(roomiest(values, front)[:most])
    return [best[place] for place in front if place in chosen]


def front_rows(run: Run, front: Sequence[TrialRecord], groups: Sequence[Group]) -> list[FrontRow]:
    """The front and the compared cells, the cheapest first."""
    kind = run.cost_kind
    assert kind is not None
    found = [FrontRow(f"trial {each.number}", known(each.score), each.cost(kind), each.cell, False) for each in front]
    compared = [FrontRow(group.label, group.mean, group.cost(kind), group.cell, True) for group in groups]
    made = [row for row, group in zip(compared, groups, strict=True) if not group.is_found]
    rows = [replace(row, remark=_beaten_by(row, made)) for row in found]
    for row, group in zip(compared, groups, strict=True):
        remark = "" if group.is_found else _beaten_by(row, found)
        rows.append(replace(row, label=group.label_and_seeds, remark=remark))
    return sorted(rows, key=lambda row: (row.cost, -row.score))


def num_beaten(rows: Sequence[FrontRow]) -> int:
    """How many cells of the front a compared one beats."""
    return sum(bool(row.remark) and not row.is_compared for row in rows)


def _beaten_by(row: FrontRow, others: Sequence[FrontRow]) -> str:
    names = [other.label for other in others if dominates(other.values, row.values)]
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return f"beaten by {', '.join(names[:_MOST_NAMED])}{more}" if names else ""


def cost_text(kind: CostKind, value: float) -> str:
    """A cost for people.

    >>> cost_text("multiply_adds", 804e6), cost_text("latency", 0.834), cost_text("latency", 0.0163)
    ('804 M', '0.83 ×', '0.02 ×')
    """
    return quantity(value) if kind == "multiply_adds" else f"{value:.2f} ×"
