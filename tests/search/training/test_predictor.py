"""Pictures of every common kind, what a network's file says of its evaluation, and what cannot be predicted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import search.training.memory
from fast.backbone import timm_backbone
from fast.batch_norm import recompute_statistics
from fast.checkpoint import load_network, save_network
from fast.segmentation import SegmentationNetwork
from search.dense_tasks.segmentation import voc_palette
from search.errors import InputError
from search.settings import PredictionSettings
from search.training.memory import widest_layer
from search.training.predictor import Predictor
from tests.search.test_train import small_network
from tests.search.training.test_scoring import Made, Reader

NAMES = ("sky", "road", "car")


def pixels(seed: int = 0, size: tuple[int, int] = (20, 30)) -> NDArray[np.uint8]:
    """A picture of large patches with noise, in which a network sees several classes."""
    rng = np.random.default_rng(seed)
    patches = np.kron(rng.integers(8, 248, (3, 4, 3)), np.ones((-(-size[0] // 3), -(-size[1] // 4), 1), np.int64))
    return (patches[: size[0], : size[1]] + rng.integers(-8, 8, (*size, 3))).astype(np.uint8)


def varied_network(outputs: int, seed: int = 0) -> SegmentationNetwork:
    """A network whose predictions depend on the picture."""
    torch.manual_seed(seed)
    network = small_network(outputs)
    recompute_statistics(network, [torch.rand(4, 3, 33, 33) * 255])
    torch.nn.init.normal_(network.head.classifier.weight, std=3.0)
    return network.eval()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("network") / "n.safetensors"
    save_network(path, varied_network(3), task=Made.task.describe(), evaluation={"dataset": "camvid", "pad_to": (33, 65)})
    return path


# Pictures


def saved(picture: Image.Image, path: Path, **options: Any) -> Path:
    picture.save(path, **options)
    return path


def test_what_is_no_picture_is_refused(file: Path, tmp_path: Path) -> None:
    predictor = Predictor.load(file, device="cpu")
    whole = saved(Image.fromarray(pixels(size=(90, 90))), tmp_path / "a.jpg")
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:900])
    with pytest.raises(InputError, match=r"picture .*cut\.jpg is truncated or unreadable \(.*\); save it anew, as PNG"):
        predictor.predict(tmp_path / "cut.jpg")
    with pytest.raises(InputError, match=r"picture .*absent\.jpg does not exist: correct the path"):
        predictor.predict(tmp_path / "absent.jpg")
    few = Predictor.load(file, PredictionSettings(max_megapixels=0.005), device="cpu")
    with pytest.raises(InputError, match=r"a\.jpg has 90 × 90 pixels, 0\.0 megapixels, and `max_megapixels` is 0\.005: give"):
        few.predict(whole)
    with pytest.raises(InputError, match=r"^`max_megapixels` must be above 0, got 0"):
        Predictor.load(file, PredictionSettings(max_megapixels=0), device="cpu")


def test_pictures_in_memory_are_taken_as_they_are_shown(file: Path) -> None:
    predictor, image = Predictor.load(file, device="cpu"), pixels()
    turned = Image.fromarray(image).rotate(90, expand=True)
    turned.getexif()[0x112] = 6
    assert (predictor.predict(turned) == predictor.predict(image)).all()
    with pytest.raises(InputError, match=r"^the picture is transparent in places, and viewers lay it over different"):
        predictor.predict(np.dstack([image, image[..., 0]]))
    with pytest.raises(InputError, match=r"^the picture has floating-point pixels, which have no known range: save it with"):
        predictor.predict(Image.fromarray(image[..., 0].astype(np.float32)))


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32])
def test_arrays_whose_range_is_unknown_are_refused(file: Path, dtype: type) -> None:
    with pytest.raises(InputError, match=rf"a picture must be .* of uint8, got \(20, 30\) {dtype.__name__}"):
        Predictor.load(file, device="cpu").predict(np.full((20, 30), 200, dtype))


# Predictions


def test_a_path_a_picture_and_an_array_are_predicted_alike(file: Path, tmp_path: Path) -> None:
    predictor = Predictor.load(file, device="cpu")
    assert (predictor.task.outputs, predictor.dataset) == (NAMES, "camvid")
    image = pixels()
    path = saved(Image.fromarray(image), tmp_path / "a.png")
    network, mean = load_network(file)[0], predictor.network.backbone.mean
    padded = mean.expand(1, 3, 33, 65).clone()
    padded[0, :, :20, :30] = torch.from_numpy(image).permute(2, 0, 1)
    expected = network.predict(padded)[0, :20, :30].numpy()
    assert len(np.unique(expected)) > 1
    for picture in (path, str(path), Image.fromarray(image), image, np.insert(image, 3, 255, axis=2)):
        mask = predictor.predict(picture)
        assert mask.dtype == np.uint8
        assert (mask == expected).all()
    assert predictor.predict(image[..., 0]).shape == (20, 30)
    with pytest.raises(InputError, match=r"array \(H, W, 3\) of uint8, got \(20, 30, 3\) float64"):
        predictor.predict(image / 255)


def test_settings_come_before_the_file_and_larger_pictures_keep_their_size(file: Path) -> None:
    def seen(settings: PredictionSettings, size: tuple[int, int]) -> tuple[int, ...]:
        loaded, network = Predictor.load(file, settings, device="cpu"), Reader()
        Predictor(network, Made.task, settings, loaded.dataset, loaded.pad_to).predict(pixels(size=size))
        return network.seen[0][2:]

    assert seen(PredictionSettings(), (20, 30)) == (33, 65)
    assert seen(PredictionSettings(), (34, 30)) == (49, 33)
    assert seen(PredictionSettings(pad_to="own"), (20, 30)) == (33, 33)
    assert seen(PredictionSettings(pad_to=(49, 49)), (20, 30)) == (49, 49)
    with pytest.raises(InputError, match=r"picture in memory is \(50, 30\), larger than `pad_to` \(49, 49\)"):
        seen(PredictionSettings(pad_to=(49, 49)), (50, 30))


def test_a_picture_smaller_than_a_pinned_window_is_padded_to_it() -> None:
    network = Reader()
    network.head.context.pin_pooling((3, 5))
    Predictor(network, Made.task, PredictionSettings(pad_to="own")).predict(pixels(size=(20, 90)))
    assert network.seen == [(1, 3, 33, 97)]
    Predictor(network, Made.task).predict(pixels(size=(50, 30)))
    assert network.seen[1] == (1, 3, 65, 65)


@pytest.mark.parametrize(
    ("source", "evaluation", "dataset", "pad_to"),
    [
        ({}, None, None, None),
        ({"training": {"data": {"dataset": "pascal_voc"}}}, None, "pascal_voc", (513, 513)),  # as earlier versions wrote it
        ({"training": {"data": {"dataset": "shapes"}}}, None, "shapes", None),
        ({}, {"dataset": "pascal_voc", "pad_to": None}, "pascal_voc", None),
        ({}, {"dataset": "mine.toml"}, "mine.toml", None),
    ],
)
def test_the_file_says_what_it_was_trained_on(
    tmp_path: Path, source: dict[str, Any], evaluation: Any, dataset: str | None, pad_to: tuple[int, int] | None
) -> None:
    path = tmp_path / "n.safetensors"
    save_network(path, small_network(3), task={"class_names": NAMES}, source=source, evaluation=evaluation)
    predictor = Predictor.load(path, device="cpu")
    assert (predictor.dataset, predictor.padding) == (dataset, pad_to)
    assert predictor.task.describe()["palette"] == voc_palette(3).tolist()
    if dataset is None:
        assert Predictor.load(path, device="cpu", dataset="pascal_voc").padding == (513, 513)


@pytest.mark.parametrize("size", [513, "Whole", (257,), (257, 257, 3), (257.0, 257.0)], ids=str)
def test_what_is_no_size_is_refused(file: Path, size: Any) -> None:
    for field, other in (("tile_size", "whole"), ("pad_to", "own")):
        with pytest.raises(InputError, match=f"`{field}` must be a height and a width in pixels, .*, or {other}, got "):
            Predictor.load(file, PredictionSettings(**{field: size}), device="cpu")


def test_what_needs_more_memory_than_there_is_is_refused(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = tmp_path / "meminfo"
    monkeypatch.setattr(search.training.memory, "_MEMORY", memory)
    predictor = Predictor.load(file, device="cpu")
    # 33 × 65 pixels take some 14 numbers each: a picture twice, and twice the widest layer, with 3 channels before it and 4 at
    # a quarter of the pixels after it.
    memory.write_text("MemTotal:  900 kB\nMemAvailable:  117 kB\n")
    with pytest.raises(InputError, match=r"picture a\.png of 20 × 30 pixels needs about 0\.0 GB of memory"):
        predictor.predict_pixels(pixels(), "a.png")
    memory.write_text("MemTotal:  9 kB\nMemAvailable:  118 kB\n")
    assert predictor.predict(pixels()).shape == (20, 30)
    larger = Predictor.load(file, PredictionSettings(scales=(0.5, 2.0)), device="cpu")
    with pytest.raises(InputError, match="smaller `scales`"):
        larger.predict(pixels())
    memory.write_text("MemTotal:  9 kB\nMemAvailable:  472 kB\n")
    assert larger.predict(pixels()).shape == (20, 30)

    def full(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(predictor.network, "forward", full)
    with pytest.raises(InputError, match="of 20 × 30 pixels needs more memory than the device has: give `tile_size` 33 33"):
        predictor.predict(pixels())


def test_the_widest_layer_is_that_of_the_largest_maps() -> None:
    mobilenet = timm_backbone("mobilenetv2_100", weights_origin="tensorflow")
    # 96 channels at stride 2 before and after a norm: 65 × 65 of 129 × 129.
    assert widest_layer(mobilenet) == 2 * 96 * (65 / 129) ** 2
    assert not any(module._forward_hooks for module in mobilenet.modules())


def test_files_that_are_no_networks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"absent\.safetensors.*`network` takes what .*train and, of a search's head, .*join write",
    ):
        Predictor.load(tmp_path / "absent.safetensors")
    save_network(tmp_path / "n.safetensors", small_network(3), task={})
    with pytest.raises(InputError, match="does not say what its outputs are: train or convert it again"):
        Predictor.load(tmp_path / "n.safetensors")
    with pytest.raises(InputError, match="`scales` must be numbers above 0"):
        Predictor.load(tmp_path / "n.safetensors", PredictionSettings(scales=(0.0,)))


def test_the_description_is_plain_json(file: Path) -> None:
    description = load_network(file)[1]
    assert json.loads(json.dumps(description["evaluation"])) == {"dataset": "camvid", "pad_to": [33, 65]}
