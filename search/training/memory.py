"""How much memory the prediction of a picture takes, and how much there is: what cannot fit is refused before it is begun.

Where memory is promised before it is there, the system would end the process instead, without a word.
"""

import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fast.backbone import Backbone
from fast.segmentation import SegmentationNetwork
from search.devices import is_full_memory
from search.errors import InputError
from search.training.tiles import Tiles, least_size

_MEMORY = Path("/proc/meminfo")  # of Linux, as the others
_OWN_MEMORY = Path("/proc/self/statm")
_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")
_SIDES = (2049, 1537, 1025, 769, 513, 385, 257, 193, 129, 97, 65, 49, 33)  # of tiles to propose, at most


class PredictionMemory:
    """The memory that a network's predictions take, of `outputs` numbers a pixel, at these scales and in these tiles."""

    def __init__(
        self, network: SegmentationNetwork, outputs: int, scales: Sequence[float] = (1.0,), tiles: Tiles | None = None
    ) -> None:
        self._device = network.backbone.mean.device
        on_grid = dict.fromkeys(network.backbone.grid.rounded_down((side, side))[0] for side in _SIDES)
        self._sides = [side for side in on_grid if side > 1 and side >= max(least_size(network))]
        self._widest = max(widest_layer(network.backbone), outputs)
        self._outputs, self._scales, self._tiles = outputs, scales, tiles
        self._had = 0.0  # bytes that a prediction took: what is freed need not count as free, but can be had again

    @contextmanager
    def of_picture(self, picture: tuple[int, int], padded: tuple[int, int], name: str) -> Iterator[None]:
        """Inside, a picture of this size, padded to another, is predicted; InputError before or when it does not fit."""
        self._require(picture, padded, name)
        try:
            yield
            self._had = max(self._had, self._needed(padded, self._tiles))
        except (RuntimeError, MemoryError) as error:
            if not is_full_memory(error):
                raise
            largest = max(padded if self._tiles is None else self._tiles.within(padded))
            side = next((side for side in self._sides if side <= largest // 2 + 1), None)
            raise self._refused(picture, name, "more memory than the device has", side) from error

    def free(self) -> int | None:
        """Bytes that there are for a picture; None where that is unknown, as on a GPU what a picture needs is."""
        return free_memory() if self._device.type == "cpu" else None

    def _require(self, picture: tuple[int, int], padded: tuple[int, int], name: str) -> None:
        free = self.free()
        needed = self._needed(padded, self._tiles)
        if free is not None and needed > max(free, self._had):
            side = self._fitting(padded, free / 2)  # half of it, because this is an estimate, and others take memory too
            raise self._refused(picture, name, f"{_gigabytes(needed)} of memory, {free / 1e9:.1f} are free", side)

    def _needed(self, size: tuple[int, int], tiles: Tiles | None) -> float:
        """Bytes for a picture that is padded to this size."""
        tile = size if tiles is None else tiles.within(size)
        at_once = _layers(tile, self._widest) * max(1.0, *self._scales) ** 2
        if tile == size:
            return at_once
        band = 4 * tile[0] * size[1] * (2 * self._outputs + 2)  # rows of tiles, a copy of those under way, and the prediction
        return at_once + band + 12 * size[0] * size[1]  # picture, label and prediction

    def _fitting(self, size: tuple[int, int], memory: float) -> int | None:
        """The side of the largest tiles that need no more than this memory; None if none do."""
        sides = (side for side in self._sides if side < max(size))
        return next((side for side in sides if self._needed(size, Tiles((side, side))) <= memory), None)

    def _refused(self, picture: tuple[int, int], name: str, needs: str, side: int | None) -> InputError:
        remedy = "free memory, or give a smaller one" if side is None else f"give `tile_size` {side} {side}"
        scales = ", or fewer or smaller `scales`" if len(self._scales) > 1 or max(self._scales) > 1 else ""
        return InputError(f"picture {name} of {picture[0]} × {picture[1]} pixels needs {needs}: {remedy}{scales}")


@contextmanager
def features_in_memory(backbone: Backbone, size: tuple[int, int], most: int) -> Iterator[int]:
    """Inside, features of pictures of this size are computed, at once as many as are yielded: `most`, or as many as fit.

    Raises InputError before or when a single one does not fit.
    """

    def refused(needs: str) -> InputError:
        remedy = "cut pictures and labels into parts, such as 1024 × 1024, or free memory"
        return InputError(f"features of pictures of {size[0]} × {size[1]} pixels need {needs}: {remedy}")

    free = free_memory() if backbone.mean.device.type == "cpu" else None
    needed = _layers(size, widest_layer(backbone))
    if free is not None and needed > free:
        raise refused(f"{_gigabytes(needed)} of memory, {free / 1e9:.1f} are free")
    try:
        yield most if free is None else min(most, int(free / needed))
    except (RuntimeError, MemoryError) as error:
        if not is_full_memory(error):
            raise
        raise refused("more memory than the device has") from error


def _layers(size: tuple[int, int], widest: float) -> float:
    """Bytes that a network takes of which no layer has more than `widest` numbers a pixel.

    They are the picture before and after normalisation, and the widest layer or the outputs twice: libraries of convolutions
    copy their maps (MobileNet-v2 was measured to take 1.6 times its widest layer), and softmax does.
    """
    return 4 * size[0] * size[1] * (6 + 2 * widest)


def _gigabytes(count: float) -> str:
    return f"about {count / 1e9:.1f} GB"


def free_memory() -> int | None:
    """Bytes that the system, control groups and the limit of addresses still leave to this process; None if unknown."""
    if not _MEMORY.is_file():
        return None
    free = [1024 * int(_MEMORY.read_text().split("MemAvailable:")[1].split()[0]), *_left_in_groups()]
    addresses, _ = resource.getrlimit(resource.RLIMIT_AS)
    if addresses != resource.RLIM_INFINITY and _OWN_MEMORY.is_file():
        free.append(addresses - int(_OWN_MEMORY.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE"))
    return max(0, min(free))


def _left_in_groups() -> Iterator[int]:
    """What is left in each control group that limits this process's memory, as containers do; caches of files give way."""
    for line in _text(_OWN_GROUPS).splitlines():
        _, controllers, own = line.split(":", 2)
        if not controllers:  # version 2
            root, limit, taken, cached = _GROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, taken = _GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        place = root / own.lstrip("/")
        for group in (place, *place.parents[: len(place.relative_to(root).parts)]):  # one that a container hides has no files
            if (most := _text(group / limit)).isdigit():  # otherwise it says "max"
                statistics = dict(entry.split() for entry in _text(group / "memory.stat").splitlines())
                yield int(most) - int(_text(group / taken) or 0) + int(statistics.get(cached, 0))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def widest_layer(backbone: Backbone) -> float:
    """How many numbers for each pixel the widest layer of the backbone reads and gives, counted on a small picture."""
    (height, width), counts = backbone.grid.nearest((129, 129)), [0]

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        counts.append(sum(each.numel() for each in (*inputs, output) if isinstance(each, Tensor)))

    layers = (module for module in backbone.body.modules() if not list(module.children()))
    handles = [layer.register_forward_hook(count) for layer in layers]
    try:
        with torch.no_grad():
            backbone(torch.zeros(1, 3, height, width, device=backbone.mean.device))
    finally:
        for handle in handles:
            handle.remove()
    return max(counts) / (height * width)
