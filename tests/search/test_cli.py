"""What a user meets at the command line: one sentence and exit code 2 for bad input, 130 for Ctrl-C, never a traceback."""

import ast
import importlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image

import search.commands
import search.datasets
import search.features
import search.fidelity
import search.random
import search.train
from search import TorchDataset, backbone_from_module, search_cells, train_network
from search.cli import Flat, flags_of, run_command, spelled, to_install, uses_of_network
from search.datasets import Dataset, open_dataset
from search.errors import InputError
from search.features import FeaturesSettings
from search.fidelity import FidelitySettings
from search.interrupts import ctrl_c_waits, sigterm_is_ctrl_c, sigterm_kept, stop_waits
from search.random import RandomSettings
from search.settings import PictureSettings, PredictionSettings
from search.train import TrainSettings
from tests.search.composed import changed, composed

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Settings:
    """Flags of a command."""

    count: int = 1
    """How many."""


def run(monkeypatch: pytest.MonkeyPatch, command: Callable[[Settings], None], *flags: str, goes_on: bool = False) -> object:
    monkeypatch.setattr(sys, "argv", ["command", *flags])
    try:
        run_command(Settings, command, prog="command", goes_on=goes_on)
    except SystemExit as end:
        return end.code
    return 0


def test_flags_reach_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []
    assert run(monkeypatch, seen.append, "--count", "3") == 0
    assert run(monkeypatch, seen.append) == 0
    assert seen == [Settings(3), Settings(1)]


def test_bad_input_is_one_line_and_code_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(settings: Settings) -> None:
        raise InputError(f"--count {settings.count} is too large: give less")

    assert run(monkeypatch, refuse, "--count", "9") == 2
    assert capsys.readouterr() == ("", "error: --count 9 is too large: give less\n")


@dataclass(frozen=True)
class Group:
    """Settings that several commands have."""

    crop_size: int = 1
    """How large."""


@dataclass(frozen=True)
class GroupedSettings:
    """One group by its fields' names, another one of the same kind by its own."""

    crops: Flat[Group] = Group()
    large: Group = Group(3)


def test_fields_of_groups_are_flags_also_in_what_parts_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[GroupedSettings] = []

    def refuse(settings: GroupedSettings) -> None:
        seen.append(settings)
        raise InputError("`crop_size` is larger than `large.crop_size`, not than `depth` of `python -m search.features`")

    monkeypatch.setattr(sys, "argv", ["command", "--crop-size", "7", "--large.crop-size", "5"])
    with pytest.raises(SystemExit) as end:
        run_command(GroupedSettings, refuse, prog="command")
    assert end.value.code == 2
    assert seen == [GroupedSettings(Group(7), Group(5))]
    sentence = "--crop-size is larger than --large.crop-size, not than `depth` of `python -m search.features`"
    assert capsys.readouterr().err == f"error: {sentence}\n"


def settings_types() -> list[type]:
    """The settings of every command: what `python -m search.X` hands to `run_command`."""
    names = sorted(path.stem for path in (ROOT / "search").glob("*.py") if "run_command(" in path.read_text(encoding="utf-8"))
    modules = [importlib.import_module(f"search.{name}") for name in (*names, "datasets.__main__") if name != "cli"]
    return [get_type_hints(module.main)["settings"] for module in modules]


def documented_commands() -> list[tuple[str, str, str]]:
    """(file, command, flag) of every `python -m search.X --flag` in the documentation, over several lines too."""
    found = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "bench").glob("*.md"))):
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for command, arguments in re.findall(r"python -m search\.(\w+)([^`\n#]*)", text):
            found += [(path.name, command, flag) for flag in re.findall(r"(?<=\s)--[a-z][a-z.-]*", arguments)]
    return found


def test_flags_of_documented_commands_are_there() -> None:
    commands = documented_commands()
    assert len(commands) > 50
    assert {command for _, command, _ in commands} >= {"random", "train", "rerank", "fidelity", "evaluate", "export"}
    flags = {settings.__module__.removeprefix("search.").split(".")[0]: flags_of(settings) for settings in settings_types()}
    wrong = [each for each in commands if each[2] not in {*flags[each[1]].values(), "--help"}]
    assert wrong == []


def test_commands_that_read_pictures_admit_large_ones() -> None:
    having = {
        settings.__module__.removeprefix("search.")
        for settings in settings_types()
        if flags_of(settings).get("max_megapixels") == "--max-megapixels"
    }
    assert having == {"datasets.__main__", "evaluate", "features", "fidelity", "predict", "random", "train"}


def test_the_next_commands_admit_them_too(tmp_path: Path) -> None:
    write_camvid(tmp_path)
    val = open_dataset("camvid", "val", tmp_path)
    admitting, plain = (
        uses_of_network(Path("n.safetensors"), PictureSettings(dataset="camvid", max_megapixels=limit), val)
        for limit in (400, 179)
    )
    assert ["--max-megapixels 400" in command for command in admitting] == [True, True, False]  # to evaluate, predict, export
    assert not any("--max-megapixels" in command for command in plain)


@pytest.mark.parametrize(
    ("module", "settings_type"),
    [(search.random, RandomSettings), (search.train, TrainSettings), (search.fidelity, FidelitySettings)],
    ids=["random", "train", "fidelity"],
)
def test_labels_are_looked_at_before_all_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, settings_type: type[Any]
) -> None:
    """Of splits that are opened once each."""
    folder, opened = write_camvid(tmp_path / "camvid"), []
    for path in (folder / "trainannot").iterdir():
        Image.fromarray(np.full((17, 33), 11, np.uint8)).save(path)  # void

    def open_counted(name: str, split: str, *options: Any) -> Dataset:
        opened.append(split)
        return open_dataset(name, split, *options)

    monkeypatch.setattr(search.datasets, "open_dataset", open_counted)
    monkeypatch.setattr(module, "completed_loss", lambda *_: pytest.fail("there may be thousands"))
    settings = composed(settings_type, dataset="camvid", data_dir=folder, class_weights="balanced", cache_dir=tmp_path)
    with pytest.raises(InputError, match=r"^no pixel of camvid train has a label to learn from"):
        module.main(changed(settings, device="cpu", out=tmp_path / "out"))
    assert opened == ["train", "val"]
    assert [path.name for path in tmp_path.iterdir()] == ["camvid"]


def test_what_comes_next_predicts_as_before(tmp_path: Path) -> None:
    write_camvid(tmp_path)
    val, data = open_dataset("camvid", "val", tmp_path), PictureSettings(dataset="camvid", max_megapixels=400)
    prediction = PredictionSettings(tile_size=(65, 33), output_stride=8, flip=True)
    evaluate, predict, export = uses_of_network(Path("n.safetensors"), data, val, prediction)
    flags = "--max-megapixels 400 --flip --tile-size 65 33 --output-stride 8"
    assert evaluate.endswith(f" --dataset camvid {flags}")
    assert predict.endswith(f" --out n-predictions {flags}")
    assert export.endswith(" --out n.pt2 --output-stride 8")


def test_every_field_in_an_error_is_a_flag_of_some_command() -> None:
    """So that a field which is renamed is renamed in what is said of it. What is for Python has parameters, not flags."""
    known = {name for settings in settings_types() for name in flags_of(settings)}
    known |= {
        name
        for each in (TorchDataset, backbone_from_module, search_cells, train_network)
        for name in signature(each).parameters
    }
    assert {"crop_size", "large.weights", "end_to_end.iterations", "processes", "atrous_rates"} <= known
    said = {
        field
        for path in (ROOT / "search").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise | ast.Call | ast.Dict)
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
        for field in re.findall(r"`([a-z_.]+)`", part.value)
    }
    assert len(said) > 30
    assert said - known == {"classes"}  # a field of the TOML file that describes a data set


@pytest.mark.parametrize("flags", [["--cells", "9"], ["--cells=9"]])
def test_a_flag_of_an_earlier_version_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *flags])
    with pytest.raises(SystemExit) as end:
        run_command(Settings, lambda settings: pytest.fail("must not run"), prog="command", renamed={"--cells": "--count"})
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: --cells is now --count\n"


def test_ctrl_c_is_one_line_and_code_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(settings: Settings) -> None:
        raise KeyboardInterrupt

    assert run(monkeypatch, stop, goes_on=True) == 130
    assert capsys.readouterr().err.strip() == "stopped; the same command goes on from here"
    assert run(monkeypatch, stop) == 130
    assert capsys.readouterr().err.strip() == "stopped"


def allocate_terabytes() -> None:
    torch.empty(1 << 50)


def be_full(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    "fill",
    [
        allocate_terabytes,
        partial(be_full, MemoryError("no room")),
        partial(be_full, MemoryError()),
        partial(be_full, torch.OutOfMemoryError("CUDA out of memory.")),
    ],
    ids=["cpu", "numpy", "python", "gpu"],
)
def test_a_full_memory_is_one_line_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fill: Callable[[], None]
) -> None:
    assert run(monkeypatch, lambda settings: fill()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: the memory is full (")
    assert error.endswith("): give smaller sizes\n")
    assert error.count("\n") == 1


def test_another_error_of_torch_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="must match"):
        run(monkeypatch, lambda settings: print(torch.zeros(2) + torch.zeros(3)))


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(settings: Settings) -> None:
        raise IndexError("a bug")

    with pytest.raises(IndexError, match="a bug"):
        run(monkeypatch, fail)


@pytest.mark.parametrize("flags", [["--count", "many"], ["--cuont", "3"], ["3"]])
def test_flags_that_do_not_exist_or_fit_are_code_2(monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    assert run(monkeypatch, lambda settings: pytest.fail("must not run"), *flags) == 2


# The commands themselves on bad input


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(timm.create_model("test_efficientnet").state_dict(), path)
    return path


def write_camvid(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in (split, f"{split}annot"):
            (folder / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(rng.integers(0, 256, (17, 33, 3), dtype=np.uint8)).save(folder / split / f"{i}.png")
            Image.fromarray(rng.integers(0, 12, (17, 33), dtype=np.uint8)).save(folder / f"{split}annot" / f"{i}.png")
        (folder / f"{split}.txt").write_text("".join(f"{split}/{i}.png {split}annot/{i}.png\n" for i in range(2)))
    return folder


def flags_for(folder: Path, weights: Path) -> list[str]:
    flags = {"dataset": "camvid", "data-dir": folder / "camvid", "backbone": "test_efficientnet", "weights": weights}
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def spoil(path: str, change: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    """Damage a file of the tiny CamVid; no flags are needed to find out."""

    def act(folder: Path) -> list[str]:
        change(folder / "camvid" / path)
        return []

    return act


def save(array: NDArray[np.uint8]) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(array).save(path)


def in_the_way(flag: str) -> Callable[[Path], list[str]]:
    def act(folder: Path) -> list[str]:
        (folder / "file").write_text("in the way")
        return [flag, str(folder / "file")]

    return act


def add(*flags: str) -> Callable[[Path], list[str]]:
    return lambda folder: list(flags)


BAD_INPUT: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "data folder missing": (add("--data-dir", "nowhere"), r"--data-dir nowhere is not a folder"),
    "list missing": (spoil("val.txt", Path.unlink), r"list .*val\.txt is missing"),
    "image missing": (spoil("val/1.png", Path.unlink), r"val/1\.png .*is missing .*restore"),
    "no megapixels": (add("--max-megapixels", "0"), r"--max-megapixels must be above 0, got 0"),
    "few megapixels": (add("--max-megapixels", "1e-4"), r"png has 17 × 33 pixels, .* --max-megapixels is 0\.0001: give"),
    "image truncated": (spoil("train/1.png", lambda p: os.truncate(p, 200)), r"train/1\.png is truncated or unreadable"),
    "label value": (spoil("valannot/1.png", save(np.full((17, 33), 12, np.uint8))), r"valannot/1\.png holds the value 12"),
    "label size": (spoil("trainannot/1.png", save(np.zeros((17, 32), np.uint8))), r"trainannot/1\.png is 17×32, .* 17×33"),
    "unknown data set": (add("--dataset", "imagenet"), r"--dataset imagenet is unknown"),
    "unknown backbone": (add("--backbone", "resnet_of_nobody"), r"'resnet_of_nobody' is not a timm model"),
    "weights missing": (add("--weights", "nowhere.pth"), r"weights file nowhere\.pth does not exist"),
    "weights of another": (add("--backbone", "test_resnet"), r"weights\.pth is not of test_resnet: it lacks"),
    "output stride": (add("--output-stride", "3"), r"--output-stride must be 4 to 32, got 3"),
    "image size": (add("--image-size", "20", "20"), r"--image-size 20 20 must be 16·k \+ 1"),
    "device": (add("--device", "abacus"), r"--device abacus cannot be used"),
    "unwritable cache": (in_the_way("--cache-dir"), r"cannot write .*file.*: give another --cache-dir"),
}
BAD_SEARCH = BAD_INPUT | {
    "no cells": (add("--trials", "0"), r"--trials must be at least 1, got 0"),
    "crop size": (add("--crop-size", "50", "33"), r"--crop-size 50 33 must be 16·k \+ 1 each, at most 17 \d+,"),
    "sampler": (add("--sampler", "bayes"), r"--sampler bayes is unknown"),
    "unwritable runs": (in_the_way("--out"), r"cannot write .*file.*: give another --out"),
}


COMMANDS: dict[str, Callable[[], None]] = {
    "features": lambda: run_command(FeaturesSettings, search.features.main, prog="command"),
    "random": lambda: run_command(RandomSettings, search.random.main, prog="command"),
}


def is_one_sentence(error: str, sentence: str) -> bool:
    """Exactly one error, on the last line; only progress bars may stand before it."""
    lines = [line for line in error.splitlines() if line and not line.startswith("features of")]
    return len(lines) == 1 and re.match(rf"error: .*{sentence}", lines[0]) is not None


@pytest.mark.parametrize(
    ("module", "case"), [("features", case) for case in BAD_INPUT] + [("random", case) for case in BAD_SEARCH]
)
def test_bad_input_is_refused_and_nothing_is_left_half_written(
    tmp_path: Path,
    weights: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: str,
    case: str,
) -> None:
    write_camvid(tmp_path / "camvid")
    monkeypatch.chdir(tmp_path)
    act, sentence = BAD_SEARCH[case]
    monkeypatch.setattr(sys, "argv", ["command", *flags_for(tmp_path, weights), *act(tmp_path)])
    with pytest.raises(SystemExit) as end:
        COMMANDS[module]()
    assert end.value.code == 2
    output = capsys.readouterr()
    assert is_one_sentence(output.err, sentence), output.err
    assert output.out == ""
    assert not list(tmp_path.rglob("*.partial*"))
    assert not (tmp_path / "runs").exists()


# As separate processes: a whole import of PyTorch each, so only a few


def start(*arguments: str, cwd: Path) -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # As from a terminal, also where the tests themselves run in the background, which makes Ctrl-C ignored.
    module = "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    module += "; sys.argv = sys.argv[1:]; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", module, *arguments]
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_real_process_refuses_bad_input(tmp_path: Path, weights: Path) -> None:
    write_camvid(tmp_path / "camvid")
    os.truncate(tmp_path / "camvid" / "train" / "0.png", 200)
    process = start("search.random", *flags_for(tmp_path, weights), cwd=tmp_path)
    output, error = process.communicate(timeout=200)
    assert process.returncode == 2
    assert output == ""
    assert is_one_sentence(error, r"train/0\.png is truncated")


@pytest.mark.parametrize("arguments", [("search.random", "--help"), ("search.diagram", "--cell", "dpc")], ids=" ".join)
def test_an_output_that_nobody_reads_is_no_error(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    with start(*arguments, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert (process.wait(timeout=200), process.stderr.read()) == (141, "")


def test_a_pipe_that_breaks_elsewhere_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, lambda settings: be_full(BrokenPipeError("a process has ended"))) == 2
    assert "a process has ended" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl_c", "sigterm"])
def test_a_real_ctrl_c_stops_a_search_cleanly_and_sigterm_does_too(
    tmp_path: Path, weights: Path, number: signal.Signals
) -> None:
    write_camvid(tmp_path / "camvid")
    sizes = ("--iterations", "20", "--branch-channels", "4", "--branches", "2", "--trials", "10000")
    process = start("search.random", *flags_for(tmp_path, weights), *sizes, "--device", "cpu", cwd=tmp_path)
    deadline = time.monotonic() + 200
    while not (tmp_path / "runs/camvid/heads/best.safetensors").exists():  # the first cell has a score
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(number)
    output, error = process.communicate(timeout=200)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert error.endswith("stopped; the same command goes on from here\n")
    assert "report:" in output or "no cell has a score yet" in error
    assert (tmp_path / "runs/camvid/settings.json").exists()


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("inner", [nullcontext, ctrl_c_waits])
def test_ctrl_c_waits_for_the_end_of_a_block_but_a_second_one_does_not(
    number: signal.Signals, inner: Callable[[], AbstractContextManager[None]]
) -> None:
    for times, expected in ((1, ["done"]), (2, [])):
        work: list[str] = []
        with pytest.raises(KeyboardInterrupt):
            _press_ctrl_c(times, work, number, inner)
        assert work == expected
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("when", ["before", "inside", "after"])
def test_ctrl_c_waits_for_the_end_of_the_outer_of_two_blocks(when: str) -> None:
    waited: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        _press_ctrl_c_around_a_block(when, waited)
    assert waited == [when == "before", when in {"before", "inside"}, True]
    assert not stop_waits()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _press_ctrl_c_around_a_block(when: str, waited: list[bool]) -> None:
    """Press it before, inside or after a block that another one holds; tells in turn whether a stop waits."""
    with ctrl_c_waits():
        for here in ("before", "inside", "after"):
            with ctrl_c_waits() if here == "inside" else nullcontext():
                if here == when:
                    signal.raise_signal(signal.SIGINT)
            waited.append(stop_waits())


def _press_ctrl_c(
    times: int, work: list[str], number: signal.Signals, inner: Callable[[], AbstractContextManager[None]]
) -> None:
    with sigterm_is_ctrl_c(), ctrl_c_waits(), inner():
        for _ in range(times):
            signal.raise_signal(number)
        work.append("done")


def test_sigterm_does_what_it_did_after_a_command_and_after_a_library() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with sigterm_is_ctrl_c():
        of_command = signal.getsignal(signal.SIGTERM)
        with sigterm_kept():
            signal.signal(signal.SIGTERM, lambda number, frame: None)  # as ray.init does
        assert signal.getsignal(signal.SIGTERM) is of_command is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_waits_where_no_handler_can_be_set() -> None:
    """In another thread, or where a shell lets its background jobs ignore Ctrl-C."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(_pass_through).result()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        _pass_through()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def _pass_through() -> None:
    with sigterm_is_ctrl_c(), sigterm_kept(), ctrl_c_waits():
        pass


# How a command is started


def command_files() -> list[Path]:
    """The files of all commands but `datasets`, which is a folder."""
    return sorted(path for path in (ROOT / "search").glob("*.py") if "\n    run_command(" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", command_files(), ids=lambda path: path.stem)
def test_a_command_that_is_started_as_a_file_says_how_to_start_it(tmp_path: Path, path: Path) -> None:
    """Python's own `random` is then hidden, which PyTorch needs."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, path], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"by python -m search.{path.stem}: here" in done.stderr


def test_a_missing_package_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "optuna.py").write_text("import a_package_that_nobody_has.part")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "search.random", "--help"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: the Python package a_package_that_nobody_has is missing: pip install -e '.[search]'\n"


def test_commands_and_extras_are_spelled_as_they_are_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [spelled("train"), spelled("datasets check")] == ["python -m search.train", "python -m search.datasets check"]
    assert to_install("export") == "pip install -e '.[export]'"
    monkeypatch.setattr(search.commands, "IS_INSTALLED", True)
    assert [spelled("random"), spelled("train"), spelled("datasets check")] == [
        "dpc-search",
        "dpc-train",
        "dpc-datasets check",
    ]
    assert to_install("export") == "pip install 'dense-prediction-cell[export]'"


@pytest.mark.parametrize(("script", "module"), [("dpc-search", "random"), ("dpc-diagram", "diagram")])
def test_a_script_runs_its_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: str, module: str
) -> None:
    monkeypatch.setattr(sys, "argv", [f"/bin/{script}", "--help"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # restored afterwards
    monkeypatch.delitem(sys.modules, f"search.{module}", raising=False)  # else runpy warns
    with pytest.raises(SystemExit) as end:
        search.commands.run_script()
    assert end.value.code == 0
    assert f"usage: python -m search.{module} " in capsys.readouterr().out
