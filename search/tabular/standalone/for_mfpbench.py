"""Dense prediction cells as a tabular benchmark of mfpbench (mf-prior-bench), from the table `cells.csv` beside this file.

    from dense_prediction_cells import DensePredictionCells

    benchmark = DensePredictionCells()
    result = benchmark.query(benchmark.sample(), at=1)
    print(result.score, result.cost, result["iterations"].value)

A fidelity is a rung, from 1: the first, second and so on of the numbers of iterations after which a training was scored.
mfpbench wants fidelities at equal distances, which iterations that double are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from ConfigSpace import CategoricalHyperparameter, ConfigurationSpace
from mfpbench.config import TabularConfig
from mfpbench.metric import Metric
from mfpbench.result import Result
from mfpbench.tabular import TabularBenchmark


@dataclass(frozen=True)
class CellResult(Result):
    """Of one training of a cell: its score, the mean score of all its trainings, and what it cost."""

    metric_defs: ClassVar[Mapping[str, Metric]] = {
        "score_of_training": Metric(minimize=False),
        "mean_score": Metric(minimize=False),
        "iterations": Metric(minimize=True, bounds=(0, np.inf)),
        "seconds": Metric(minimize=True, bounds=(0, np.inf)),
        "multiply_adds": Metric(minimize=True, bounds=(0, np.inf)),
        "parameters": Metric(minimize=True, bounds=(0, np.inf)),
    }
    default_value_metric: ClassVar[str] = "score_of_training"
    default_value_metric_test: ClassVar[str] = "mean_score"
    default_cost_metric: ClassVar[str] = "seconds"

    score_of_training: Metric.Value
    mean_score: Metric.Value
    iterations: Metric.Value
    seconds: Metric.Value
    multiply_adds: Metric.Value
    parameters: Metric.Value


class DensePredictionCells(TabularBenchmark):
    """The scores of one training of each cell; the test score is the mean of all trainings.

    Args:
        training: Which of each cell's trainings, from 0.
        seed: Of the random numbers of `sample`.
        **options: As of `TabularBenchmark`: prior, perturb_prior, value_metric, cost_metric.
    """

    def __init__(self, training: int = 0, *, seed: int | None = None, **options: Any) -> None:
        wide = pd.read_csv(Path(__file__).parent / "cells.csv", dtype={"id": str})
        choices = [name for name in wide.columns if name.startswith("branch")]
        space = ConfigurationSpace(name="dense_prediction_cells", seed=seed)
        space.add([CategoricalHyperparameter(name, list(dict.fromkeys(wide[name].tolist()))) for name in choices])
        types = [(name, int if name.endswith("_input") else str) for name in choices]
        super().__init__(
            "dense_prediction_cells",
            _long(wide, choices, training),
            id_key="id",
            fidelity_key="rung",
            result_type=CellResult,
            config_type=make_dataclass("CellConfig", types, bases=(TabularConfig,), frozen=True, eq=False, unsafe_hash=True),
            space=space,
            seed=seed,
            **options,
        )


def _long(wide: pd.DataFrame, choices: list[str], training: int) -> pd.DataFrame:
    """A row for each cell and rung."""
    scores = [name.split("_") for name in wide.columns if name.startswith("score_")]
    seeds, iterations = sorted({int(seed) for _, seed, _ in scores}), sorted({int(each) for *_, each in scores})
    if training not in seeds:
        raise ValueError(f"training must be one of {seeds}, got {training}")
    parts = [
        wide[["id", *choices, "multiply_adds", "parameters"]].assign(
            rung=rung,
            iterations=float(each),
            score_of_training=wide[f"score_{training}_{each}"],
            mean_score=wide[[f"score_{seed}_{each}" for seed in seeds]].mean(axis=1),
            seconds=wide[f"seconds_{training}"] * each / iterations[-1],
        )
        for rung, each in enumerate(iterations, start=1)
    ]
    return pd.concat(parts).reset_index(drop=True).astype({"multiply_adds": float, "parameters": float})
