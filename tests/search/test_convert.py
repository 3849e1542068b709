"""Held to the authors' own run in ../shared/golden/models, and to `authors_deeplab`, a second writing of their graph."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import search.evaluate
from fast.bilinear_resize import bilinear_resize
from fast.checkpoint import load_network, save_network
from fast.segmentation import SegmentationNetwork, predict_scales
from reference.cell import Cell
from search.cells.space import load_cell
from search.convert import ConvertSettings, main
from search.errors import InputError
from search.evaluate import EvaluateSettings
from search.tensorflow.deeplab import Conversion, convert
from search.tensorflow.tensor_bundle import TensorBundle
from tests.golden.authors_dumps import SHARED
from tests.search import dataset_folders as made
from tests.search.authors_deeplab import AuthorsDeepLab, Variables, random_variables, variable_shapes
from tests.search.composed import composed
from tests.search.made_bundle import slots, write_bundle

GOLDEN = SHARED / "models" / "mnv2_dpc_os16"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no ../shared/golden/models beside the repository")

LOGITS_BOUND = 5e-4  # the authors' run, absolute, on logits up to 2: two float32 computations through 60 convolutions
MADE_BOUND = 1e-5  # on logits below 1 in float64, as against float32: 20 times what rounding gave; a wrong epsilon gives 6e-4
PROBABILITY_BOUND = 1e-5  # of means of softmax: less than the logits' by the softmax's slope of at most 1/4, and no bias in it


def convert_variables(variables: Variables, cell: Cell | None = None, **arguments: Any) -> Conversion:
    shapes = {name: array.shape for name, array in variables.items()}
    return convert(shapes, variables.__getitem__, cell=cell or load_cell("dpc"), **arguments)


def golden_network(output_stride: int, crop_size: tuple[int, int] | None = None) -> SegmentationNetwork:
    bundle = TensorBundle(GOLDEN)
    shapes = {name: entry.shape for name, entry in bundle.entries.items()}
    options: dict[str, Any] = {"output_stride": output_stride, "image_pooling_crop_size": crop_size}
    return convert(shapes, bundle.read, cell=load_cell("dpc"), **options).network


def golden_arrays(name: str) -> dict[str, Any]:
    with np.load(GOLDEN / name) as file:
        return dict(file)


def nchw(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2))).float()


@needs_golden
@pytest.mark.parametrize(("name", "output_stride"), [("in129x129", 16), ("in129x193", 16), ("in129x129_os8", 8)])
def test_golden_logits(name: str, output_stride: int) -> None:
    network, arrays = golden_network(output_stride), golden_arrays(f"{name}.npz")
    images = nchw(arrays["image"])
    with torch.no_grad():
        features = network.backbone(images)
        context = network.head.context(features)
        logits = network(images)
        full = bilinear_resize(logits, (images.shape[2], images.shape[3]))
    for actual, key in ((features, "backbone"), (context, "cell"), (logits, "logits_os"), (full, "logits_full")):
        np.testing.assert_allclose(actual, nchw(arrays[key]), rtol=0, atol=LOGITS_BOUND, err_msg=key)
    best = nchw(arrays["logits_full"]).gather(1, network.predict(images)[:, None])
    assert (best[:, 0] >= nchw(arrays["logits_full"]).amax(dim=1) - 2 * LOGITS_BOUND).all()


@needs_golden
@pytest.mark.parametrize("pinned", [None, (513, 769)])
def test_a_converted_network_at_output_stride_8_is_as_converted_for_it(tmp_path: Path, pinned: tuple[int, int] | None) -> None:
    path, images = tmp_path / "n.safetensors", nchw(golden_arrays("in129x129_os8.npz")["image"])
    save_network(path, golden_network(16, pinned), task={"class_names": [str(i) for i in range(19)]})
    finer, expected = load_network(path, output_stride=8)[0], golden_network(8, pinned)
    assert finer.head.context.pooling_size == expected.head.context.pooling_size
    finer.head.context.pin_pooling(None)
    expected.head.context.pin_pooling(None)
    with torch.no_grad():
        assert torch.equal(finer(images), expected(images))


@needs_golden
def test_golden_scales_and_flip() -> None:
    arrays = golden_arrays("ms075-100-125_flip_129x193.npz")
    probabilities = predict_scales(golden_network(16), nchw(arrays["image"]), scales=(0.75, 1.0, 1.25), flip=True)
    expected = nchw(arrays["softmax_of_mean_prob"])  # the authors' `semantic_prob` is softmax of the mean of softmaxes
    np.testing.assert_allclose(probabilities.softmax(dim=1), expected, rtol=0, atol=PROBABILITY_BOUND)
    differs = probabilities.argmax(dim=1) != torch.from_numpy(arrays["pred"]).long()
    top = probabilities.topk(2, dim=1).values
    assert (top[:, 0] - top[:, 1])[differs].lt(PROBABILITY_BOUND).all()  # only where rounding decides


@needs_golden
def test_golden_variables_are_all_accounted_for() -> None:
    listed = [line.split("\t")[0] for line in (GOLDEN / "variables.txt").read_text().splitlines() if line[0] != "#"]
    bundle = TensorBundle(GOLDEN / "model.ckpt")
    shapes = {name: entry.shape for name, entry in bundle.entries.items()}
    network, used, skipped = convert(shapes, bundle.read, cell=load_cell("dpc"))
    assert sorted([*used, *skipped]) == sorted(listed)
    assert len(used) == 312
    assert {name for name in skipped if not name.endswith("/Momentum")} == {"global_step"}
    norms = {name: m.eps for name, m in network.named_modules() if isinstance(m, torch.nn.BatchNorm2d)}
    assert {eps for name, eps in norms.items() if name.startswith("backbone.")} == {1e-3}
    assert {eps for name, eps in norms.items() if name.startswith("head.")} == {1e-5}


@pytest.mark.parametrize(
    ("variant", "context", "decoder", "output_stride", "size"),
    [
        ("MobilenetV2", "dpc", True, 16, (66, 98)),  # even sizes: SAME pads at the bottom and right only
        ("MobilenetV2", "aspp", False, 8, (50, 65)),
        ("MobilenetV2", "image_pooling", False, 16, (65, 65)),
        ("xception_41", "aspp", False, 16, (66, 50)),
        ("xception_65", "aspp", True, 16, (66, 49)),  # even sizes: fixed padding on both sides
        ("xception_71", "dpc", True, 8, (33, 50)),
    ],
)
def test_network_computes_what_the_authors_graph_does(
    variant: str, context: str, decoder: bool, output_stride: int, size: tuple[int, int]
) -> None:
    variables = random_variables(variable_shapes(variant, context=context, decoder=decoder))
    network, used, skipped = convert_variables(variables, output_stride=output_stride)
    assert (sorted(used), skipped) == (sorted(variables), {})
    images = torch.randint(256, (1, 3, *size), generator=torch.Generator().manual_seed(0)).float()
    expected = AuthorsDeepLab(variant, variables, output_stride).logits(images)
    with torch.no_grad():
        logits = network(images)
    assert network.logits_stride == (4 if decoder else output_stride)
    assert 0.3 < expected.abs().max() < 1  # so that the bound means something
    np.testing.assert_allclose(logits, expected, rtol=0, atol=MADE_BOUND)


@pytest.fixture(scope="module")
def mobilenet() -> Variables:
    return random_variables(variable_shapes("MobilenetV2", context="dpc", decoder=False))


def test_command_writes_a_network_that_loads_alone(
    tmp_path: Path, mobilenet: Variables, capsys: pytest.CaptureFixture[str]
) -> None:
    arrays = {**mobilenet, **slots(mobilenet), "global_step": np.array(90000)}
    arrays["MobilenetV2/Conv_1/weights"] = np.zeros((1, 1, 320, 1280), np.float32)
    write_bundle(tmp_path / "model.ckpt-90000", arrays)
    out = tmp_path / "made" / "network.safetensors"
    main(ConvertSettings(checkpoint=tmp_path / "model.ckpt-90000", out=out, output_stride=8, show_skipped=True))
    printed = capsys.readouterr().out
    trainable = len(slots(mobilenet))
    assert f"{len(mobilenet)} variables used, {trainable + 2} skipped:" in printed
    assert f"{trainable:6d}  state of the optimizer (Momentum)" in printed
    assert "MobilenetV2/Conv_1/weights: classifier of the pretraining" in printed
    assert "global_step: count of training steps" in printed
    network, description = load_network(out)
    assert description["class_names"] == [f"class {i}" for i in range(5)]
    assert description["source"]["checkpoint"] == "model.ckpt-90000"
    images = torch.randint(256, (1, 3, 34, 49), generator=torch.Generator().manual_seed(0)).float()
    with torch.no_grad():
        assert torch.equal(network(images), convert_variables(mobilenet, output_stride=8).network(images))


def test_moving_averages_are_taken_on_demand(mobilenet: Variables) -> None:
    averaged = "meta_architecture/branch0_pointwise/weights"
    variables = {**mobilenet, f"{averaged}/ExponentialMovingAverage": mobilenet[averaged] + 1}
    variables |= {f"{averaged}/Momentum": mobilenet[averaged]}
    last, average = convert_variables(variables), convert_variables(variables, moving_averages=True)
    difference = {
        key: value - last.network.state_dict()[key] for key, value in average.network.state_dict().items() if value.ndim
    }
    for key, values in difference.items():
        expected = 1.0 if key == "head.context.branches.0.pointwise.weight" else 0.0
        assert torch.allclose(values, torch.full_like(values, expected), rtol=0, atol=1e-6), key  # (x + 1) − x in float32
    assert set(last.skipped) == {f"{averaged}/Momentum", f"{averaged}/ExponentialMovingAverage"}
    assert set(average.skipped) == {f"{averaged}/Momentum", averaged}
    assert f"{averaged}/ExponentialMovingAverage" in average.used
    with pytest.raises(InputError, match="holds no moving averages"):
        convert_variables(mobilenet, moving_averages=True)


def test_pooling_is_pinned_to_the_crop_of_the_training() -> None:
    variables = random_variables(variable_shapes("MobilenetV2", context="image_pooling", decoder=False))
    free, pinned = (convert_variables(variables, image_pooling_crop_size=crop).network for crop in (None, (65, 66)))
    assert pinned.head.context.pooling_size == (5, 5)  # ceil(66 / 16)
    images = torch.randint(256, (1, 3, 97, 97), generator=torch.Generator().manual_seed(0)).float()
    with torch.no_grad():
        # The authors' code at this crop: windows of 5 × 5 in a map of 7 × 7.
        features = pinned.backbone(images)
        branch: Any = next(branch for branch in pinned.head.context.branches if hasattr(branch, "pooling"))
        means = torch.nn.functional.avg_pool2d(features, 5, stride=1)
        conv: Any = branch.pointwise
        expected = bilinear_resize(conv.norm(torch.nn.functional.conv2d(means, conv.weight)).relu(), (7, 7))
        np.testing.assert_allclose(branch(features), expected, rtol=0, atol=MADE_BOUND)
        assert (free(images) - pinned(images)).abs().max() > 1e-4
        assert torch.equal(free(images[..., :65, :66]), pinned(images[..., :65, :66]))
    with pytest.raises(InputError, match="`image_pooling_crop_size` must be"):
        main(ConvertSettings(checkpoint=Path("x"), out=Path("y"), image_pooling_crop_size=(513, 0)))


@pytest.mark.parametrize(
    ("classes", "evaluation"),
    [
        (21, {"dataset": "pascal_voc", "pad_to": [513, 513]}),
        (19, {"dataset": "cityscapes", "pad_to": None}),
        (5, {}),
    ],
)
def test_the_file_says_how_the_authors_evaluate(tmp_path: Path, classes: int, evaluation: dict[str, Any]) -> None:
    variables = random_variables(variable_shapes("MobilenetV2", context="image_pooling", decoder=False))
    weights = variables["logits/semantic/weights"]
    variables["logits/semantic/weights"] = np.zeros((*weights.shape[:3], classes), np.float32)
    variables["logits/semantic/biases"] = np.zeros(classes, np.float32)
    np.savez(tmp_path / "variables.npz", **variables)  # type: ignore[arg-type]  # it has no argument of such a name
    main(ConvertSettings(checkpoint=tmp_path / "variables.npz", out=tmp_path / "n.safetensors"))
    assert load_network(tmp_path / "n.safetensors")[1]["evaluation"] == evaluation
    (tmp_path / "broken.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"`checkpoint` .*broken\.npz cannot be read"):
        main(ConvertSettings(checkpoint=tmp_path / "broken.npz", out=tmp_path / "n.safetensors"))


TRAINED = made.SHARED / "weights" / "deeplabv3_mnv2_pascal_float.npz"
SAMPLES = made.SHARED / "samples" / "pascal_voc" / "VOCdevkit" / "VOC2012"


@pytest.mark.skipif(not TRAINED.is_file(), reason="the authors' trained weights of ../shared are not on this machine")
def test_a_trained_network_of_the_authors_scores_as_it_did_there(tmp_path: Path) -> None:
    """Google's DeepLabv3 with MobileNet-v2, trained for VOC: mIOU on five of VOC's validation pictures."""
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    made.write_list(
        voc / "ImageSets" / "Segmentation" / "val.txt",
        (SAMPLES / "ImageSets" / "Segmentation" / "sample.txt").read_text().split(),
    )
    for folder in ("JPEGImages", "SegmentationClass"):
        (voc / folder).symlink_to(SAMPLES / folder)
    path = tmp_path / "voc.safetensors"
    main(ConvertSettings(checkpoint=TRAINED, out=path))
    scores = []
    for pad_to in (None, "own", (513, 513)):
        out = tmp_path / "scores.json"
        search.evaluate.main(composed(EvaluateSettings, network=path, data_dir=tmp_path, pad_to=pad_to, out=out, device="cpu"))
        scores.append(100 * json.loads(out.read_text())["mean_iou"])
    # Two hundredths of a percent: a few pixels of five pictures, which another order of sums may decide otherwise.
    assert scores == pytest.approx([46.29, 43.50, 46.29], abs=0.02)


def changed(variables: Variables, change: str) -> Variables:
    gamma = "MobilenetV2/expanded_conv_3/expand/BatchNorm/gamma"
    edits: dict[str, tuple[dict[str, Any], str | None]] = {
        "lacks": ({}, gamma),
        "unknown": ({"MobilenetV2/surprise": np.zeros(3)}, None),
        "stray slot": ({"MobilenetV2/surprise/Momentum": np.zeros(3)}, None),
        "stray average": ({"MobilenetV2/surprise/ExponentialMovingAverage": np.zeros(3)}, None),
        "shape": ({gamma: np.zeros(7, np.float32)}, None),
        "nan": ({gamma: np.full(144, np.nan, np.float32)}, None),
        "two backbones": ({"xception_65/entry_flow/conv1_1/weights": np.zeros((3, 3, 3, 32))}, None),
        "no classes": ({}, "logits/semantic/biases"),
    }
    added, removed = edits[change]
    return {name: array for name, array in {**variables, **added}.items() if name != removed}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lacks", r"lacks the variable MobilenetV2/expanded_conv_3/expand/BatchNorm/gamma of mobilenetv2_100"),
        ("unknown", r"has the variable MobilenetV2/surprise, which would be no weight"),
        ("stray slot", r"has the variable MobilenetV2/surprise/Momentum, which would be no weight"),
        ("stray average", r"has the variable MobilenetV2/surprise/ExponentialMovingAverage, which would be no weight"),
        ("shape", r"expand/BatchNorm/gamma has the shape \[7\], not \[144\]"),
        ("nan", r"expand/BatchNorm/gamma holds values that are not finite"),
        ("two backbones", r"this has MobilenetV2 and xception_65"),
        ("no classes", r"lacks the variable logits/semantic/biases"),
    ],
)
def test_variables_that_do_not_fit_are_named(mobilenet: Variables, change: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        convert_variables(changed(mobilenet, change))


def test_another_cell_is_refused(mobilenet: Variables) -> None:
    with pytest.raises(InputError, match=r"lacks 5 variables \(meta_architecture/branch0/BatchNorm.*trained with another"):
        convert_variables(
            mobilenet, load_cell("aspp").__class__(load_cell("aspp").branches[:1] + load_cell("dpc").branches[1:])
        )


def test_rates_of_aspp_must_be_as_many_as_its_convolutions() -> None:
    variables = random_variables(variable_shapes("MobilenetV2", context="aspp", decoder=False))
    with pytest.raises(InputError, match=r"has 3 atrous convolutions: give `atrous_rates`"):
        convert_variables(variables, atrous_rates=(6, 12))


def test_rates_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="`atrous_rates` 0 6: give numbers of at least 1"):
        main(ConvertSettings(checkpoint=tmp_path, out=tmp_path / "out", atrous_rates=(0, 6)))


def test_a_checkpoint_without_context_or_backbone_is_refused(mobilenet: Variables) -> None:
    backbone = {name: array for name, array in mobilenet.items() if name.startswith("MobilenetV2/")}
    with pytest.raises(InputError, match="neither a cell"):
        convert_variables(backbone)
    with pytest.raises(InputError, match=r"this has none \(top scopes: resnet_v1_50\)"):
        convert_variables({"resnet_v1_50/conv1/weights": np.zeros((7, 7, 3, 64), np.float32)})


def test_class_names_must_be_as_many_as_classes(tmp_path: Path, mobilenet: Variables) -> None:
    write_bundle(tmp_path / "model.ckpt", mobilenet)
    out = tmp_path / "network.safetensors"
    with pytest.raises(InputError, match="has 5 classes: give as many `class_names`, got 2"):
        main(ConvertSettings(checkpoint=tmp_path, out=out, class_names=("a", "b")))
    main(ConvertSettings(checkpoint=tmp_path, out=out, class_names=("a", "b", "c", "d", "e")))
    assert load_network(out)[1]["class_names"] == ["a", "b", "c", "d", "e"]


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "search.convert", "--checkpoint", str(tmp_path / "absent.ckpt"), "--out", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "absent.ckpt.index does not exist" in done.stderr
    assert len(done.stderr.splitlines()) == 1
