"""How each kernel is launched: a table that was counted for an H200, replaced in part by measurements on a GPU.

A file `<gpu>.json` in this folder, written by `python bench/tune.py` on that GPU, has launches for some of the keys; the other
keys use the counted table. The file's name is PyTorch's name of the GPU in small letters, with "_" between words.
"""

import functools
import json
import re
import warnings
from pathlib import Path
from typing import Literal, NamedTuple

import torch


class Launch(NamedTuple):
    """Tile sizes along positions (rows), channels (columns) and the summed axis; warps per program, depth of the pipeline.

    A depthwise program keeps block_p columns of the map, over (N, W), and walks down their rows. A GPU runs `programs` of them
    at once, and the rows are shared out for so many; `registers` and warps decide how many fit a multiprocessor.

    Where there are no positions, block_p counts tiles (`fold`, `sum_partials`), label pixels of a row (`cell_gradients`: of
    all its cells, 32 threads of a warp have one or several each; `confusion_matrix`, `crops`), logits (`gather_corners`),
    values (`sum_gradients`) or programs (`mean_loss`). A program of `confusion_matrix` or `gather_corners` holds all classes:
    the warps of the one, and block_p of the other, are what 32 classes need. `crops` copies rows: block_n counts values of a
    row of features.
    """

    block_p: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    # depthwise: how many run at once; weight gradient: most of them, if positions are split into parts to have more than one
    programs: int = 0
    registers: int = 0  # most per thread; 0: the compiler's choice


Size = Literal["small", "large"]
Key = tuple[str, int, Size]  # kernel, bytes per value of its map (4 where there is none), size
Table = dict[Key, Launch]
SIZES: tuple[Size, Size] = ("small", "large")

# The number of positions N·H·W from which a launch is large: a map of 256 channels is then larger than any cache. For the
# loss, the positions are those of the logits. `sum_partials` counts its columns: few and long, or a weight's, many and short.
LARGE = 1 << 16

# (kernel, bytes per value) -> launch for sizes up to LARGE, and beyond. For an H200, chosen by counting, not measured: 32 or
# fewer values of a map per thread, two programs or more per multiprocessor at 8·49·49 positions, at most 160 KB of shared
# memory. 1×1 products have the tile that takes the fewest instructions and bytes from the L2 cache, with one program per
# multiprocessor if it must be; at full float32 precision, without a matrix unit, smaller ones than in this table. Folds, sums
# and the mean loss wait for memory once per block_p, so that is a large part of what they add up in one iteration.
_COUNTED = {
    # 4 values of a map per thread forward, 2 backward, so that five programs fit each of 132 multiprocessors, or four backward
    # and in float32, which would spill.
    ("depthwise_forward", 2): (Launch(8, 64, 0, 4, 1, 660, 96), Launch(8, 64, 0, 4, 1, 660, 96)),
    ("depthwise_forward", 4): (Launch(8, 64, 0, 4, 1, 528, 128), Launch(8, 64, 0, 4, 1, 528, 128)),
    ("depthwise_backward", 2): (Launch(4, 64, 0, 4, 1, 528, 128), Launch(4, 64, 0, 4, 1, 528, 128)),
    ("depthwise_backward", 4): (Launch(4, 64, 0, 4, 1, 528, 128), Launch(4, 64, 0, 4, 1, 528, 128)),
    ("pointwise_forward", 2): (Launch(64, 256, 64, 4, 2), Launch(64, 256, 64, 4, 2)),
    ("pointwise_forward", 4): (Launch(64, 256, 16, 4, 2), Launch(64, 256, 16, 4, 2)),
    ("pointwise_input_gradient", 2): (Launch(128, 128, 64, 8, 2), Launch(128, 128, 64, 8, 2)),
    ("pointwise_input_gradient", 4): (Launch(128, 128, 32, 8, 2), Launch(128, 128, 32, 8, 2)),
    # 132: one program, whose sums fill half of the registers, for each multiprocessor of an H200.
    ("pointwise_weight_gradient", 2): (Launch(256, 128, 32, 8, 2, 132), Launch(256, 128, 32, 8, 2, 132)),
    ("pointwise_weight_gradient", 4): (Launch(128, 128, 32, 8, 2, 132), Launch(128, 128, 32, 8, 2, 132)),
    ("normalise", 2): (Launch(32, 64, 0, 4, 1), Launch(64, 64, 0, 4, 1)),
    ("normalise", 4): (Launch(32, 64, 0, 4, 1), Launch(64, 64, 0, 4, 1)),
    ("normalise_backward", 2): (Launch(32, 64, 0, 4, 1), Launch(64, 64, 0, 4, 1)),
    ("normalise_backward", 4): (Launch(32, 64, 0, 4, 1), Launch(64, 64, 0, 4, 1)),
    ("sum_gradients", 2): (Launch(2048, 0, 0, 4, 1), Launch(2048, 0, 0, 4, 1)),  # 16 values a thread: two loads of 16 bytes
    ("sum_gradients", 4): (Launch(1024, 0, 0, 4, 1), Launch(1024, 0, 0, 4, 1)),
    ("fold", 4): (Launch(512, 4, 0, 4, 1), Launch(512, 4, 0, 4, 1)),
    ("unfold", 4): (Launch(0, 128, 0, 4, 1), Launch(0, 128, 0, 4, 1)),
    ("sum_partials", 4): (Launch(256, 8, 0, 4, 1), Launch(16, 128, 0, 4, 1)),
    ("cell_gradients", 4): (
        Launch(64, 0, 0, 1, 1),
        Launch(64, 0, 0, 1, 1),
    ),  # 100 registers (Triton 3.8: 121); 128 would take more than 128
    ("mean_loss", 4): (Launch(8192, 0, 0, 16, 1), Launch(8192, 0, 0, 16, 1)),  # more would be spilled
    ("gather_corners", 4): (Launch(64, 0, 0, 4, 1), Launch(64, 0, 0, 4, 1)),
    ("confusion_matrix", 4): (Launch(32, 0, 0, 1, 1), Launch(32, 0, 0, 1, 1)),
    ("crops", 2): (Launch(1024, 2048, 0, 2, 1), Launch(1024, 2048, 0, 2, 1)),  # a program finds its row in 110 instructions
    ("crops", 4): (Launch(1024, 1024, 0, 2, 1), Launch(1024, 1024, 0, 2, 1)),
}
DEFAULT: Table = {
    (kernel, value_bytes, size): launch
    for (kernel, value_bytes), both in _COUNTED.items()
    for size, launch in zip(SIZES, both, strict=True)
}


FOLDER = Path(__file__).parent


class Measured(NamedTuple):
    """A launch that is quicker than the counted one, with the microseconds of all calls in an iteration by either."""

    launch: Launch
    counted_us: float
    us: float


@functools.cache
def table_for(device: torch.device) -> Table:
    """The launch of every kernel on this device; without a GPU (interpreter, compilation only) the counted one."""
    if device.type != "cuda":
        return DEFAULT
    gpu = torch.cuda.get_device_name(device)
    return DEFAULT | {key: entry.launch for key, entry in measured(path_of(gpu), gpu).items()}


def path_of(gpu: str) -> Path:
    """The file of the GPU of this name.

    >>> path_of("NVIDIA H200 MIG 1g.18gb").name
    'nvidia_h200_mig_1g_18gb.json'
    """
    return FOLDER / f"{'_'.join(re.findall(r'[a-z0-9]+', gpu.lower()))}.json"


def measured(path: Path, gpu: str) -> dict[Key, Measured]:
    """What the file says; nothing if there is none. One that is damaged, or not this GPU's, is ignored with a warning."""
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["gpu"] != gpu:
            raise ValueError(f"measured on {content['gpu']}, this is {gpu}")
        table: dict[Key, Measured] = {}
        for entry in content["launches"]:
            key, launch = (entry["kernel"], entry["value_bytes"], entry["size"]), Launch(**entry["launch"])
            if not is_possible(key, launch):
                raise ValueError(f"no launch of {' '.join(map(str, key))}: {launch}")
            table[key] = Measured(launch, float(entry["counted_us"]), float(entry["us"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"{path} is ignored, the counted launches are used ({reason}); see bench/tune.py", stacklevel=2)
        return {}
    return table


def is_possible(key: Key, launch: Launch) -> bool:
    """Whether this is a key of the table and its kernel can be launched so.

    Ranges in Triton are powers of two. What the counted launch has must be there, what it lacks (0) has no meaning.
    """
    if key not in DEFAULT or not all(type(value) is int and value >= 0 for value in launch):
        return False
    has_its_fields = all((value > 0) == (counted > 0) for value, counted in zip(launch, DEFAULT[key], strict=True))
    powers = (launch.block_p, launch.block_n, launch.block_k, launch.warps)
    fits = launch.warps <= 32 and launch.registers <= 255
    return has_its_fields and fits and all(value & (value - 1) == 0 for value in powers)
