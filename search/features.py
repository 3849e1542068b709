"""Backbone features of a data set, computed once (paper, section 3.3): `python -m search.features`."""

import sys
from dataclasses import dataclass

from search.cli import Flat, print_next, run_command, spelled, this_command, to_type
from search.settings import BackboneSettings, DataSettings, FeatureSettings, MachineSettings
from search.tasks.feature_cache import open_for_features, prepare_caches

_PROG = spelled("features")


@dataclass(frozen=True, kw_only=True)
class FeaturesSettings:
    """Compute and keep the features that a search trains on: those of the data set's two splits."""

    data: Flat[DataSettings] = DataSettings()
    backbone: Flat[BackboneSettings] = BackboneSettings()
    features: Flat[FeatureSettings] = FeatureSettings()
    machine: Flat[MachineSettings] = MachineSettings()


def main(settings: FeaturesSettings) -> None:
    """Compute the caches of both splits and say what they hold."""
    groups = settings.data, settings.backbone, settings.features, settings.machine
    caches = prepare_caches(open_for_features(*groups), *groups, this_command(_PROG))
    for split, cache in caches.items():
        gigabytes = cache.features.numel() * cache.features.element_size() / 1e9
        print(f"{split}: {cache.directory}, features {tuple(cache.features.shape)} {cache.features.dtype}, {gigabytes:.2f} GB")
    print_next(to_type("random", *sys.argv[1:]))  # whose flags include all of these


if __name__ == "__main__":
    run_command(FeaturesSettings, main, prog=_PROG, goes_on=True)
