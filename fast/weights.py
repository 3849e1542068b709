"""Weights from other files into a module: found by their names, whatever stands before them.

A training wraps its state dict in a mapping, and its network in others, which put a prefix before every name. That part of the
file is taken whose names, less a prefix, are all that the module has. Any prefix will do, such as `module.backbone.`; a part
that lacks a name, has more of them, or has other shapes is refused, and so are two that fit equally well and differ.
"""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from fast.weights_file import WeightsFileError, describe_unusable, read_states

# Which part is taken of those that fit. Averaged weights come first, as in timm: they are what is meant to be used.
PREFERRED = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema"),
    *("state_dict", "model_state_dict", "model_state", "model", "network", "net"),
)

_INSERTED = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # by PyTorch, anywhere in a name
_NOT_FEATURES = frozenset(
    ("head", "heads", "classifier", "fc", "neck", "decoder", "decode_head", "auxiliary_head", "aux_classifier", "aux_head")
)
_LEFT_BY_THOP = (".total_ops", ".total_params")  # in every module that it has counted
_COUNTER = "num_batches_tracked"  # of a batch norm; files from before PyTorch 0.4.1 lack it


@dataclass(frozen=True)
class Wanted:
    """The tensors of a module, by name; `aliases` leads from other names that files have for them to these.

    `others` are names that may stand beside them, as those of a classifier; so may all of parts that are called like a head.
    """

    of: str  # whose tensors these are, for errors
    tensors: Mapping[str, Tensor]
    aliases: Mapping[str, str] = field(default_factory=dict)
    others: Collection[str] = ()

    @property
    def names(self) -> dict[str, str]:
        """From each name that a file may have for a tensor to our own."""
        return {**self.aliases, **{key: key for key in self.tensors}}

    @property
    def other_parts(self) -> frozenset[str]:
        """Submodules whose tensors are not wanted, whatever their names."""
        return (_NOT_FEATURES | {_part(key) for key in self.others}) - {_part(key) for key in self.names}


@dataclass(frozen=True)
class _Fit:
    """How a part of a file, less a prefix, fits what is wanted."""

    place: str
    prefix: str
    found: dict[str, Tensor]
    problems: dict[str, list[str]]  # the names, by what is wrong with them

    @property
    def is_whole(self) -> bool:
        return not any(self.problems.values())

    @property
    def rank(self) -> int:
        """Of the place, in the order that is preferred."""
        return min((PREFERRED.index(part) for part in self.place.split(".") if part in PREFERRED), default=len(PREFERRED))

    @property
    def distance(self) -> tuple[int, bool, int, int]:
        """The less, the better it fits."""
        unknown = len(self.problems["has unknown"])
        return sum(map(len, self.problems.values())) - unknown, unknown > 0, self.rank, unknown

    def __str__(self) -> str:
        place, prefix = repr(self.place) * bool(self.place), f"names behind {self.prefix!r}" * bool(self.prefix)
        return " with ".join(filter(None, (place, prefix))) or "the file itself"


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Load a file into a module, whatever training wrote it: safetensors or PyTorch, wrapped or with a prefix to all names.

    Numbers of another precision become the module's. Raises WeightsFileError for a file without usable weights, and ValueError
    for one that does not fit; the module then keeps those that it has.
    """
    module.load_state_dict(read_fitting(Path(path), Wanted(type(module).__name__, module.state_dict())))


def read_fitting(path: Path, wanted: Wanted) -> dict[str, Tensor]:
    """All tensors that are wanted, of their shapes and types, from the file's part that fits. Raises as `load_weights`."""
    states = read_states(path)
    fits = [_fit(place, prefix, state, wanted) for place, state in states.items() for prefix in _prefixes(state, wanted)]
    best = min(fits, key=lambda fit: fit.distance)
    if not best.is_whole:
        problems = (f"{problem} {len(keys)} keys, first {keys[0]!r}" for problem, keys in best.problems.items() if keys)
        place = f"in {best}, " * bool(best.place or best.prefix)
        raise ValueError(f"weights file {path} is not of {wanted.of}: {place}it {', '.join(problems)}")
    equals = [fit for fit in fits if fit.distance == best.distance and fit is not best]
    rivals = [fit for fit in equals if not _is_same(fit.found, best.found)]
    if rivals:
        raise ValueError(
            f"weights file {path} has several parts that fit {wanted.of}, {' and '.join(map(str, [best, *rivals]))}: save the "
            "one to use in a file of its own"
        )
    converted = {key: value.to(wanted.tensors[key].dtype) for key, value in best.found.items()}
    unusable = describe_unusable(converted)
    if unusable is not None:
        raise WeightsFileError(f"weights file {path} has {unusable}")
    return {**wanted.tensors, **converted}  # counters that the file lacks are the module's


def _prefixes(state: Mapping[str, Tensor], wanted: Wanted) -> list[str]:
    """The prefixes behind which most of the wanted names stand in a state dict; "" where few do behind any."""
    names, counts = wanted.names, Counter[str]()
    for key in map(_without_insertions, state):
        parts = key.split(".")
        for i in range(len(parts)):
            name = ".".join(parts[i:])
            if name in names and not name.endswith(_COUNTER):
                counts[key.removesuffix(name)] += 1
    most = max(counts.values(), default=0)
    return [prefix for prefix, count in counts.items() if count == most] if 2 * most > len(wanted.tensors) else [""]


def _fit(place: str, prefix: str, state: Mapping[str, Tensor], wanted: Wanted) -> _Fit:
    names = wanted.names
    behind = {_without_insertions(key): value for key, value in state.items()}
    behind = {key.removeprefix(prefix): value for key, value in behind.items() if key.startswith(prefix)}
    found = {names[key]: value for key, value in behind.items() if key in names}
    others, other_parts = {*names, *wanted.others}, wanted.other_parts
    unknown = [key for key in behind if not (key in others or _part(key) in other_parts)]
    problems = {
        "lacks": [key for key in wanted.tensors if key not in found and not key.endswith(_COUNTER)],
        "has unknown": [key for key in unknown if not f".{key}".endswith(_LEFT_BY_THOP)],
        "has other shapes for": [key for key, value in found.items() if value.shape != wanted.tensors[key].shape],
        "has no plain numbers for": [key for key, value in found.items() if not _is_plain(value, wanted.tensors[key])],
    }
    return _Fit(place, prefix, found, problems)


def _is_same(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(value, others[key]) for key, value in some.items())


def _is_plain(value: Tensor, wanted: Tensor) -> bool:
    """Whether a tensor can be copied: it has values, in strides, floating-point ones where such are wanted."""
    is_dense = value.layout == wanted.layout and not (value.is_meta or value.is_quantized)
    return is_dense and value.is_floating_point() == wanted.is_floating_point()


def _without_insertions(key: str) -> str:
    for inserted in _INSERTED:
        key = key.replace(inserted, "")
    return key


def _part(key: str) -> str:
    return key.split(".")[0]
