"""What a run measures and in which order: all suites, or what matters most in a few minutes; and in words what is left out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from bench import profiles, stages
from bench.caching_case import CachingCase
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
    Job,
    LossCase,
    OperationCase,
    Provider,
    Suite,
    rate_of,
    supported_dtypes,
)
from bench.costs import Mode
from bench.stages import Stage
from bench.study_case import StudyCase, StudyScale
from bench.training_cases import NewCellCase, ProxyCase, SearchCase, random_cells
from fast.train_step import has_fast_bf16
from reference.cell import (
    BACKBONE_FEATURE,
    GRID_SIZES,
    RATES,
    AtrousSeparableConv,
    Branch,
    Cell,
    Conv1x1,
    Operation,
    PyramidPooling,
)
from reference.grid import Grid
from search.cells.space import load_cell
from search.settings import HeadSettings, ProxySettings

PUBLISHED_RATES = tuple((h, w) for h in RATES for w in RATES)
FEW_RATES = ((1, 1), (6, 6), (6, 21), (21, 21))  # the densest reads, two rates like the published cell's, the farthest reads
FRESH_RATE = (6, 21)  # because every process takes seconds to start
FAR_AND_DENSE = ((6, 21), (1, 1))  # reads of a convolution
MODES: tuple[Mode, ...] = ("inference", "training")
_PICTURES_OF_A_GPU = 16  # times as many as of a CPU: nothing is done while the first are read and the last are written
NEW_CELL = "first iteration of a new cell"
EVERY_KIND = Cell(  # of branch, each input normed or not, one map read twice
    (
        Branch(BACKBONE_FEATURE, AtrousSeparableConv(rate=(1, 6))),
        Branch(0, AtrousSeparableConv(rate=(3, 1))),
        Branch(0, Conv1x1()),
        Branch(1, PyramidPooling(grid_size=(2, 4))),
        Branch(BACKBONE_FEATURE, Conv1x1()),
    )
)


@dataclass(frozen=True)
class Scale:
    """The sizes and numbers of the cases of a run. Cells and losses have the sizes of the proxy iteration."""

    maps: tuple[tuple[int, int, int, int], ...]  # (batch, channels, height, width); the last one is larger than every cache
    proxy: ProxyCase
    centres: ProxyCase  # the same iteration on the features of a vision transformer
    search: SearchCase
    caching: CachingCase
    study: StudyScale
    rates: tuple[tuple[int, int], ...]
    grids: tuple[tuple[int, int], ...]
    random_cells: int
    rounds: int


PAPER = Scale(
    maps=((8, 256, 49, 49), (16, 256, 97, 97)),
    proxy=ProxyCase(cell=load_cell("dpc"), batch=8, in_channels=320, channels=256, num_classes=19, crop=(49, 49)),
    centres=ProxyCase(
        name="iteration, centres",
        cell=load_cell("dpc"),
        batch=8,
        in_channels=384,
        channels=256,
        num_classes=19,
        crop=(32, 32),
        grid=Grid(16, align_corners=False),
    ),
    search=SearchCase(
        cells=4,
        settings=ProxySettings(iterations=80, learning_rate=0.05),
        head=HeadSettings(branch_channels=256),
        train_images=240,
        val_images=60,
    ),
    caching=CachingCase(pictures=32),
    study=StudyScale(trials=(0, 1000, 28_000), processes=64, at_once=320),
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
    caching=CachingCase(pictures=24, size=(256, 256)),
    study=StudyScale(trials=(0, 300), processes=8, at_once=80),
    rates=((6, 21),),
    grids=((2, 4),),
    random_cells=0,
    rounds=3,
)


@dataclass(frozen=True)
class Plan:
    """The stages of a run, and in words what is left out."""

    stages: tuple[Stage, ...]
    omissions: tuple[str, ...] = ()
    unsupported: tuple[DType, ...] = ()

    @property
    def jobs(self) -> list[Job]:
        return [job for stage in self.stages for job in stage.jobs]


def make_plan(suites: Sequence[Suite], device: torch.device, *, quick: bool, dtypes: Sequence[DType] | None = None) -> Plan:
    """All cases, in the order of the suites, in the given dtypes or else the device's usual ones; a stage for each."""
    supported, unsupported = supported_dtypes(device)
    planner = Planner(QUICK if quick else PAPER, device, quick=quick)
    if dtypes:
        supported, unsupported = (tuple(d for d in some if d in dtypes) for some in (supported, unsupported))
    else:
        supported = supported[: 1 if quick else 2]
    jobs = [planner.job(case, dtype) for case in planner.cases(suites) for dtype in planner.dtypes_of(case, supported)]
    measured = [Stage(job.title, jobs=(job,), is_case=True) for job in jobs]
    roofs = Stage("roofs", function=stages.roofs)
    return Plan((roofs, *measured), tuple(planner.omissions(suites, supported, unsupported)), unsupported)


def plan_of_minutes(device: torch.device, scale: Scale) -> Plan:
    """What matters most comes first. On a GPU what needs no other compiler should be done in four minutes."""
    return Plan(tuple(_stages_of_minutes(device, scale)))


def _stages_of_minutes(device: torch.device, scale: Scale) -> Iterator[Stage]:
    first, *others = supported_dtypes(device)[0][:2]
    planner = Planner(scale, device, quick=False)
    step = {dtype: _jobs([scale.proxy], dtype) for dtype in (first, *others)}
    yield Stage("roofs", 60, function=stages.roofs)
    tiny = replace(scale.proxy, cell=EVERY_KIND).small()
    for dtype in (first, *others):
        yield Stage(f"tiny cell, {dtype}", 90, _jobs([tiny], dtype, (EAGER,)), stages.tiny_cell)
    yield Stage(f"iteration, {first}", 120, step[first], stages.iteration)
    yield Stage(f"profile, {first}", 60, step[first], profiles.profile)
    if device.type == "cuda":
        yield Stage(f"graph beside calls, {first}", 45, step[first], stages.graph_beside_calls)
        yield Stage(f"cells in flight, {first}", 45, step[first], stages.cells_in_flight)
    yield Stage("loss", 60, _jobs(planner.cases(["loss"]), first))
    for kind, name in ((DepthwiseCase, "depthwise"), (OperationCase, "separable")):
        cases = [case for case in planner.cases(["ops"]) if isinstance(case, kind) and rate_of(case) in FAR_AND_DENSE]
        for shape in dict.fromkeys(case.shape for case in cases):
            yield Stage(f"{name}, {shape}", 75, _jobs([case for case in cases if case.shape == shape], first))
    yield Stage(f"iteration beside eager, {first}", 75, step[first])
    both_grids = _jobs([corners_beside(scale.centres), scale.centres], first, ())
    yield Stage(f"iterations on both grids, {first}", 60, both_grids, stages.both_grids)
    for dtype in others:
        yield Stage(f"iteration, {dtype}", 90, step[dtype], stages.iteration)
        yield Stage(f"profile, {dtype}", 60, step[dtype], profiles.profile)
        yield Stage(f"iteration beside eager, {dtype}", 75, step[dtype])
    if device.type == "cuda":
        yield Stage("tests", 150, function=stages.gpu_tests)
    for compiler, limit_s in ((COMPILE, 120), (COMPILE_MAX, 180)):
        yield Stage(f"iteration beside {compiler.name}", limit_s, _jobs([scale.proxy], first, (EAGER, compiler)))
    if device.type == "cuda":
        yield Stage(f"counters, {first}", 120, step[first], profiles.counters)
    _, new_cell = planner.cases(["proxy"])
    yield Stage("first iteration of new cells", 60, (planner.job(new_cell, first),))
    yield Stage("search", 120, (planner.job(scale.search, first),))
    (caching,) = planner.cases(["features"])
    yield Stage("features", 90, (planner.job(caching, "float32"),))


def corners_beside(centres: ProxyCase) -> ProxyCase:
    """The same iteration on the features that a CNN has of pictures of one pixel more along each side."""
    crop = centres.crop[0] + 1, centres.crop[1] + 1
    return replace(centres, name="iteration, corners", crop=crop, grid=Grid(centres.grid.stride))


def _jobs(cases: Iterable[Case], dtype: DType, others: tuple[Provider, ...] = (EAGER, EAGER_CHANNELS_LAST)) -> tuple[Job, ...]:
    return tuple(Job(case, dtype, (OURS, *others)) for case in cases)


@dataclass(frozen=True)
class Planner:
    """Makes cases from a scale, and jobs from cases."""

    scale: Scale
    device: torch.device
    quick: bool

    def cases(self, suites: Sequence[Suite]) -> Iterator[Case]:
        makers: dict[Suite, Callable[[], Iterator[Case]]] = {
            "proxy": self._proxy,
            "loss": self._loss,
            "search": self._search,
            "features": self._features,
            "study": partial(self.scale.study.cases, self.device),
            "cell": self._cells,
            "ops": self._ops,
        }
        for suite in dict.fromkeys(suites):
            yield from makers[suite]()

    def dtypes_of(self, case: Case, dtypes: Sequence[DType]) -> tuple[DType, ...]:
        """The dtypes of a case: training steps have no loss scaling for float16, and a search chooses its own precision.

        Features are always computed in float32, and a study has no dtype.
        """
        if isinstance(case, CachingCase | StudyCase):
            return ("float32",)
        if isinstance(case, SearchCase):
            return ("bfloat16" if has_fast_bf16(self.device) else "float32",)
        return tuple(dtype for dtype in dtypes if dtype != "float16" or not isinstance(case, ProxyCase))

    def job(self, case: Case, dtype: DType) -> Job:
        """A job, with the providers that take part."""
        if isinstance(case, SearchCase):
            return Job(case, dtype, (OURS, OURS_WITHOUT_KERNELS))
        if isinstance(case, NewCellCase | CachingCase):
            return Job(case, dtype, (OURS, EAGER))
        if isinstance(case, StudyCase):
            beside = case.beside()
            return Job(case, dtype, beside, beside if case.processes == 1 else ())
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
        rates, on_cpu = ", ".join("{}×{}".format(*rate) for rate in FEW_RATES), self.device.type == "cpu"
        if "study" in suites:
            yield from self.scale.study.omissions(self.device)
        for dtype in unsupported:
            yield f"{dtype}: not supported here (the processor has neither AMX nor AVX-512 bf16)"
        if self.quick:
            kept = "and eager channels-last: left out by --quick on a CPU"
            yield "torch.compile " + (kept if on_cpu else "but for the separable convolution: left out by --quick")
            yield "--quick: one map size, rate and grid, the published cell, few rounds; first call and memory of ours alone"
            if "proxy" in suites:
                yield "the first iteration of a new cell: left out by --quick"
            yield from (f"{dtype}: --dtype {dtype} measures it" for dtype in supported_dtypes(self.device)[0][1:] if on_cpu)
            return
        if "float16" in supported:
            yield "float16: not for training steps and searches, which would need loss scaling"
        elif not on_cpu:
            yield "float16: --dtype float16 measures it"
        if {"ops", "cell"}.intersection(suites):
            yield f"torch.compile: at rates {rates}, one grid, the published cell and ASPP only"
            yield f"first call and memory: of the cases that are compiled, at rate {FRESH_RATE[0]}×{FRESH_RATE[1]} alone"
        if "loss" in suites:
            yield "the loss and the confusion matrix on centres: not by torch.compile, no first call and memory"
        if "ops" in suites and on_cpu:
            yield f"16×256×97×97 on a CPU: at rates {rates} and one grid only"

    def _is_compiled(self, case: Case) -> bool:
        if self.quick:
            return self.device.type != "cpu" and isinstance(case, OperationCase) and rate_of(case) is not None
        return self._is_typical(case)

    def _is_typical(self, case: Case) -> bool:
        """Whether the case represents others like it, for measurements that are too slow to do for all."""
        if isinstance(case, OperationCase):
            return case.operation in self._operations(everything=False)
        if isinstance(case, LossCase):
            return case.align_corners
        return not isinstance(case, CellCase) or case.name in ("dpc", "aspp")

    def _operations(self, *, everything: bool) -> list[Operation]:
        """Of the 81 those that the scale has, or a few that represent them."""
        rates = self.scale.rates if everything else self._few_rates()
        grids = self.scale.grids if everything else self.scale.grids[:1]
        return [*map(AtrousSeparableConv, rates), Conv1x1(), *map(PyramidPooling, grids)]

    def _few_rates(self) -> tuple[tuple[int, int], ...]:
        return tuple(rate for rate in FEW_RATES if rate in self.scale.rates) or self.scale.rates

    def _ops(self) -> Iterator[Case]:
        for k, (batch, channels, height, width) in enumerate(self.scale.maps):
            operations = self._operations(everything=k == 0 or self.device.type == "cuda")
            size = map_size(batch, channels, channels, height, width)
            for mode in MODES:
                for operation in operations:
                    yield OperationCase(name=str(operation), mode=mode, operation=operation, **size)
                for rate in self._few_rates():
                    yield DepthwiseCase(name="depthwise {}x{}".format(*rate), mode=mode, rate=rate, **size)

    def _loss(self) -> Iterator[Case]:
        for proxy, kind in ((self.scale.proxy, ""), (self.scale.centres, ", centres")):
            sizes: dict[str, Any] = {"batch": proxy.batch, "num_classes": proxy.num_classes}
            sizes |= {"size": proxy.crop, "label_size": proxy.label_size, "align_corners": proxy.grid.align_corners}
            yield LossCase(name=f"loss and gradient{kind}", mode="training", **sizes)
            yield LossCase(name=f"confusion matrix{kind}", mode="inference", **sizes)

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

    def _features(self) -> Iterator[Case]:
        caching = self.scale.caching
        many = replace(caching, pictures=_PICTURES_OF_A_GPU * caching.pictures)
        yield many if self.device.type == "cuda" else caching


def map_size(batch: int, in_channels: int, channels: int, height: int, width: int) -> dict[str, Any]:
    """The fields of a `MapCase`."""
    return {"batch": batch, "in_channels": in_channels, "channels": channels, "height": height, "width": width}
