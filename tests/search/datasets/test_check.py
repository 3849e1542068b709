"""The check of a folder: silent about a whole one, and for a broken one every problem, not only the first."""

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from search.cli import to_type
from search.datasets import camvid, cityscapes, pascal_person_part, pascal_voc, shapes
from search.datasets.__main__ import CheckSettings, main
from search.datasets.check import check_folder
from search.errors import InputError
from tests.search import dataset_folders as made

CHECK: Literal["check"] = "check"
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _small_is_official(monkeypatch: pytest.MonkeyPatch) -> None:
    """The made folders are whole: what counts as the official number of pictures is theirs."""
    counts = {
        cityscapes: {"train": (3,), "val": (2,), "trainval": (5,), "test": (2,)},
        pascal_voc: {"train": (2,), "train_aug": (4,), "val": (2,), "trainval": (4,), "test": (1,)},
        pascal_person_part: {"train": (2,), "val": (2, 3), "trainval": (4, 5)},
        camvid: {"train": (2,), "val": (2,), "trainval": (4,), "test": (2,)},
    }
    for module, lengths in counts.items():
        monkeypatch.setattr(module, "LENGTHS", lengths)


def check(
    capsys: pytest.CaptureFixture[str],
    name: str,
    folder: Path | None,
    *,
    splits: tuple[str, ...] = (),
    processes: int = 1,
) -> tuple[int, str]:
    """Exit code and standard output."""
    settings = CheckSettings(command=CHECK, dataset=name, data_dir=folder, splits=splits, processes=processes)
    capsys.readouterr()
    try:
        main(settings)
    except SystemExit as end:
        return int(str(end.code)), capsys.readouterr().out
    return 0, capsys.readouterr().out


def begin(name: str, folder: Path) -> str:
    """The command that follows."""
    return to_type("random", "--dataset", name, "--data-dir", folder, "--pretrained")


def write_whole_voc(folder: Path) -> None:
    made.add_converted_sbd(folder, made.write_voc(folder))


# Whole folders


@pytest.mark.parametrize(
    ("name", "write", "splits"),
    [
        ("cityscapes", made.write_cityscapes, ["train", "val", "trainval", "test"]),
        ("pascal_voc", write_whole_voc, ["train", "train_aug", "val", "trainval", "test"]),
        ("pascal_person_part", made.write_person_part, ["train", "val", "trainval"]),
    ],
)
def test_a_whole_folder_has_no_problems(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, write: Callable[[Path], object], splits: list[str]
) -> None:
    write(tmp_path)
    code, out = check(capsys, name, tmp_path)
    assert code == 0
    assert out.endswith(f"\nno problems\nnext: {begin(name, tmp_path)}\n")
    assert re.findall(r"^(\w+) +\d+ ", out, flags=re.MULTILINE) == splits


def test_the_tables_are_these(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made.write_person_part(tmp_path)
    made.write_label(tmp_path / "SegmentationPart" / "2008_000026.png", np.full(made.SIZE, 255, np.uint8))
    for name, values in (("2008_000008", 6), ("2008_000036", 1), ("2008_000003", 0)):
        made.write_label(tmp_path / "SegmentationPart" / f"{name}.png", np.full(made.SIZE, values, np.uint8))
    larger = (10, 6)
    made.write_image(tmp_path / "JPEGImages" / "2008_000003.jpg", size=larger)
    made.write_label(tmp_path / "SegmentationPart" / "2008_000003.png", np.zeros(larger, np.uint8))
    code, out = check(capsys, "pascal_person_part", tmp_path)
    assert code == 0
    expected = """\
split     pictures  officially  height × width  ignored %
train            2           2           6 × 8       0.00
val              2      2 or 3      6–10 × 6–8      44.44
trainval         4      4 or 5      6–10 × 6–8      23.53

   class       train %   val %  trainval %
0  background     0.00  100.00       38.46
1  head          50.00    0.00       30.77
2  torso          0.00    0.00        0.00
3  upper arms     0.00    0.00        0.00
4  lower arms     0.00    0.00        0.00
5  upper legs     0.00    0.00        0.00
6  lower legs    50.00    0.00       30.77

2 warnings:
  no pixel of train is background, torso, upper arms, lower arms or upper legs (100.00 % of val are): nothing is learnt of \
them; see that the pictures are all there, and that labels have the numbers of this data set
  no pixel of val is head or lower legs (100.00 % of train are): scores say nothing of them; \
see that the pictures are all there, and that labels have the numbers of this data set

no problems
"""
    assert out == f"{expected}next: {begin('pascal_person_part', tmp_path)}\n"
    made.write_image(tmp_path / "JPEGImages" / "2008_000026.jpg", size=(20, 6))
    made.write_label(tmp_path / "SegmentationPart" / "2008_000026.png", np.zeros((20, 6), np.uint8))
    _, out = check(capsys, "pascal_person_part", tmp_path)
    assert out.endswith(f"next: {begin('pascal_person_part', tmp_path)} --image-size 33 17\n")


def test_generated_scenes_can_be_checked(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = check(capsys, "shapes", None, splits=("val",))
    assert code == 0
    assert re.search(r"^val +60 +- +257 × 257 ", out, flags=re.MULTILINE)


def test_a_described_folder_is_held_to_its_own_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "val"):
        made.write_image(tmp_path / split / "a.jpg")
        made.write_label(tmp_path / split / "a.png", made.values_up_to(2))
    path = tmp_path / "mine.toml"
    description = (
        'classes = ["no", "yes"]\nimages = "{split}/{name}.jpg"\nlabels = "{split}/{name}.png"\n[splits.train]\n[splits.val]\n'
    )
    path.write_text(description)
    assert check(capsys, str(path), None)[0] == 0
    path.write_text(f"{description}count = 3\n")
    code, out = check(capsys, str(path), None)
    assert code == 1
    assert f"1 problem:\n  val has 1 instead of 3 pictures; restore {tmp_path / 'val'} and what belongs to it" in out


def test_processes_find_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = {name: tmp_path / name for name in ("cityscapes", "pascal_person_part")}
    made.write_cityscapes(folders["cityscapes"])
    made.write_person_part(folders["pascal_person_part"], originals=True)
    (folders["cityscapes"] / "leftImg8bit" / "val" / "lindau" / "lindau_000003_000019_leftImg8bit.png").write_text("hello")
    for name, folder in folders.items():
        alone = check(capsys, name, folder)
        assert check(capsys, name, folder, processes=2) == alone
        assert alone[0] == (name == "cityscapes")


# Broken folders


def test_every_problem_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made.write_cityscapes(tmp_path)
    images, labels = tmp_path / "leftImg8bit", tmp_path / "gtFine"
    names = sorted(path.name.removesuffix("_leftImg8bit.png") for path in (images / "train" / "aachen").iterdir())
    city = {split: (images / split / place, labels / split / place) for split, place in made.CITIES.items()}
    made.write_label(city["train"][1] / f"{names[0]}_gtFine_labelIds.png", np.full(made.SIZE, 77, np.uint8))
    (city["train"][1] / f"{names[1]}_gtFine_labelIds.png").unlink()
    made.write_image(city["train"][0] / f"{names[2]}_leftImg8bit.png", size=(5, 8))
    val = "lindau_000003_000019"
    (city["val"][0] / f"{val}_leftImg8bit.png").write_bytes(b"")
    (city["val"][1] / f"{val}_gtFine_labelIds.png").write_bytes(b"")
    (city["val"][0] / "lindau_000019_000019_leftImg8bit.png").unlink()
    code, out = check(capsys, "cityscapes", tmp_path)
    assert code == 1
    heading, *problems = out.partition("problems:")[2].splitlines()
    assert not heading
    expected = [
        r"label .*lindau_000019_000019_gtFine_labelIds\.png has no image in .*leftImg8bit/val; restore the image",
        r"val has 1 instead of 2 pictures; restore .*leftImg8bit/val and what belongs to it",
        r"trainval has 4 instead of 5 pictures; restore",
        rf"label .*{names[0]}_gtFine_labelIds\.png holds the value 77; allowed are 7, 8, .* for void: it must be a",
        rf".*{names[1]}_gtFine_labelIds\.png is missing though .*leftImg8bit/train names it; restore the file",
        rf"label .*{names[2]}_gtFine_labelIds\.png is 6×8, its image .* is 5×8 \(height × width\); they must be equal",
        rf"picture .*{val}_leftImg8bit\.png is truncated .*; picture .*{val}_gtFine_labelIds\.png is truncated",
    ]
    assert len(problems) == len(expected)
    for problem, sentence in zip(problems, expected, strict=True):
        assert re.match(f"  ({sentence})", problem), problem
    assert f"{len(expected)} problems:" in out


def test_pictures_of_val_in_train_are_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_whole_voc(tmp_path)
    lists = tmp_path / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation"
    made.write_list(lists / "train_aug.txt", ["2007_000032", "2008_000008", "2008_000015", "2007_000033"])
    code, out = check(capsys, "pascal_voc", tmp_path)
    assert code == 1
    assert re.search(
        r"1 problem:\n  train_aug and val have pictures in common \(1, such as .*2007_000033\.jpg\); take them out of one\n",
        out,
    )


def test_a_split_that_is_absent_is_a_problem_only_where_it_has_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made.write_voc(tmp_path)
    code, out = check(capsys, "pascal_voc", tmp_path)
    assert code == 0
    assert "train_aug is not there (split train_aug of pascal_voc needs SBD's labels: unpack them" in out
    code, out = check(capsys, "pascal_voc", tmp_path, splits=("val", "train_aug"))
    assert code == 1
    assert "1 problem:\n  split train_aug of pascal_voc needs SBD's labels" in out
    shutil.rmtree(tmp_path / "VOCdevkit" / "VOC2012" / "SegmentationClass")
    code, out = check(capsys, "pascal_voc", tmp_path)
    assert code == 1
    assert "1 problem:\n  folder " in out  # the same folder, which train and val both need, once
    assert "correct --data-dir or unpack it there" in out  # the field of a part is the flag of the command


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("imagenet", {}, r"`dataset` imagenet is unknown; choose one of"),
        ("camvid", {}, r"`dataset` camvid needs `data_dir`"),
        ("camvid", {"folder": Path("nowhere")}, r"`data_dir` nowhere is not a folder"),
        ("camvid", {"splits": ("train", "train_aug")}, r"`splits` train_aug of camvid is unknown; choose from: train val tr"),
        ("camvid", {"processes": 0}, r"`processes` must be at least 1, got 0"),
    ],
)
def test_flags_that_cannot_work_are_refused(
    capsys: pytest.CaptureFixture[str], name: str, options: dict[str, object], sentence: str
) -> None:
    arguments = {"folder": None, **options}
    with pytest.raises(InputError, match=sentence):
        check(capsys, name, **arguments)  # type: ignore[arg-type]


def test_the_command_shows_progress_and_stops_at_ctrl_c(tmp_path: Path) -> None:
    """As a user runs it; 1,000 pictures of 1,024 × 2,048 pixels take two processes minutes."""
    made.write_cityscapes(tmp_path)
    city = tmp_path / "leftImg8bit" / "train" / "aachen", tmp_path / "gtFine" / "train" / "aachen"
    made.write_label(city[1] / "a_gtFine_labelIds.png", np.zeros((1024, 2048), np.uint8))
    made.write_image(city[0] / "a_leftImg8bit.png", size=(1024, 2048))
    for i in range(1000):
        (city[0] / f"b{i}_leftImg8bit.png").hardlink_to(city[0] / "a_leftImg8bit.png")
        (city[1] / f"b{i}_gtFine_labelIds.png").hardlink_to(city[1] / "a_gtFine_labelIds.png")
    # Where the tests run in the background, children are told to ignore Ctrl-C.
    module = "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    module += "; sys.argv[0] = 'search.datasets'; runpy.run_module('search.datasets', run_name='__main__')"
    command = [sys.executable, "-c", module, "check", "cityscapes", "--data-dir", str(tmp_path), "--processes", "2"]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    seen = ""
    while not re.search(r"pictures: .* [1-9]\d*/1008 ", seen):
        character = process.stderr.read(1)
        assert character, f"ended early: {seen}"
        seen += character
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)  # it does not read on
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "stopped" in err
    assert not out


def test_labels_for_another_task_are_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "LENGTHS", {"train": 2, "val": 1})
    text, problems = check_folder("shapes", None, (), 1, "depth")
    assert not problems
    assert "below 1 m" in text
    assert "inlay" in check_folder("shapes", None, (), 1).text


@pytest.mark.parametrize(("bits", "said"), [(12, ["train", "val"]), (16, [])])
def test_images_of_12_bits_that_are_stored_in_16_are_noticed(tmp_path: Path, bits: int, said: list[str]) -> None:
    (tmp_path / "set.toml").write_text(
        'classes = ["a", "b"]\nimages = "{split}/images/{name}.png"\nlabels = "{split}/labels/{name}.png"\n'
        "[splits.train]\n[splits.val]\n"
    )
    for seed, split in enumerate(("train", "val")):
        (tmp_path / split / "images").mkdir(parents=True)
        pixels = np.random.default_rng(seed).integers(0, 2**bits, (40, 40)).astype(np.uint16)
        Image.fromarray(pixels).save(tmp_path / split / "images" / "a.png")
        made.write_label(tmp_path / split / "labels" / "a.png", np.eye(40, dtype=np.uint8))
    text, problems = check_folder(str(tmp_path / "set.toml"), None, (), 1)
    assert not problems
    assert re.findall(r"no image of (\w+) has a value above 1[56] of 255, as where cameras' 10 or 12 bits", text) == said
