"""Dense prediction cells as a benchmark problem of OptunaHub, from the table `cells.csv` beside this file.

import optuna, optunahub

cells = optunahub.load_local_module("benchmarks/dense_prediction_cells", registry_root="FOLDER ABOVE benchmarks")
problem = cells.Problem()
study = optuna.create_study(directions=problem.directions)
study.optimize(problem, n_trials=100)
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import optuna
import optunahub

_VALUES = {  # of a cell, and whether greater ones are better
    "score": True,
    "seconds": False,
    "multiply_adds": False,
    "parameters": False,
}


class Problem(optunahub.benchmarks.BaseProblem):
    """The score of a cell after training it, looked up.

    Args:
        seed: Which of the cell's trainings is looked up, from 0. None: the mean of all.
        iterations: How long it was trained, one of `all_iterations`. None: in full.
        objectives: What is looked up: "score", and what it costs, "seconds", "multiply_adds", "parameters".
    """

    def __init__(
        self, seed: int | None = None, iterations: int | None = None, objectives: tuple[str, ...] = ("score",)
    ) -> None:
        with (Path(__file__).parent / "cells.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        scores = [name.split("_")[1:] for name in rows[0] if name.startswith("score_")]
        self.seeds = sorted({int(each) for each, _ in scores})
        self.all_iterations = sorted({int(each) for _, each in scores})
        self.iterations = self.all_iterations[-1] if iterations is None else iterations
        if self.iterations not in self.all_iterations or seed not in (None, *self.seeds):
            raise ValueError(f"seed must be one of {self.seeds}, iterations one of {self.all_iterations}")
        if not objectives or not set(objectives) <= _VALUES.keys():
            raise ValueError(f"objectives must be some of {', '.join(_VALUES)}, got {objectives}")
        self.metric_names = list(objectives)
        chosen = self.seeds if seed is None else [seed]
        self._names = [name for name in rows[0] if name.startswith("branch")]
        self._space = {
            name: optuna.distributions.CategoricalDistribution(list(dict.fromkeys(_typed(row, name) for row in rows)))
            for name in self._names
        }
        self._values = {
            tuple(_typed(row, name) for name in self._names): {
                "score": _mean(row, [f"score_{each}_{self.iterations}" for each in chosen]),
                "seconds": _mean(row, [f"seconds_{each}" for each in chosen]) * self.iterations / self.all_iterations[-1],
                "multiply_adds": float(row["multiply_adds"]),
                "parameters": float(row["parameters"]),
            }
            for row in rows
        }

    @property
    def search_space(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """The choices of each branch: what it reads, −1 for the backbone's feature, and its operation."""
        return dict(self._space)

    @property
    def directions(self) -> list[optuna.study.StudyDirection]:
        """Greater scores are better, and less of everything else."""
        names = {True: optuna.study.StudyDirection.MAXIMIZE, False: optuna.study.StudyDirection.MINIMIZE}
        return [names[_VALUES[name]] for name in self.metric_names]

    def evaluate(self, params: dict[str, Any]) -> float | list[float]:
        """The objectives of the cell with these parameters; a single one as a number."""
        values = self._values[tuple(params[name] for name in self._names)]
        found = [values[name] for name in self.metric_names]
        return found if len(found) > 1 else found[0]


def _typed(row: dict[str, str], name: str) -> str | int:
    return int(row[name]) if name.endswith("_input") else row[name]


def _mean(row: dict[str, str], names: list[str]) -> float:
    return sum(float(row[name]) for name in names) / len(names)


__all__ = ["Problem"]
