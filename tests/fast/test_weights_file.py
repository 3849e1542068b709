import argparse
import contextlib
import gzip
import pickle
import subprocess
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from safetensors.torch import save_file
from torch import Tensor, nn

from fast import checkpoint
from fast.backbone import plain_backbone
from fast.dense_prediction_cell import DensePredictionCell
from fast.segmentation import SegmentationHead, SegmentationNetwork
from fast.weights_file import WeightsFileError, describe_unusable, read_states
from reference.cell import Cell
from tests.strategies import rng_seeds

STATE = {"conv.weight": torch.arange(6.0).view(1, 2, 3, 1), "bn.num_batches_tracked": torch.tensor(7)}


def written(folder: Path, content: Any, suffix: str = ".pth", **options: Any) -> Path:
    path = folder / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path, **options)
    return path


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor] = STATE) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth", "pytorch_model.bin", "weights"])
@pytest.mark.parametrize("is_safetensors", [False, True])
def test_a_file_is_what_is_in_it_whatever_its_name(tmp_path: Path, name: str, is_safetensors: bool) -> None:
    path = tmp_path / name
    if is_safetensors:
        save_file(STATE, path)
    else:
        torch.save(STATE, path)
    assert_same(read_states(path)[""])


PLACES = {
    "": STATE,
    "state_dict": {"state_dict": STATE, "epoch": 3},
    "ema.module": {"ema": {"module": STATE}},
    "model": {"model": STATE, "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": [{"lr": 0.1}]}},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("new_format", [False, True])
def test_state_dicts_are_found_in_mappings(tmp_path: Path, place: str, new_format: bool) -> None:
    path = written(tmp_path, PLACES[place], _use_new_zipfile_serialization=new_format)
    states = read_states(path)
    assert list(states) == [place]
    assert_same(states[place])


class Unknown:
    """A class of the training's code, with state and arguments."""

    def __init__(self, value: Any) -> None:
        self.value = value


BESIDE: dict[str, Callable[[], Any]] = {
    "arguments": lambda: argparse.Namespace(lr=0.1, output=Path("out")),
    "path": lambda: Path("a") / "b",
    "NumPy's number": lambda: np.float64(0.7),
    "NumPy's array": lambda: np.arange(3),
    "namespace": lambda: types.SimpleNamespace(a=1),
    "a class of one's own": lambda: Unknown([1, Unknown(2)]),
    "a class itself": lambda: Unknown,
    "a set and a complex number": lambda: [{1, 2}, complex(1, 2)],
    "what Python 2 called otherwise": lambda: [range(3), slice(1, 2), frozenset((1,)), subprocess.call],
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("new_format", [False, True])
def test_what_is_no_tensor_is_passed_over(tmp_path: Path, beside: str, new_format: bool) -> None:
    content = {"state_dict": STATE, "args": BESIDE[beside](), "epoch": 3}
    path = written(tmp_path, content, _use_new_zipfile_serialization=new_format)
    allowed = set(torch.serialization.get_safe_globals())
    assert_same(read_states(path)["state_dict"])
    assert set(torch.serialization.get_safe_globals()) == allowed


def test_no_class_that_a_file_names_is_looked_up(tmp_path: Path) -> None:
    """The classes of a training's code are not there where its weights are used."""
    module = types.ModuleType("gone")
    kind = type("Config", (), {"__module__": "gone"})
    module.Config = kind  # type: ignore[attr-defined]
    sys.modules["gone"] = module
    try:
        path = written(tmp_path, {"model": STATE, "config": kind()})
    finally:
        del sys.modules["gone"]
    assert_same(read_states(path)["model"])


class Bomb:
    """Unpickling it would create a file."""

    def __init__(self, trace: Path, how: str = "method") -> None:
        self.trace, self.how = trace, how

    def __reduce__(self) -> tuple[Any, ...]:
        command = f"open({str(self.trace)!r}, 'w').close()"
        match self.how:
            case "method":
                return (Path.touch, (self.trace,))
            case "class":
                return (subprocess.Popen, (["touch", str(self.trace)],))
            case "function":
                return (np.fromfile, (str(self.trace), "u1", -1, ""))
        return (exec, (command,))


def explodes(trace: Path, how: str) -> bool:
    """Whether Python's own unpickling runs what is in the file."""
    try:
        loaded = pickle.loads(pickle.dumps(Bomb(trace, how)))
    except FileNotFoundError:  # of np.fromfile, which has been called
        return True
    if isinstance(loaded, subprocess.Popen):
        loaded.wait()
    return trace.exists()


@pytest.mark.parametrize("how", ["method", "class", "function", "exec"])
@pytest.mark.parametrize("writer", ["torch", "legacy", "pickle"])
def test_code_in_a_weights_file_is_not_run(tmp_path: Path, writer: str, how: str) -> None:
    path, trace = tmp_path / "weights.pth", tmp_path / "exploded"
    if writer == "pickle":
        path.write_bytes(pickle.dumps({"weight": Bomb(trace, how)}))
    else:
        torch.save({"weight": Bomb(trace, how)}, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(WeightsFileError, match=r"weights\.pth (cannot be read|holds no state dict)"):
        read_states(path)
    assert not trace.exists()
    assert explodes(trace, how)  # so it would have been seen


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("keep", [0, 100, 500, -10])
def test_truncated_file_is_refused(tmp_path: Path, suffix: str, keep: int) -> None:
    path = written(tmp_path, {"weight": torch.ones(1000)}, suffix)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsFileError, match=rf"weights\{suffix} cannot be read"):
        read_states(path)


@pytest.mark.parametrize("kind", ["safetensors", "torch", "legacy"])
@given(seed=rng_seeds())
def test_damaged_files_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, kind: str, seed: int) -> None:
    """A few bytes are changed, anywhere or where the format begins."""
    folder = tmp_path_factory.mktemp("damaged")
    content: Any = {"weight": torch.ones(20)}
    if kind != "safetensors":
        content = {"state_dict": content, "args": argparse.Namespace(lr=0.1)}
    path = written(folder, content, f".{kind}", **({} if kind != "legacy" else {"_use_new_zipfile_serialization": False}))
    damaged, rng = np.frombuffer(path.read_bytes(), np.uint8).copy(), np.random.default_rng(seed)
    places = rng.integers(0, rng.choice([60, len(damaged)]), rng.integers(1, 6))
    damaged[places] = rng.integers(0, 256, len(places))
    path.write_bytes(damaged.tobytes())
    with contextlib.suppress(WeightsFileError):  # any other error fails
        states = read_states(path)
        assert all(isinstance(value, Tensor) for state in states.values() for value in state.values())


@pytest.mark.parametrize("content", [torch.zeros(2), [1, 2], {"epoch": 3}, {"state_dict": {"a": 1}}], ids=str)
def test_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(WeightsFileError, match=r"weights\.pth holds no state dict"):
        read_states(written(tmp_path, content))


def converted(message: str, folder: Path) -> Path:
    """The file that the line at the end of the message writes."""
    line = message[message.index("python -c") :].replace("python", sys.executable, 1)
    subprocess.run(line, shell=True, check=True, cwd=Path(__file__).parents[2], timeout=120)
    (path,) = folder.glob("*_tensors.pth")
    return path


@pytest.mark.parametrize(
    ("wrap", "place"),
    [(lambda net: net, ""), (lambda net: {"ema": None, "model": net}, "model")],
    ids=["alone", "in a mapping"],
)
def test_a_whole_module_is_refused_with_the_line_that_keeps_its_tensors(
    tmp_path: Path, wrap: Callable[[nn.Module], Any], place: str
) -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    folder = tmp_path / "it's \N{ALEMBIC} \N{OWL} here"
    folder.mkdir()
    path = written(folder, wrap(net))
    with pytest.raises(
        WeightsFileError, match=r"weights\.pth holds a whole Sequential, which cannot be read without"
    ) as refused:
        read_states(path)
    assert_same(read_states(converted(str(refused.value), folder))[place], dict(net.state_dict()))


class Settings(dict[str, Any]):
    """As of EasyDict and yacs: PyTorch fills no mappings but its own."""


@pytest.mark.parametrize(("args", "protocol"), [(argparse.Namespace(lr=0.1), 4), (Settings(lr=0.1), 2)], ids=["4", "mapping"])
def test_pickles_that_need_their_code_are_refused_with_the_line_that_keeps_the_tensors(
    tmp_path: Path, args: Any, protocol: int
) -> None:
    path = written(tmp_path, {"state_dict": STATE, "args": args}, pickle_protocol=protocol)
    with pytest.raises(WeightsFileError, match=r"weights\.pth cannot be read without running code from it: if") as refused:
        read_states(path)
    assert "\n" not in str(refused.value)
    assert_same(read_states(converted(str(refused.value), tmp_path))["state_dict"])


@pytest.mark.filterwarnings("ignore:.*torch.jit")  # it is deprecated, but its files are there
def test_torchscript_is_refused_with_the_line_that_keeps_its_tensors(tmp_path: Path) -> None:
    net, path = nn.Sequential(nn.Conv2d(2, 3, 1)).eval(), tmp_path / "weights.pt"
    torch.jit.save(torch.jit.trace(net, torch.zeros(1, 2, 3, 3)), path)  # type: ignore[no-untyped-call]
    with pytest.raises(WeightsFileError, match=r"is a TorchScript archive: keep its tensors alone by python -c") as refused:
        read_states(path)
    assert_same(read_states(converted(str(refused.value), tmp_path))[""], dict(net.state_dict()))


def zipped(path: Path, name: str) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, b"anything")


def in_tar(path: Path) -> None:
    inner = path.with_name("inner.pth")
    torch.save(STATE, inner)
    with tarfile.open(path, "w") as file:
        file.add(inner)


OTHERS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "Git LFS": ("w.pth", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "a pointer of Git LFS"),
    "web page": ("w.pth", lambda path: path.write_text("<!DOCTYPE html><html></html>"), "a web page"),
    "shards": ("w.index.json", lambda path: path.write_text('{"metadata": {}, "weight_map": {}}'), "JSON, such as the index"),
    "shard": ("m.data-00000-of-00002", lambda path: path.write_bytes(b"\0\0\1"), "part of a TensorFlow checkpoint"),
    "gzip": ("w.pth.gz", lambda path: path.write_bytes(gzip.compress(b"anything")), "compressed by gzip: unpack"),
    "Keras": ("w.h5", lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n0000"), "HDF5, as Keras writes it"),
    "Keras 3": ("w.keras", lambda path: zipped(path, "model.weights.h5"), "a model of Keras"),
    "array": ("w.npy", lambda path: np.save(path, np.ones(3)), "a NumPy array"),
    "arrays": ("w.npz", lambda path: np.savez(path, a=np.ones(3)), r"NumPy arrays \(\.npz\)"),
    "ONNX": ("w.onnx", lambda path: path.write_bytes(b"\x08\x08pytorch"), "an ONNX model"),
    "TensorFlow Lite": ("w.tflite", lambda path: path.write_bytes(b"\x1c\0\0\0TFL3"), "a TensorFlow Lite model"),
    "TensorFlow": ("m.ckpt.index", lambda path: path.write_bytes(b"\0\0\1"), "part of a TensorFlow checkpoint"),
    "exported": ("w.pt2", lambda path: zipped(path, "w/archive_format"), r"a program of torch\.export"),
    "zip": ("w.zip", lambda path: zipped(path, "folder/w.pth"), "a zip archive: unpack"),
    "tar": ("w.pth.tar", in_tar, "a tar archive: unpack"),
    "folder": ("w", lambda path: path.mkdir(), "a folder: give a file in it"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_called_what_they_are(tmp_path: Path, kind: str) -> None:
    name, write, words = OTHERS[kind]
    write(tmp_path / name)
    with pytest.raises(WeightsFileError, match=rf"weights file \S+/{name} is {words}") as refused:
        read_states(tmp_path / name)
    assert "\n" not in str(refused.value)


def test_a_pickle_of_arrays_says_what_to_save(tmp_path: Path) -> None:
    path = tmp_path / "w.pkl"
    path.write_bytes(pickle.dumps({"model": {"weight": np.ones(3)}}))
    with pytest.raises(WeightsFileError, match=r"w\.pkl cannot be read: it is a pickle of another program than torch\.save"):
        read_states(path)


def test_a_folder_and_a_checkpoint_of_several_files_say_what_to_give(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    with pytest.raises(WeightsFileError, match=r"is a folder: give a file in it, such as model\.safetensors"):
        read_states(tmp_path)
    (tmp_path / "model.ckpt.index").touch()
    with pytest.raises(WeightsFileError, match=r"model\.ckpt is the name of a TensorFlow checkpoint"):
        read_states(tmp_path / "model.ckpt")
    with pytest.raises(WeightsFileError, match=r"absent\.pth does not exist"):
        read_states(tmp_path / "absent.pth")


def test_our_own_files_are_left_to_their_own_reader(tmp_path: Path) -> None:
    """They say how the backbone pads and normalises, which its tensors alone do not."""
    cell = Cell.from_json('[{"op": "conv", "kernel": 1, "input": -1}]')
    head = SegmentationHead(DensePredictionCell(cell, 4, branch_channels=2, cell_channels=2), 2)
    backbone = plain_backbone("small", (4, 4, 4, 4), output_stride=16)
    path = tmp_path / "network.safetensors"
    checkpoint.save_network(path, SegmentationNetwork(backbone, head), task={"class_names": ("a", "b")})
    with pytest.raises(WeightsFileError, match=r"is of this project: `load_backbone` reads the backbone of a network"):
        read_states(path)


def test_variances_below_0_are_named() -> None:
    tensors = {"norm.running_mean": torch.tensor([-1.0]), "norm.running_var": torch.tensor([1.0, -1e-9])}
    assert describe_unusable(tensors) == "variances below 0 in 1 of 2 tensors, first 'norm.running_var'"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((1.0, float("nan")), "NaN in 1 of 3 tensors, first 'b'"),
        ((float("-inf"), 0.0), "infinite numbers in 1 of 3 tensors, first 'b'"),
        ((3e38, -1e-45), None),
    ],
)
def test_values_that_are_not_finite_are_named(values: tuple[float, ...], words: str | None) -> None:
    tensors = {"a": torch.ones(2), "b": torch.tensor(values), "n": torch.tensor(3)}
    assert describe_unusable(tensors) == words
