"""Optuna's public contract tests (`optuna.testing.pytest_samplers`, since Optuna 4.8) on every sampler of cells.

Those for one objective must say so; random search uses no scores and serves any number, as evolution and TPE do.

Of `RelativeSamplerTestCase` only the last test applies. The others want `sample_relative` to draw parameters `x` and `y`, but
what these samplers draw together is a cell, as they say by `infer_relative_search_space`. Any other one is independent.
"""

from collections.abc import Callable, Iterator
from functools import partial

import optuna
import pytest
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
    SingleOnlySamplerTestCase,
)

from search.cells.samplers import SAMPLER_NAMES, create_sampler
from search.cells.space import SearchSpace

Create = Callable[[], optuna.samplers.BaseSampler]
OF_SEVERAL = ("random", "evolution", "tpe")


@pytest.fixture(autouse=True)
def _quiet_optuna() -> Iterator[None]:
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(verbosity)


def sampler_of(request: pytest.FixtureRequest) -> Create:
    return partial(create_sampler, request.param, SearchSpace(), 0)


class TestEverySampler(BasicSamplerTestCase):
    @pytest.fixture(params=SAMPLER_NAMES)
    def sampler(self, request: pytest.FixtureRequest) -> Create:
        return sampler_of(request)

    test_trial_relative_params = RelativeSamplerTestCase.test_trial_relative_params


class TestSamplersOfOneObjective(SingleOnlySamplerTestCase):
    @pytest.fixture(params=[name for name in SAMPLER_NAMES if name not in OF_SEVERAL])
    def sampler(self, request: pytest.FixtureRequest) -> Create:
        return sampler_of(request)


class TestSamplersOfSeveralObjectives(MultiObjectiveSamplerTestCase):
    @pytest.fixture(params=OF_SEVERAL)
    def sampler(self, request: pytest.FixtureRequest) -> Create:
        return sampler_of(request)
