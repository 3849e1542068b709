"""The C++ kernels under AddressSanitizer and UBSan, called with drawn shapes: dies at the first access outside of a tensor.

    python -m tests.fast.kernels.sanitized --rounds 1000 --seed 1

The process starts itself anew with the sanitizers preloaded, since all memory must be theirs: what lies before and after a
tensor is then forbidden. Needs g++ with its sanitizer libraries. Results are not looked at; the other tests do that.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from ctypes import CDLL
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fast.kernels import Dropout, NormedMap, Unfolded, cpp
from fast.kernels.cpp import build

FLAGS = ["-O1", "-g", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
CHECKS = ["-D_GLIBCXX_ASSERTIONS", "-D_GLIBCXX_SANITIZE_VECTOR"]  # indices of std::vector, and what it has in reserve
SIZES = (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 49, 70)  # around the lengths of vectors and tiles


class MissingSanitizers(Exception):
    """The compiler, or one of its libraries, is not there."""


def environment() -> dict[str, str]:
    """What a process needs to run the sanitizers' build; raises MissingSanitizers."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise MissingSanitizers("no g++")
    libraries = []
    for name in ("libasan.so", "libubsan.so", "libstdc++.so"):  # the last one, for libasan looks for its functions
        found = subprocess.run([compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True)
        path = Path(found.stdout.strip())
        if not path.is_absolute() or path.read_bytes()[:4] != b"\x7fELF":  # else it is the name alone, or a linker's script
            raise MissingSanitizers(f"{compiler} has no {name} that can be preloaded")
        libraries.append(str(path))
    return os.environ | {
        "CXX": compiler,
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and PyTorch leave much to the end of the process
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # the structs of ctypes too
    }


class Recorded:
    """The library, and the names of what was called in it."""

    def __init__(self, library: CDLL) -> None:
        self.library, self.called = library, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.called.add(name)
        return getattr(self.library, name)


def exported() -> set[str]:
    source = (build.FOLDER / "kernels.cpp").read_text(encoding="utf-8")
    names = re.findall(r"EXPORT \w+ (\w+)_##SUFFIX(##_##LABEL_SUFFIX)?\(", source)
    suffixes = {"": ("f32", "f64"), "##_##LABEL_SUFFIX": ("f32_u8", "f32_i64", "f64_u8", "f64_i64")}
    return {f"{name}_{suffix}" for name, labels in names for suffix in suffixes[labels]}


class Inputs:
    """Draws shapes and tensors of one dtype."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.dtype = self.one_of(torch.float32, torch.float64)
        self.batch = self.one_of(1, 2, 3, 40) if rng.random() < 0.2 else 1
        self.height, self.width = self.one_of(*SIZES), self.one_of(*SIZES)

    def one_of(self, *values: Any) -> Any:
        return values[self.rng.integers(len(values))]

    def yes(self) -> bool:
        return bool(self.rng.integers(2))

    def channels(self) -> int:
        return int(self.rng.integers(257, 300) if self.rng.random() < 0.05 else self.rng.integers(1, 41))

    def tensor(self, *shape: int) -> Tensor:
        values = self.rng.standard_normal(shape) * self.one_of(0.1, 1.0, 30.0, 1e4)
        if values.size and self.rng.random() < 0.1:
            values.flat[self.rng.integers(values.size)] = self.one_of(np.nan, np.inf, -np.inf, 1e30)
        return torch.from_numpy(values).to(self.dtype)

    def map(self, channels: int) -> NormedMap:
        raw = self.tensor(self.batch, channels, self.height, self.width)
        return NormedMap(raw, self.tensor(channels), self.tensor(channels)) if self.yes() else NormedMap(raw)

    def unfolded(self, channels: int) -> Unfolded | None:
        return Unfolded(*(self.tensor(channels) for _ in range(4))) if self.yes() else None

    def dropout(self) -> Dropout | None:
        seed = torch.from_numpy(self.rng.integers(2**63 - 1, size=1))
        return Dropout(self.one_of(0.1, 0.5, 1.0), seed) if self.yes() else None

    def rate(self) -> tuple[int, int]:
        return (
            self.one_of(1, 2, 6, max(1, self.height - 1), self.height, self.height + 1, 10**6, 2**63 - 1),
            self.one_of(1, 2, 6, max(1, self.width - 1), self.width, self.width + 1, 10**6, 2**63 - 1),
        )

    def band(self, rows: int, columns: int) -> Tensor:
        """As of a resize or a pooling: zero but for a few columns of each row, and in places a row of zeros."""
        matrix = self.tensor(rows, columns)
        first = torch.from_numpy(self.rng.integers(columns + 1, size=(rows, 1)))
        place = torch.arange(columns)
        return matrix.where((place >= first) & (place < first + self.one_of(1, 2, columns)), 0.0)


def depthwise(draw: Inputs) -> None:
    channels = draw.channels()
    x, weight, rate = draw.map(channels), draw.tensor(channels, 1, 3, 3), draw.rate()
    out, _ = cpp.depthwise_forward(x, weight, rate, statistics=draw.yes())
    cpp.depthwise_backward(draw.tensor(*out.shape), out, draw.unfolded(channels), x, weight, rate, need_input=draw.yes())


def pointwise(draw: Inputs) -> None:
    maps = [draw.map(draw.channels()) for _ in range(draw.one_of(1, 1, 2, 5))]
    in_channels, channels, dropout = sum(x.raw.shape[1] for x in maps), draw.channels(), draw.dropout()
    weight, norm = draw.tensor(channels, in_channels, 1, 1), (draw.tensor(channels), draw.tensor(channels))
    out, _ = cpp.pointwise_forward(maps, weight, dropout, statistics=draw.yes())
    cpp.pointwise_inference(maps, weight, norm)
    needed = [draw.yes() for _ in maps]
    cpp.pointwise_backward(draw.tensor(*out.shape), out, draw.unfolded(channels), maps, weight, dropout, need_input=needed)


def planes(draw: Inputs) -> None:
    channels, first = draw.channels(), int(draw.rng.integers(30))
    x = draw.map(channels)
    value = cpp.normalise(x, draw.dropout(), first=first, channels=first + channels + 3)
    cpp.normalise_backward(draw.tensor(*value.shape), x)
    cpp.plane_product(x, draw.band(draw.one_of(*SIZES), draw.height), draw.band(draw.one_of(*SIZES), draw.width))


def labels(draw: Inputs) -> None:
    """Maps of labels smaller than the logits, larger, and empty; ignored, and at times foreign."""
    classes, ignored = draw.channels(), draw.one_of(255, 0)
    logits = draw.tensor(draw.batch, classes, draw.height, draw.width)
    size = draw.one_of(0, 4 * draw.height - 3, *SIZES), draw.one_of(0, 4 * draw.width - 3, *SIZES)
    wrong = draw.rng.random() < 0.2
    values = draw.rng.integers(classes + 1 if wrong else classes, size=(draw.batch, *size))
    values[draw.rng.random(values.shape) < draw.one_of(0.0, 0.3, 1.0)] = ignored
    target = torch.from_numpy(values)
    if draw.yes() and classes < 256:
        target = target.to(torch.uint8)
    elif wrong:
        target = torch.where(target == classes, draw.one_of(-1, -(2**63), 2**63 - 1, 2**32, classes), target)
    weighted = partial(cpp.upsampled_cross_entropy, class_weights=draw.tensor(classes))
    for compute in (cpp.upsampled_cross_entropy, weighted, cpp.upsampled_confusion_matrix):
        try:
            compute(logits, target, ignored, align_corners=draw.yes())
        except ValueError:
            assert wrong, "labels in range were refused"


def read_beyond_a_tensor() -> None:
    """One value less than the kernel reads: the sanitizers' alarm must go off."""
    cpp.depthwise_forward(NormedMap(torch.ones(1, 3, 5, 5)), torch.ones(3 * 9 - 1), (1, 1), statistics=False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--read-beyond-a-tensor", action="store_true", help="to see that the alarm works")
    arguments = parser.parse_args()
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):
        os.execve(sys.executable, [sys.executable, "-m", "tests.fast.kernels.sanitized", *sys.argv[1:]], environment())
    build.FLAGS += FLAGS + CHECKS  # a library of its own in the cache: flags are part of its name
    library = build.library()
    assert not isinstance(library, str), f"the sanitizers' build does not load: {library}"
    recorded = Recorded(library)
    build.library = lambda: recorded  # type: ignore[assignment]
    if arguments.read_beyond_a_tensor:
        read_beyond_a_tensor()
    for seed in range(arguments.seed, arguments.seed + arguments.rounds):
        rng = np.random.default_rng(seed)
        torch.set_num_threads(int(rng.integers(1, 4)))
        for calls in (depthwise, pointwise, planes, labels):
            print(f"seed {seed}, {calls.__name__}", file=sys.stderr)
            calls(Inputs(rng))
    missing = exported() - recorded.called
    assert not missing, f"never called: {sorted(missing)}"
    print(f"{len(recorded.called)} kernels, {arguments.rounds} rounds: no error")


if __name__ == "__main__":
    main()
