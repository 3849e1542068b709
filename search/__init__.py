"""Finds cells and tests them; every stage is a command: `python -m search.random --help`.

From Python, `from search import search_cells` and the names below; docs/python.md shows how. They are imported when they are
asked for, because most parts need few of the others.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from search.backbones import create_backbone
    from search.backbones.from_module import backbone_from_module
    from search.cells.space import load_cell
    from search.datasets import open_dataset
    from search.datasets.from_torch import TorchDataset
    from search.errors import InputError
    from search.pipeline import Found, SearchSettings, Trained, load_found, search_cells, train_network
    from search.settings import (
        BackboneSettings,
        FeatureSettings,
        HeadSettings,
        LossSettings,
        MachineSettings,
        ProxySettings,
        RecipeSettings,
    )
    from search.training.predictor import Predictor

__all__ = [
    "BackboneSettings",
    "FeatureSettings",
    "Found",
    "HeadSettings",
    "InputError",
    "LossSettings",
    "MachineSettings",
    "Predictor",
    "ProxySettings",
    "RecipeSettings",
    "SearchSettings",
    "TorchDataset",
    "Trained",
    "backbone_from_module",
    "create_backbone",
    "load_cell",
    "load_found",
    "open_dataset",
    "search_cells",
    "train_network",
]

if sys.argv[:1] == ["-m"]:  # a command is about to run: so Python calls itself while it looks for one
    from search.commands import explain_missing_packages

    explain_missing_packages()

if not TYPE_CHECKING:
    _PIPELINE = ("Found", "SearchSettings", "Trained", "load_found", "search_cells", "train_network")
    _GROUPS = ("Backbone", "Feature", "Head", "Loss", "Machine", "Proxy", "Recipe")
    _PLACES = {
        "backbone_from_module": ".backbones.from_module",
        "create_backbone": ".backbones",
        "load_cell": ".cells.space",
        "open_dataset": ".datasets",
        "TorchDataset": ".datasets.from_torch",
        "InputError": ".errors",
        "Predictor": ".training.predictor",
        **dict.fromkeys(_PIPELINE, ".pipeline"),
        **{f"{group}Settings": ".settings" for group in _GROUPS},
    }

    def __getattr__(name: str) -> Any:
        """Import what is asked for (PEP 562)."""
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_PLACES[name], __name__), name)

    def __dir__() -> list[str]:
        """All names, also those that are not imported yet."""
        return sorted({*globals(), *__all__})
