"""A table of cells in the forms of other libraries, so that their optimisers can be compared on it.

    optunahub/benchmarks/dense_prediction_cells/    a package for `optunahub.load_local_module`
    mfpbench/dense_prediction_cells.py              a `TabularBenchmark` of mf-prior-bench
    syne_tune/                                      for Syne Tune's `blackbox_tabular.deserialize`; writing it needs Syne Tune

Each is for itself: nothing of this project is needed to load it. The first two read `cells.csv`, in which each cell has a row
for every way to write it, so that any choice of parameters is found; cells that do the same have the same numbers.
"""

import csv
import io
import json
import warnings
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from search.cells.sampler import cell_from_params, choices_of
from search.files import write_text
from search.tabular.table import CellTable

NAME = "dense_prediction_cells"
SYNE_TUNE = "syne_tune"
_STANDALONE = Path(__file__).parent / "standalone"
_FIDELITY = "iterations"
_ABOUT = """---
author: Dense Prediction Cell contributors
title: Dense Prediction Cells
description: All cells of a small space of multi-scale context modules for dense prediction, each trained with several seeds.
tags: [benchmark, neural architecture search, multi-fidelity, semantic segmentation]
optuna_versions: [4.0.0]
license: Apache-2.0
---

## Class or Function Names

- Problem

## Example

```python
import optuna
import optunahub

cells = optunahub.load_local_module("benchmarks/dense_prediction_cells", registry_root="FOLDER ABOVE benchmarks")
problem = cells.Problem(objectives=("score", "multiply_adds"))
study = optuna.create_study(directions=problem.directions)
study.optimize(problem, n_trials=100)
```

What the scores are of:

```json
{provenance}
```
"""


def write_forms(directory: Path, table: CellTable, name: str) -> list[Path]:
    """Write the table in all forms; return their folders.

    Syne Tune's, in which the table is a task of this `name`, is left out where the library is missing, and for cells of one
    branch: it finds no configuration of a single parameter.
    """
    rows = list(_rows(table))
    package, module = directory / "optunahub" / "benchmarks" / NAME, directory / "mfpbench"
    sources = {package / "__init__.py": "for_optunahub.py", module / f"{NAME}.py": "for_mfpbench.py"}
    for path, source in sources.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, (_STANDALONE / source).read_text(encoding="utf-8"))
        write_text(path.parent / "cells.csv", _csv(rows))
    write_text(package / "README.md", _ABOUT.replace("{provenance}", json.dumps(table.provenance, indent=1)))
    written = [package.parent.parent, module]
    if len(choices_of(table.space)) == 1:
        return written
    try:
        _write_syne_tune(directory / SYNE_TUNE, table, name)
    except ModuleNotFoundError:
        return written
    return [*written, directory / SYNE_TUNE]


def _spellings(table: CellTable) -> Iterator[tuple[dict[str, str | int], int]]:
    """All choices of the parameters of a cell, and where in the table it is."""
    choices = choices_of(table.space)
    for values in product(*choices.values()):
        params = dict(zip(choices, values, strict=True))
        yield params, table.place_of(cell_from_params(params, table.space))


def _rows(table: CellTable) -> Iterator[dict[str, Any]]:
    seeds = range(table.num_seeds)
    for number, (params, place) in enumerate(_spellings(table)):
        each = table.cells[place]
        costs = {"parameters": each.parameters, "multiply_adds": each.multiply_adds}
        seconds = {f"seconds_{seed}": each.seconds[seed] for seed in seeds}
        scores = {
            f"score_{seed}_{iterations}": score
            for seed in seeds
            for iterations, score in zip(table.iterations, each.scores[seed], strict=True)
        }
        yield {"id": number, "cell": place, **params, **costs, **seconds, **scores}


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write_syne_tune(directory: Path, table: CellTable, name: str) -> None:
    """Raises ModuleNotFoundError without Syne Tune, or without what it writes tables with."""
    import fastparquet  # noqa: F401
    import pandas as pd
    from syne_tune.blackbox_repository.blackbox_tabular import BlackboxTabular, serialize
    from syne_tune.config_space import choice, randint

    spelled = list(_spellings(table))
    places = [place for _, place in spelled]
    parts = np.array(table.iterations) / table.iterations[-1]  # (rungs,)
    scores = table.scores[places]  # (spellings, seeds, rungs)
    of_cells = [[each.multiply_adds, each.parameters] for each in table.cells]
    values = {
        "score": scores,
        "elapsed_time": table.seconds[places][..., None] * parts,
        "multiply_adds": np.broadcast_to(np.array(of_cells)[places, 0, None, None], scores.shape),
        "parameters": np.broadcast_to(np.array(of_cells)[places, 1, None, None], scores.shape),
    }
    with warnings.catch_warnings():  # of pandas, about how Syne Tune calls it
        warnings.simplefilter("ignore")
        blackbox = BlackboxTabular(
            hyperparameters=pd.DataFrame([params for params, _ in spelled]),
            configuration_space={key: choice(list(options)) for key, options in choices_of(table.space).items()},
            fidelity_space={_FIDELITY: randint(table.iterations[0], table.iterations[-1])},
            objectives_evaluations=np.stack(list(values.values()), axis=-1),
            fidelity_values=np.array(table.iterations),
            objectives_names=list(values),
        )
        directory.mkdir(parents=True, exist_ok=True)
        about = {"metric_mode": {"score": "max"}, "provenance": dict(table.provenance)}
        serialize({name: blackbox}, str(directory), metadata=about)
