"""The plan of a run: its cases and their providers, and in words what is left out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, assert_never

import torch

from bench.cases import (
    COMPILE,
    COMPILE_MAX,
    EAGER,
    EAGER_CHANNELS_LAST,
    OURS,
    OURS_WITHOUT_KERNELS,
    Case,
    CellCase,
    DepthwiseCase,
    DType,
    LossCase,
    OperationCase,
    Provider,
    Suite,
)
from bench.costs import Mode
from bench.training_cases import NewCellCase, ProxyCase, SearchCase, random_cells
from fast.train_step import has_fast_bf16
from reference.cell import GRID_SIZES, RATES, AtrousSeparableConv, Conv1x1, Operation, PyramidPooling
from search.cells.space import load_cell
from search.settings import HeadSettings, ProxySettings

PUBLISHED_RATES = tuple((h, w) for h in RATES for w in RATES)
FEW_RATES = ((1, 1), (6, 6), (6, 21), (21, 21))  # the densest reads, two rates like the published cell's, the farthest reads
FRESH_RATE = (6, 21)  # because every process takes seconds to start
MODES: tuple[Mode, ...] = ("inference", "training")
NEW_CELL = "first iteration of a new cell"


@dataclass(frozen=True)
class Scale:
    """The sizes and numbers of the cases of a run. Cells and losses have the sizes of the proxy iteration."""

    maps: tuple[tuple[int, int, int, int], ...]  # (batch, channels, height, width); the last one is larger than every cache
    proxy: ProxyCase
    search: SearchCase
    rates: tuple[tuple[int, int], ...]
    grids: tuple[tuple[int, int], ...]
    random_cells: int
    rounds: int


PAPER = Scale(
    maps=((8, 256, 49, 49), (16, 256, 97, 97)),
    proxy=ProxyCase(cell=load_cell("dpc"), batch=8, in_channels=320, channels=256, num_classes=19, crop=(49, 49)),
    search=SearchCase(
        cells=4,
        settings=ProxySettings(iterations=80, learning_rate=0.05),
        head=HeadSettings(branch_channels=256),
        train_images=240,
        val_images=60,
    ),
    rates=PUBLISHED_RATES,
    grids=tuple((h, w) for h in GRID_SIZES for w in GRID_SIZES),
    random_cells=20,
    rounds=10,
)
_QUICK_SETTINGS = ProxySettings(iterations=5, learning_rate=0.05, statistics_batches=2)
QUICK = replace(
    PAPER,
    maps=PAPER.maps[:1],
    search=replace(PAPER.search, cells=1, settings=_QUICK_SETTINGS, train_images=8, val_images=4),
    rates=((6, 21),),
    grids=((2, 4),),
    random_cells=0,
    rounds=3,
)


@dataclass(frozen=True)
class Job:
    """A case in one dtype, with its providers."""

    case: Case
    dtype: DType
    providers: tuple[Provider, ...]
    in_fresh_process: tuple[Provider, ...]  # providers whose first call and memory are measured too


@dataclass(frozen=True)
class Plan:
    """The jobs of a run, and in words what is left out."""

    jobs: tuple[Job, ...]
    omissions: tuple[str, ...]
    dtypes: tuple[DType, ...]
    unsupported: tuple[DType, ...]
    rounds: int


def make_plan(
    suites: Sequence[Suite], device: torch.device, *, quick: bool, full: bool, dtypes: Sequence[DType] | None = None
) -> Plan:
    """Plan a run: its cases in the order of the suites, in the given dtypes or else the device's usual ones."""
    scale = QUICK if quick else PAPER
    supported, unsupported = supported_dtypes(device)
    if dtypes:
        supported, unsupported = (tuple(d for d in some if d in dtypes) for some in (supported, unsupported))
    elif not full:
        supported = supported[: 1 if quick else 2]
    planner = Planner(scale, device, quick=quick, full=full)
    jobs = [planner.job(case, dtype) for case in planner.cases(suites) for dtype in planner.dtypes_of(case, supported)]
    omissions = tuple(planner.omissions(suites, supported, unsupported))
    return Plan(tuple(jobs), omissions, supported, unsupported, scale.rounds)


def supported_dtypes(device: torch.device) -> tuple[tuple[DType, ...], tuple[DType, ...]]:
    """The dtypes that this machine computes natively, most used first, and those that it would emulate."""
    if device.type == "cuda":
        return ("bfloat16", "float32", "float16"), ()
    return (("float32", "bfloat16"), ()) if has_fast_bf16(device) else (("float32",), ("bfloat16",))


def rate_of(case: Case) -> tuple[int, int] | None:
    """An atrous convolution's; None for all else."""
    match case:
        case DepthwiseCase(rate=rate) | OperationCase(operation=AtrousSeparableConv(rate)):
            return rate
        case _:
            return None


@dataclass(frozen=True)
class Planner:
    """Makes cases from a scale, and jobs from cases."""

    scale: Scale
    device: torch.device
    quick: bool
    full: bool

    def cases(self, suites: Sequence[Suite]) -> Iterator[Case]:
        makers = {"proxy": self._proxy, "loss": self._loss, "search": self._search, "cell": self._cells, "ops": self._ops}
        for suite in dict.fromkeys(suites):
            yield from makers[suite]()

    def dtypes_of(self, case: Case, dtypes: Sequence[DType]) -> tuple[DType, ...]:
        """The dtypes of a case: training steps have no loss scaling for float16, and a search chooses its own precision."""
        if isinstance(case, SearchCase):
            return ("bfloat16" if has_fast_bf16(self.device) else "float32",)
        return tuple(dtype for dtype in dtypes if dtype != "float16" or not isinstance(case, ProxyCase))

    def job(self, case: Case, dtype: DType) -> Job:
        """A job, with the providers that take part."""
        if isinstance(case, SearchCase):
            return Job(case, dtype, (OURS, OURS_WITHOUT_KERNELS), in_fresh_process=())
        if isinstance(case, NewCellCase):
            return Job(case, dtype, (OURS, EAGER), in_fresh_process=())
        providers = [OURS, EAGER]
        if not (self.quick and self.device.type == "cpu"):
            providers.append(EAGER_CHANNELS_LAST)
        if self._is_compiled(case):
            providers += [COMPILE, COMPILE_MAX]
        fresh: list[Provider] = []
        if self.quick:
            fresh += [OURS] if isinstance(case, ProxyCase) else []
        elif self._is_typical(case) and rate_of(case) in (None, FRESH_RATE):
            fresh += providers
        return Job(case, dtype, tuple(providers), tuple(fresh))

    def omissions(self, suites: Sequence[Suite], supported: Sequence[DType], unsupported: Sequence[DType]) -> Iterator[str]:
        """Name the results that a reader might expect but does not find."""
        for dtype in unsupported:
            yield f"{dtype}: not supported here (the processor has neither AMX nor AVX-512 bf16)"
        if self.quick:
            yield from self._omitted_by_quick()
            return
        if "float16" in supported:
            yield "float16: not for training steps and searches, which would need loss scaling"
        elif self.device.type == "cuda":
            yield "float16: --dtype float16 or --full measures it"
        if not self.full:
            yield from self._omitted_but_by_full(suites)

    def _omitted_by_quick(self) -> Iterator[str]:
        if self.device.type == "cpu":
            yield "torch.compile and eager channels-last: left out by --quick on a CPU"
        else:
            yield "torch.compile: left out by --quick but for the separable convolution"
        yield "--quick: one map size, rate and grid, the published cell, few rounds; first call and memory of ours alone"
        yield "the first iteration of a new cell: left out by --quick"

    def _omitted_but_by_full(self, suites: Sequence[Suite]) -> Iterator[str]:
        rates = ", ".join("{}×{}".format(*rate) for rate in FEW_RATES)
        if {"ops", "cell"}.intersection(suites):
            yield f"torch.compile: at rates {rates}, one grid, the published cell and ASPP only; --full compiles everything"
            yield f"first call and memory: of the cases that are compiled, at rate {FRESH_RATE[0]}×{FRESH_RATE[1]} alone"
        if "ops" in suites and self.device.type == "cpu":
            yield f"16×256×97×97 on a CPU: at rates {rates} and one grid only; --full runs all 64 rates and 16 grids"

    def _is_compiled(self, case: Case) -> bool:
        if self.quick:
            return self.device.type != "cpu" and isinstance(case, OperationCase) and rate_of(case) is not None
        return self.full or self._is_typical(case)

    def _is_typical(self, case: Case) -> bool:
        """Whether the case represents others like it, for measurements that are too slow to do for all."""
        if isinstance(case, OperationCase):
            return self._is_typical_operation(case.operation)
        return not isinstance(case, CellCase) or case.name in ("dpc", "aspp")

    def _is_typical_operation(self, operation: Operation) -> bool:
        match operation:
            case Conv1x1():
                return True
            case AtrousSeparableConv(rate):
                return rate in self._few_rates()
            case PyramidPooling(grid_size):
                return grid_size == self.scale.grids[0]
            case _:
                assert_never(operation)

    def _few_rates(self) -> tuple[tuple[int, int], ...]:
        return tuple(rate for rate in FEW_RATES if rate in self.scale.rates) or self.scale.rates

    def _ops(self) -> Iterator[Case]:
        for k, (batch, channels, height, width) in enumerate(self.scale.maps):
            all_of_them = k == 0 or self.full or self.device.type == "cuda"
            rates = self.scale.rates if all_of_them else self._few_rates()
            grids = self.scale.grids if all_of_them else self.scale.grids[:1]
            operations: list[Operation] = [AtrousSeparableConv(rate=rate) for rate in rates]
            operations += [Conv1x1(), *(PyramidPooling(grid_size=grid) for grid in grids)]
            size = map_size(batch, channels, channels, height, width)
            for mode in MODES:
                for operation in operations:
                    yield OperationCase(name=str(operation), mode=mode, operation=operation, **size)
                for rate in self._few_rates():
                    yield DepthwiseCase(name="depthwise {}x{}".format(*rate), mode=mode, rate=rate, **size)

    def _loss(self) -> Iterator[Case]:
        proxy = self.scale.proxy
        sizes: dict[str, Any] = {"batch": proxy.batch, "num_classes": proxy.num_classes}
        sizes |= {"size": proxy.crop, "label_size": proxy.label_size}
        yield LossCase(name="loss and gradient", mode="training", **sizes)
        yield LossCase(name="confusion matrix", mode="inference", **sizes)

    def _cells(self) -> Iterator[Case]:
        proxy, names = self.scale.proxy, ["dpc"] if self.quick else ["dpc", "aspp"]
        cells = {name: load_cell(name) for name in names}
        cells |= {f"random {i}": cell for i, cell in enumerate(random_cells(self.scale.random_cells))}
        for mode in MODES:
            for name, cell in cells.items():
                size = map_size(proxy.batch, proxy.in_channels, proxy.channels, *proxy.crop)
                yield CellCase(name=name, mode=mode, cell=cell, **size)

    def _proxy(self) -> Iterator[Case]:
        yield self.scale.proxy
        if not self.quick:
            yield NewCellCase(**vars(self.scale.proxy) | {"name": NEW_CELL, "repeats": False})

    def _search(self) -> Iterator[Case]:
        yield self.scale.search


def map_size(batch: int, in_channels: int, channels: int, height: int, width: int) -> dict[str, Any]:
    """The fields of a `MapCase`."""
    return {"batch": batch, "in_channels": in_channels, "channels": channels, "height": height, "width": width}
