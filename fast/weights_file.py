"""Files of weights as people have them: the state dicts in one, read without running code from it.

A PyTorch file is a pickle, which may name any class or function to be called. Here none is looked up but PyTorch's own for
tensors: whatever else the pickle names, such as the arguments of a training, becomes an object that does nothing. So most
files that hold more than weights can be read, and none can do harm.
"""

import json
import pickle
import pickletools
import shlex
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch
from torch import Tensor

OWN_FORMATS = "dense-prediction-cell"  # what the formats of this project's own files begin with

_DEPTH = 3  # of state dicts inside mappings, such as {"ema": {"module": {...}}}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # in the first pickle
_LEGACY_PICKLES = 4  # before PyTorch 1.6: magic number, protocol, system, content; the tensors' numbers follow

_BEGINNINGS = (
    (b"version https://git-lfs", "is a pointer of Git LFS and not the file itself: fetch that by `git lfs pull`"),
    (b"<", "is a web page, as a failed download leaves it: download it again"),
    (b"{", "is JSON, such as the index of a checkpoint in several shards: save its state dict as one file"),
    (b"\x1f\x8b", "is compressed by gzip: unpack it"),
    (b"\x89HDF", "is HDF5, as Keras writes it: export the weights as a PyTorch state dict"),
    (b"\x93NUMPY", "is a NumPy array: save a mapping from names to tensors by torch.save"),
)
_TENSORFLOW = "is part of a TensorFlow checkpoint: only whole networks of DeepLab can be converted (docs/checkpoints.md)"
_ENDINGS = (
    (".onnx", "is an ONNX model: give the state dict of the PyTorch model that it was exported from"),
    (".tflite", "is a TensorFlow Lite model: export the weights as a PyTorch state dict"),
    (".pb", "is a TensorFlow graph: export the weights as a PyTorch state dict"),
    (".index", _TENSORFLOW),
    (".meta", _TENSORFLOW),
    *((f".data-00000-of-{shards:05}", _TENSORFLOW) for shards in (1, 2)),
)
_ARCHIVES = (  # the end of a name in a zip archive, and what the archive then is
    ("constants.pkl", "is a TorchScript archive: keep its tensors alone by {line}"),
    ("archive_format", "is a program of torch.export: give the state dict of the model that it was exported from"),
    (".weights.h5", "is a model of Keras: export the weights as a PyTorch state dict"),
    (".npy", "is NumPy arrays (.npz): save a mapping from names to tensors by torch.save"),
)


class WeightsFileError(ValueError):
    """A file of weights is absent, cannot be read, or holds no usable numbers; no backbone is to blame."""


class _Inert:
    """Stands for an object of a class that is no tensor's: it keeps what was to be its state, and does nothing."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        pass

    def __new__(cls, *arguments: Any) -> "_Inert":
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    @property
    def is_module(self) -> bool:
        """Whether its class is an `nn.Module`, as its state shows."""
        return isinstance(self.state, dict) and "_modules" in self.state


def read_states(path: Path) -> dict[str, dict[str, Tensor]]:
    """All state dicts in a safetensors or PyTorch file, on the CPU, by their places such as "state_dict" or "ema.module".

    The place of a file that is itself a state dict is "". Raises WeightsFileError, which names the file and says what it is.
    """
    content = _read(path)
    states = dict(_states(content, ""))
    if states:
        return states
    modules = [each for each in _values(content) if isinstance(each, _Inert) and each.is_module]
    if modules:
        raise WeightsFileError(
            f"weights file {path} holds a whole {type(modules[0]).__name__}, which cannot be read without running code from "
            f"it: if you trust it, keep its tensors alone by {_line_that_converts(path)}"
        )
    raise WeightsFileError(f"weights file {path} holds no state dict (a mapping from names to tensors)")


def describe_unusable(tensors: Mapping[str, Tensor]) -> str | None:
    """Which tensors have NaN or infinite values, or variances below 0; None if all can be used.

    >>> describe_unusable({"a": torch.ones(2), "b": torch.tensor([1.0, float("nan")])})
    "NaN in 1 of 2 tensors, first 'b'"
    """
    variances = {key: value for key, value in tensors.items() if key.split(".")[-1] == "running_var"}
    faults: tuple[tuple[str, Mapping[str, Tensor], Callable[[Tensor], Tensor]], ...] = (
        ("NaN", tensors, torch.isnan),
        ("infinite numbers", tensors, torch.isinf),
        ("variances below 0", variances, lambda value: value < 0),
    )
    for what, among, holds in faults:
        keys = [key for key, value in among.items() if value.is_floating_point() and holds(value).any()]
        if keys:
            return f"{what} in {len(keys)} of {len(tensors)} tensors, first {keys[0]!r}"
    return None


def _read(path: Path) -> Any:
    try:
        described = _describe_other(path)
        if described is not None:
            raise WeightsFileError(f"weights file {path} {described}")
        if _is_safetensors(_beginning(path)):
            return _read_safetensors(path)
        with path.open("rb") as file:
            return _read_pickles(file)
    except (ImportError, WeightsFileError):  # the former of safetensors
        raise
    except PermissionError as error:
        raise WeightsFileError(f"weights file {path} cannot be read: {error.strerror}") from error
    except pickle.UnpicklingError as error:  # PyTorch's own message is long, and would advise weights_only=False
        raise WeightsFileError(
            f"weights file {path} cannot be read without running code from it: if you trust it, keep its tensors alone by "
            f"{_line_that_converts(path)}"
        ) from error
    except Exception as error:  # an unknown file can fail to load in any way
        raise WeightsFileError(f"weights file {path} cannot be read as safetensors or as a PyTorch state dict") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open  # imported here: the modules themselves need PyTorch and NumPy alone

    with safe_open(path, framework="pt") as file:
        if (file.metadata() or {}).get("format", "").startswith(OWN_FORMATS):  # which also say how a backbone pads
            raise WeightsFileError(f"weights file {path} is of this project: `load_backbone` reads the backbone of a network")
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping


def _read_pickles(file: BinaryIO) -> Any:
    """What a PyTorch file holds, with objects that do nothing for all that PyTorch itself does not allow to be named.

    Raises UnpicklingError for what PyTorch refuses to read even so: names in `os` or `sys`, and other protocols than its own.
    """
    stand_ins: list[Any] = [(type(name.rpartition(".")[2], (_Inert,), {}), name) for name in _names_in_pickles(file)]
    file.seek(0)
    with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the pickle's protocol; what cannot be read is an error
        return torch.load(file, map_location="cpu", weights_only=True)


def _names_in_pickles(file: BinaryIO) -> set[str]:
    """Classes and functions that a PyTorch file names, such as "argparse.Namespace". Raises ValueError for another file."""
    if not zipfile.is_zipfile(file):
        file.seek(0)
        return {name for _ in range(_LEGACY_PICKLES) for name in _names_in_pickle(file)}
    with zipfile.ZipFile(file) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        return {name for pickled in pickles for name in _names_in_pickle(BytesIO(archive.read(pickled)))}


def _names_in_pickle(file: IO[bytes]) -> Iterator[str]:
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":
            module, name = str(argument).split(" ", 1)
            yield f"{module}.{name}"
            # Pickles of PyTorch's protocol have Python 2's names, as `__builtin__ xrange`, and most are read as Python 3's.
            yield ".".join(NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name)))


def _states(content: Any, place: str, depth: int = _DEPTH) -> Iterator[tuple[str, dict[str, Tensor]]]:
    if isinstance(content, Mapping) and depth >= 0:
        named = {key: value for key, value in content.items() if isinstance(key, str)}
        tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
        if tensors:
            yield place, tensors
        for key, value in named.items():
            yield from _states(value, f"{place}.{key}" if place else key, depth - 1)


def _values(content: Any) -> list[Any]:
    """The content, and what it maps to if it is a mapping."""
    return [content, *(content.values() if isinstance(content, Mapping) else ())]


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(512)


def _is_safetensors(beginning: bytes) -> bool:
    """Whether a file begins as the format does: with the length of a JSON object, in 8 bytes, and that object."""
    return beginning[8:9] == b"{" and int.from_bytes(beginning[:8], "little") < 100_000_000  # the format's own limit


def _describe_other(path: Path) -> str | None:
    """What a file is, if it is no file of PyTorch or safetensors; the end of a sentence."""
    if path.is_dir():
        files = sorted(each.name for end in ("safetensors", "bin", "pth", "pt") for each in path.glob(f"*.{end}"))
        return "is a folder: give a file in it" + (f", such as {files[0]}" if files else "")
    if not path.is_file():
        is_prefix = path.with_name(f"{path.name}.index").is_file()
        return _TENSORFLOW.replace("is part of", "is the name of") if is_prefix else "does not exist"
    beginning = _beginning(path)
    if not beginning:
        return "cannot be read: it is empty"
    if _is_safetensors(beginning):
        return None
    by_name = next((words for ending, words in _ENDINGS if path.name.endswith(ending)), None)
    return by_name or _describe_beginning(beginning) or _describe_zip(path)


def _describe_beginning(beginning: bytes) -> str | None:
    if beginning[257:262] == b"ustar":
        return "is a tar archive: unpack it"
    if beginning.startswith(b"\x80") and _LEGACY_MAGIC not in beginning:
        return "cannot be read: it is a pickle of another program than torch.save, which is to write a mapping of tensors"
    return next((words for begun, words in _BEGINNINGS if beginning.startswith(begun)), None)


def _describe_zip(path: Path) -> str | None:
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    for ending, words in _ARCHIVES:
        if any(name.endswith(ending) for name in names):
            return words.format(line=_line_that_converts(path))
    return None if any(name.endswith("/data.pkl") for name in names) else "is a zip archive: unpack it"


def _line_that_converts(path: Path) -> str:
    """What a user may type: it runs the code in the file, and writes its tensors beside it."""
    source, target = (json.dumps(str(each), ensure_ascii=False) for each in (path, path.with_name(f"{path.stem}_tensors.pth")))
    keep = (
        'keep = lambda x: x.state_dict() if hasattr(x, "state_dict") else x if isinstance(x, torch.Tensor) else '
        "{k: keep(v) for k, v in x.items()} if isinstance(x, dict) else None"
    )
    load = f'torch.load({source}, map_location="cpu", weights_only=False)'
    return f"python -c {shlex.quote(f'import torch; {keep}; torch.save(keep({load}), {target})')}"
