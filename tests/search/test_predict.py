"""Pictures in, masks, overlays and shares out: at their places, once each, and whatever goes wrong with one of them."""

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fast.checkpoint import save_network
from search.cli import to_type
from search.dense_tasks import DenseTask
from search.dense_tasks.depth import Depth
from search.errors import InputError
from search.predict import PredictSettings, main
from search.settings import PredictionSettings
from search.training.predictor import Predictor
from tests.search.composed import changed, composed
from tests.search.training.test_predictor import pixels, varied_network
from tests.search.training.test_scoring import Made


def write_network(path: Path, task: DenseTask = Made.task, seed: int = 0) -> Path:
    save_network(path, varied_network(len(task.outputs), seed), task=task.describe())
    return path


@pytest.fixture
def settings(tmp_path: Path) -> PredictSettings:
    """A folder of three pictures, one of them in a folder of its own."""
    pictures = tmp_path / "pictures"
    (pictures / "city.2").mkdir(parents=True)
    for seed, name in enumerate(("a.JPG", "city.2/b.c.png", "city.2/d.webp")):
        Image.fromarray(pixels(seed, (20 + seed, 30))).save(pictures / name)
    (pictures / "notes.txt").write_text("no picture")
    (pictures / ".hidden.png").write_text("no picture")
    network = write_network(tmp_path / "n.safetensors")
    return composed(PredictSettings, network=network, pictures=(pictures,), out=tmp_path / "out", device="cpu")


def shares(out: Path) -> dict[str, dict[str, float]]:
    with (out / "shares.csv").open(newline="") as file:
        return {row.pop("picture"): {name: float(share) for name, share in row.items()} for row in csv.DictReader(file)}


def made(out: Path) -> dict[str, int]:
    """All masks and overlays, with the times of their last change."""
    return {
        path.relative_to(out).as_posix(): path.stat().st_mtime_ns
        for folder in ("masks", "overlays")
        for path in (out / folder).rglob("*.*")
        if path.is_file()
    }


NAMES = ("a", "city.2/b.c", "city.2/d")


def test_masks_overlays_and_shares_lie_where_the_pictures_did(
    settings: PredictSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    main(settings)
    out = capsys.readouterr().out
    assert "3 pictures: masks, overlays and shares.csv in" in out
    assert out.endswith(
        f"next: {to_type('export', '--network', settings.network, '--out', settings.network.with_suffix('.pt2'))}\n"
    )
    predictor = Predictor.load(settings.network, device="cpu")
    assert set(made(settings.out)) == {f"{folder}/{name}.png" for folder in ("masks", "overlays") for name in NAMES}
    for name, file in zip(NAMES, ("a.JPG", "city.2/b.c.png", "city.2/d.webp"), strict=True):
        expected = predictor.predict(settings.pictures[0] / file)
        with Image.open(settings.out / "masks" / f"{name}.png") as mask:
            assert mask.mode == "P"
            np.testing.assert_array_equal(np.array(mask), expected)
            colour = {0: (0, 0, 255), 1: (90, 90, 90), 2: (255, 0, 0)}[int(expected[0, 0])]
            assert mask.convert("RGB").getpixel((0, 0)) == colour
        counts = np.bincount(expected.ravel(), minlength=3) / expected.size
        assert list(shares(settings.out)[name]) == list(Made.task.outputs)
        assert list(shares(settings.out)[name].values()) == pytest.approx(counts, abs=1e-6)
    task = json.loads((settings.out / "task.json").read_text())
    assert (task["task"], task["class_names"]) == ("segmentation", ["sky", "road", "car"])


def test_the_same_command_predicts_only_what_is_new_or_changed(settings: PredictSettings) -> None:
    main(settings)
    before, table = made(settings.out), (settings.out / "shares.csv").read_text()
    main(settings)
    assert made(settings.out) == before
    assert (settings.out / "shares.csv").read_text() == table
    picture = settings.pictures[0] / "a.JPG"
    Image.fromarray(pixels(7, (20, 30))).save(picture)
    later = before["masks/a.png"] + 10**9
    os.utime(picture, ns=(later, later))
    Image.fromarray(pixels(8)).save(settings.pictures[0] / "new.png")
    (settings.pictures[0] / "city.2" / "d.webp").unlink()
    main(settings)
    after = made(settings.out)
    assert {name for name, at in after.items() if before.get(name) != at} == {
        f"{folder}/{name}.png" for folder in ("masks", "overlays") for name in ("a", "new")
    }
    assert list(shares(settings.out)) == ["a", "city.2/b.c", "new"]


def test_a_picture_that_was_put_in_place_with_an_older_time_is_predicted_anew(settings: PredictSettings) -> None:
    main(settings)
    before = made(settings.out)
    picture = settings.pictures[0] / "a.JPG"
    Image.fromarray(pixels(7, (20, 30))).save(picture)
    os.utime(picture, (1, 1))
    main(settings)
    after = made(settings.out)
    assert {name for name, at in after.items() if before[name] != at} == {"masks/a.png", "overlays/a.png"}


def test_folders_behind_links_are_predicted_without_what_systems_leave(settings: PredictSettings, tmp_path: Path) -> None:
    folder = settings.pictures[0]
    (folder / "city.2").rename(tmp_path / "elsewhere")
    (folder / "city.2").symlink_to(tmp_path / "elsewhere")
    (folder / "around").symlink_to(folder)
    (folder / "__MACOSX").mkdir()
    Image.fromarray(pixels(8)).save(folder / "__MACOSX" / "a.png")
    main(settings)
    assert set(shares(settings.out)) == set(NAMES)


def test_it_goes_on_where_it_was_stopped(settings: PredictSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    main(settings)
    table = (settings.out / "shares.csv").read_text()
    predicted: list[str] = []
    original = Predictor.predict_pixels

    def counted(self: Predictor, image: Any, name: str) -> Any:
        predicted.append(Path(name).name)
        return original(self, image, name)

    monkeypatch.setattr(Predictor, "predict_pixels", counted)
    lines = table.splitlines(keepends=True)
    (settings.out / "shares.csv").write_text("".join(lines[:2]) + lines[2][:20])  # killed while the second line was written
    (settings.out / "overlays" / "city.2" / "d.png").unlink()
    main(settings)
    assert predicted == ["b.c.png", "d.webp"]
    assert (settings.out / "shares.csv").read_text() == table


def test_a_large_picture_is_refused_with_the_flag_that_admits_it(
    settings: PredictSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    few = replace(settings, prediction=PredictionSettings(max_megapixels=0.00064))  # 640 pixels
    with pytest.raises(SystemExit) as stop:
        main(few)
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert re.search(
        r"d\.webp has 22 × 30 pixels, 0\.0 megapixels, and --max-megapixels is 0\.00064: give --max-megapixels", message
    )
    assert list(shares(settings.out)) == ["a", "city.2/b.c"]
    main(settings)  # the same folder goes on with another limit, which changes no mask
    assert list(shares(settings.out)) == ["a", "city.2/b.c", "city.2/d"]


def test_a_broken_picture_is_named_and_the_others_are_done(
    settings: PredictSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    main(settings)
    (settings.pictures[0] / "a.JPG").write_bytes(b"\xff\xd8 no picture")
    with pytest.raises(SystemExit) as stop:
        main(changed(settings, out=settings.out.with_name("other")))
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert "a.JPG is truncated or unreadable" in message
    assert "1 of 3 pictures could not be predicted" in message
    assert list(shares(settings.out.with_name("other"))) == ["city.2/b.c", "city.2/d"]


def test_another_network_or_other_settings_need_another_folder(settings: PredictSettings) -> None:
    main(settings)
    before = made(settings.out)
    with pytest.raises(InputError, match=r"was started with `flip` False, now it is True: .* give another `out`"):
        main(changed(settings, flip=True))
    write_network(settings.network, seed=1)
    with pytest.raises(InputError, match=r"`network` \(content\) [0-9a-f]{12}…, now it is"):
        main(settings)
    assert made(settings.out) == before


def test_a_folder_that_was_begun_before_there_were_tiles_goes_on(settings: PredictSettings) -> None:
    main(settings)
    before, path = made(settings.out), settings.out / "settings.json"
    content = json.loads(path.read_text())
    for field in ("tile_size", "tile_overlap", "output_stride"):
        del content["identity"][field]
    path.write_text(json.dumps(content))
    main(settings)
    assert made(settings.out) == before
    with pytest.raises(InputError, match=r"`output_stride` None, now it is 8, and `tile_size` None, now it is \[17, 17\]"):
        main(changed(settings, tile_size=(17, 17), output_stride=8))


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ((), "`pictures` must name a picture or a folder"),
        (("absent",), "`pictures` .*absent does not exist"),
        (("empty",), r"folder .*empty holds no picture \(\.avif, \.bmp"),
        (("pictures/a.JPG", "other/a.png"), r"a\.JPG and .*a\.png would both become a\.png: give them as `pictures` one"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    settings: PredictSettings, pictures: tuple[str, ...], message: str
) -> None:
    folder = settings.out.parent
    for name in ("empty", "other"):
        (folder / name).mkdir()
    Image.fromarray(pixels()).save(folder / "other" / "a.png")
    with pytest.raises(InputError, match=message):
        main(changed(settings, pictures=tuple(folder / name for name in pictures)))
    assert not settings.out.exists()


def test_masks_in_the_folder_of_the_pictures_are_not_taken_for_pictures(settings: PredictSettings) -> None:
    settings = changed(settings, out=settings.pictures[0] / "out")
    main(settings)
    main(settings)
    assert list(shares(settings.out)) == list(NAMES)


def test_depths_are_16_bits_and_a_colour_map(settings: PredictSettings, tmp_path: Path) -> None:
    settings = changed(settings, network=write_network(tmp_path / "depth.safetensors", Depth(256.0)))
    main(settings)
    depths = Predictor.load(settings.network, device="cpu").predict(settings.pictures[0] / "a.JPG")
    with Image.open(settings.out / "masks" / "a.png") as mask:
        assert mask.mode == "I;16"
        np.testing.assert_allclose(np.array(mask) / 256, depths, atol=1 / 256)
    assert json.loads((settings.out / "task.json").read_text()) == {"task": "depth", "depth_scale": 256.0}
    assert sum(shares(settings.out)["a"].values()) == pytest.approx(1, abs=1e-5)
    with Image.open(settings.out / "overlays" / "a.png") as page:
        panel = np.array(page)[22 : 22 + 16 * 20, 8 : 8 + 480]
    assert len(np.unique(panel.reshape(-1, 3), axis=0)) > 10  # colours of depths, each pixel enlarged


def test_from_the_command_line(settings: PredictSettings) -> None:
    command = [sys.executable, "-m", "search.predict", "--network", str(settings.network), "--out", str(settings.out)]
    command += ["--pictures", *map(str, settings.pictures), "--scales", "1", "2", "--flip", "--pad-to", "own"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert (done.returncode, len(made(settings.out))) == (0, 6), done.stderr
    averaged = Predictor.load(settings.network, PredictionSettings(scales=(1.0, 2.0), flip=True), device="cpu")
    with Image.open(settings.out / "masks" / "a.png") as mask:
        assert len(np.unique(np.array(mask))) > 1
        np.testing.assert_array_equal(np.array(mask), averaged.predict(settings.pictures[0] / "a.JPG"))
    (settings.pictures[0] / "broken.gif").write_bytes(b"GIF89a")
    command[command.index("own")] = "33"
    done = subprocess.run([*command, "33"], capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 2
    assert "was started with --pad-to own, now it is [33, 33]" in done.stderr
