"""Caching the features of pictures as a case: from files to files, beside the backbone alone on pictures in memory."""

import atexit
import functools
import shutil
import threading
import weakref
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from bench.cases import CPU, IN_FLOAT64, SEED, Case, Parts, Provider, Suite, Workload, draw_labels, normal
from bench.costs import Mode
from fast.backbone import Backbone, timm_backbone
from search.datasets import Dataset, open_dataset
from search.settings import FeatureSettings, MachineSettings
from search.tasks.feature_cache import FeatureCache, build_cache, caches_of

_CLASSES = 19
_BATCH = 8  # pictures at once, as `build_cache` takes them
_DESCRIPTION = """\
classes = [{classes}]
images = "{{split}}/{{name}}.jpg"
labels = "{{split}}/{{name}}.png"
[splits.train]
"""


@dataclass(frozen=True, kw_only=True)
class CachingCase(Case):
    """Ours: read pictures (JPEG) and labels (PNG), compute a ViT's features, and write them, as a search does at its start.

    PyTorch's own: the forward passes alone, one after the other, of the same batches, which are in the device's memory.
    """

    suite: Suite = "features"
    name: str = "caching a ViT-S"
    mode: Mode = "inference"
    pictures: int
    size: tuple[int, int] = (512, 512)
    model: str = "vit_small_patch16_224"

    @property
    def shape(self) -> str:
        return f"{self.pictures} pictures of {self.size[0]}×{self.size[1]}"

    def cost(self, element_bytes: int) -> None:
        return None

    def small(self) -> Self:
        return replace(self, pictures=3, size=(64, 48))

    def workload(self, provider: Provider, dtype: str, device: torch.device) -> Workload:
        return _Caching(self, device) if provider.is_ours else _ForwardPasses(self, provider, device)

    def backbone(self) -> Backbone:
        """The model with random weights, the same ones for everybody."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            return timm_backbone(self.model).eval()

    def dataset(self) -> Dataset:
        """The pictures on disk, which are drawn once in each process."""
        return open_dataset(str(_folder(self.pictures, self.size) / "set.toml"), "train", None)


class _Caching(Workload):
    def __init__(self, case: CachingCase, device: torch.device) -> None:
        self._dataset, self._backbone, self._device = case.dataset(), case.backbone(), str(device)
        tqdm.set_lock(threading.RLock())  # its own is one of processes, which a worker that is killed would leave behind
        folder = mkdtemp(prefix="bench-features-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        machine = MachineSettings(device=self._device, cache_dir=Path(folder))
        both = self._dataset, self._dataset  # of which one cache is made
        settings = FeatureSettings(image_size=case.size)
        self._cache: FeatureCache = caches_of(*both, self._backbone, settings, machine, "bench/run.py")["train"]

    def __call__(self) -> None:
        directory, identity = self._cache.directory, self._cache.identity
        shutil.rmtree(directory)
        self._cache = build_cache(directory, self._dataset, self._backbone, identity, self._device, "bench/run.py")

    def parts(self) -> Parts:
        return {"output": [self._cache.features.clone()]}


class _ForwardPasses(Workload):
    def __init__(self, case: CachingCase, provider: Provider, device: torch.device) -> None:
        dtype = torch.float64 if provider == IN_FLOAT64 else torch.float32
        dataset, self._backbone = case.dataset(), case.backbone().to(device, dtype)
        images = np.stack([dataset[i].image for i in range(case.pictures)])  # (N, H, W, 3)
        pictures = torch.from_numpy(images).permute(0, 3, 1, 2).to(device, dtype).contiguous()
        self._batches = [pictures[start : start + _BATCH] for start in range(0, case.pictures, _BATCH)]
        self._features: list[Tensor] = []

    @torch.inference_mode()
    def __call__(self) -> None:
        self._features = [self._backbone(batch).half() for batch in self._batches]

    def parts(self) -> Parts:
        return {"output": [torch.cat(self._features).clone()]}

    def drop(self) -> None:
        self._features = []


@functools.lru_cache(maxsize=2)
def _folder(count: int, size: tuple[int, int]) -> Path:
    """A folder of so many pictures, which lives with the process: smooth colours and some noise, about 1.4 bits a pixel."""
    folder = Path(mkdtemp(prefix="bench-pictures-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    split = folder / "train"
    split.mkdir()
    (folder / "set.toml").write_text(_DESCRIPTION.format(classes=", ".join(f'"{k}"' for k in range(_CLASSES))))
    labels = draw_labels((count, *size), _CLASSES, CPU).numpy()
    for number in range(count):
        coarse = normal((1, 3, 8, 8), SEED + number)
        smooth = torch.nn.functional.interpolate(coarse, size, mode="bicubic")[0]
        pixels = (128 + 40 * smooth + 4 * normal((3, *size), SEED - number - 1)).clamp(0, 255).to(torch.uint8)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(split / f"{number:04}.jpg", quality=90)
        Image.fromarray(labels[number]).save(split / f"{number:04}.png")
    return folder
