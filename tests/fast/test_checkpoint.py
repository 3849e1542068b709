import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from fast import Decoder, DensePredictionCell, SegmentationHead, SegmentationNetwork
from fast.backbone import Backbone, plain_backbone, timm_backbone
from fast.batch_norm import MOMENTUM, authors_norm, recompute_statistics
from fast.checkpoint import (
    FORMAT,
    NETWORK_FORMAT,
    describe_file,
    load_backbone,
    load_context,
    load_head,
    load_network,
    save_context,
    save_head,
    save_network,
)
from fast.timm_models import cut_of
from reference.cell import BACKBONE_FEATURE, AtrousSeparableConv, Branch, Cell, Conv1x1, PyramidPooling
from reference.pyramid_pooling import PoolingVariant

CELL = Cell(
    (
        Branch(BACKBONE_FEATURE, AtrousSeparableConv(rate=(6, 3))),
        Branch(0, PyramidPooling(grid_size=(2, 4))),
        Branch(BACKBONE_FEATURE, Conv1x1()),
    )
)
CLASSES = ("sky", "road", "öther")
BACKBONE = {"name": "mobilenetv2_100", "weights_hash": "0123", "output_stride": 8}


def trained_head(pooling: PoolingVariant = "sliding_window", pooling_size: tuple[int, int] | None = None) -> SegmentationHead:
    """After one step, so that running statistics are not the initial ones."""
    torch.manual_seed(0)
    context = DensePredictionCell(
        CELL,
        3,
        branch_channels=4,
        cell_channels=5,
        output_stride=8,
        dropout_rate=0.3,
        pooling=pooling,
        pooling_size=pooling_size,
    )
    head = SegmentationHead(context, len(CLASSES)).train()
    head(torch.randn(2, 3, 5, 6))
    return head


def save(path: Path, **arguments: Any) -> SegmentationHead:
    head = trained_head(**arguments)
    save_head(path, head, task={"class_names": CLASSES}, backbone=BACKBONE)
    return head


@pytest.mark.parametrize(
    "arguments", [{}, {"pooling": "grid_cells"}, {"pooling_size": (4, 5)}], ids=["default", "grid_cells", "pinned"]
)
def test_round_trip(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """From the file alone: weights, statistics, architecture, options and description."""
    path = tmp_path / "new" / "folder" / "head.safetensors"
    head = save(path, **arguments)
    loaded, description = load_head(path)
    assert not any(module.training for module in loaded.modules())
    assert loaded.context.cell == CELL
    assert (loaded.context.output_stride, loaded.context.dropout.p) == (8, 0.3)
    assert (loaded.context.pooling, loaded.context.pooling_size) == (head.context.pooling, head.context.pooling_size)
    assert (tuple(description["class_names"]), description["backbone"]) == (CLASSES, BACKBONE)
    state = head.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, state[key]), key
    features = torch.randn(1, 3, 7, 6)
    assert torch.equal(loaded(features), head.eval()(features))
    for build, momentum in ((nn.BatchNorm2d, 0.1), (authors_norm, MOMENTUM)):
        norms = [part for part in load_head(path, norm_layer=build)[0].modules() if isinstance(part, nn.BatchNorm2d)]
        assert {norm.momentum for norm in norms} == {momentum}


def with_another_epsilon(head: SegmentationHead) -> None:
    cast(nn.BatchNorm2d, head.context.projection.norm).eps = 1e-3


def with_another_rate(head: SegmentationHead) -> None:
    conv = cast(nn.Conv2d, head.context.get_submodule("branches.0.depthwise"))
    conv.dilation = conv.padding = (2, 2)


class OwnNorm(nn.BatchNorm2d):
    """With the weights of the norm that is built, of which a subclass may compute something else."""


UNDESCRIBED: dict[str, tuple[Callable[[SegmentationHead], Any], str]] = {
    "norm": (lambda head: setattr(head.context.projection, "norm", nn.GroupNorm(1, 5)), "context.projection.norm"),
    "no norm": (lambda head: setattr(head.context.projection, "norm", nn.Identity()), "context.projection.norm"),
    "branch": (lambda head: head.context.set_submodule("branches.1", nn.Identity()), "context.branches.1.pointwise"),
    "weight norm": (lambda head: weight_norm(head.classifier), "classifier"),
    "epsilon": (with_another_epsilon, "context.projection.norm"),
    "own norm": (lambda head: setattr(head.context.projection, "norm", OwnNorm(5)), "context.projection.norm"),
    "rate": (with_another_rate, "context.branches.0.depthwise"),
}


@pytest.mark.parametrize("change", UNDESCRIBED)
def test_what_a_file_cannot_describe_is_not_saved(tmp_path: Path, change: str) -> None:
    head, path = trained_head(), tmp_path / "head.safetensors"
    apply, name = UNDESCRIBED[change]
    apply(head)
    with pytest.raises(ValueError, match=f"a file cannot describe {re.escape(name)} of this SegmentationHead"):
        save_head(path, head, task={"class_names": CLASSES}, backbone=BACKBONE)
    assert not path.exists()


def test_a_network_with_an_undescribed_decoder_is_not_saved(tmp_path: Path) -> None:
    network = trained_network(decoder=True)
    assert network.decoder is not None
    network.decoder.projection.norm = nn.GroupNorm(1, 3)
    with pytest.raises(ValueError, match=r"a file cannot describe projection\.norm of this Decoder"):
        save_network(tmp_path / "network.safetensors", network, task={"class_names": CLASSES})


@pytest.mark.parametrize("cell", [Cell(()), Cell((Branch(-2, Conv1x1()), *CELL.branches[:1]))], ids=["no branches", "second"])
@pytest.mark.parametrize("in_channels", [(3, 2), (3, 2, 4)], ids=str)
def test_round_trip_of_several_layers(tmp_path: Path, cell: Cell, in_channels: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    context = DensePredictionCell(cell, in_channels, branch_channels=4, cell_channels=5)
    head, path = SegmentationHead(context, len(CLASSES)).train(), tmp_path / "head.safetensors"
    features = torch.randn(2, sum(in_channels), 5, 6)
    head(features)
    save_head(path, head, task={"class_names": CLASSES}, backbone=BACKBONE)
    loaded, description = load_head(path)
    assert description["in_channels"] == list(in_channels)
    assert loaded.context.input_channels == load_context(path).input_channels == in_channels
    assert torch.equal(loaded(features), head.eval()(features))


def test_a_head_fits_the_layers_of_its_backbone_alone() -> None:
    backbone = plain_backbone("tiny", (3, 4, 4, 6), output_stride=16)
    head = SegmentationHead(DensePredictionCell(CELL, (4, 2), branch_channels=4), 2)
    message = r"head was built for 4 \+ 2 channels at output stride 16, backbone tiny gives 6 at 16"
    with pytest.raises(ValueError, match=message):
        SegmentationNetwork(backbone, head)


@pytest.mark.parametrize("dropout", [nn.Identity(), nn.Dropout2d(0.2)])
def test_what_computes_the_same_is_saved(tmp_path: Path, dropout: nn.Module) -> None:
    """Norms that were synchronised, and another dropout, are no others once the training is over."""
    head, path = trained_head().eval(), tmp_path / "head.safetensors"
    features = torch.randn(1, 3, 7, 6)
    expected = head(features)
    head.context.set_submodule("dropout", dropout)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(head)  # type: ignore[no-untyped-call]
    save_head(path, synchronised, task={"class_names": CLASSES}, backbone=BACKBONE)
    loaded, _ = load_head(path)
    assert torch.equal(loaded(features), expected)
    assert loaded.context.dropout.p == getattr(dropout, "p", 0.0)


def test_nothing_but_the_file_is_left(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    save(path)
    save(path)
    assert list(tmp_path.iterdir()) == [path]


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "head.safetensors"
    save(path)
    before = path.read_bytes()

    def full(file: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save(tmp_path / "head.safetensors")
    assert (tmp_path / "head.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "head.safetensors"
    save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"head .*head\.safetensors cannot be read as safetensors"):
        load_head(path)


@pytest.mark.parametrize("content", [b"not a head", b"\x80\x04\x95" + bytes(100), b"\xff" * 100])
def test_foreign_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "head.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"head .*head\.safetensors cannot be read as safetensors"):
        load_head(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"head .*absent\.safetensors cannot be read"):
        load_head(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_other_safetensors_are_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"other\.safetensors is not in the format 'dense-prediction-cell head 1'"):
        load_head(path)


@pytest.mark.parametrize("change", ["lacks", "unknown", "other shape"])
def test_weights_that_do_not_fit_the_description_are_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "head.safetensors"
    save(path)
    description, state = json.dumps(load_head(path)[1]), load_file(path)
    if change == "lacks":
        del state["classifier.bias"]
    else:
        state["classifier.bias" if change == "other shape" else "unknown"] = torch.zeros(7)
    save_file(state, path, metadata={"format": FORMAT, "description": description})
    with pytest.raises(ValueError, match=r"head\.safetensors does not hold the weights that its description names"):
        load_head(path)


@pytest.mark.parametrize(("value", "words"), [(float("nan"), "NaN"), (float("inf"), "infinite numbers")])
def test_weights_that_are_not_finite_are_called_that(tmp_path: Path, value: float, words: str) -> None:
    path = tmp_path / "head.safetensors"
    save(path)
    description, state = json.dumps(load_head(path)[1]), load_file(path)
    state["classifier.bias"].fill_(value)
    save_file(state, path, metadata={"format": FORMAT, "description": description})
    with pytest.raises(ValueError, match=rf"head\.safetensors has {words} in 1 of \d+ tensors, first 'classifier\.bias'$"):
        load_head(path)


DAMAGES: dict[str, tuple[Any, str]] = {  # by field: another value, or None for none; and what is said of it
    "pooling_size": (None, "lacks the field 'pooling_size'"),
    "outputs": ("many", "cannot be used: "),
    "cell": ([{"op": "conv", "kernel": 9, "input": -1}], "cannot be used: .*kernel"),
    "in_channels": ("three", "cannot be used: "),
    "dropout_rate": (2.0, "cannot be used: .*dropout_rate"),
}


@pytest.mark.parametrize("field", DAMAGES)
@pytest.mark.parametrize("load", [load_head, load_context])
def test_a_description_that_cannot_be_used_is_refused(tmp_path: Path, field: str, load: Any) -> None:
    path, (value, words) = tmp_path / "head.safetensors", DAMAGES[field]
    save(path)
    description, state = load_head(path)[1], load_file(path)
    description |= {field: value}
    if value is None:
        del description[field]
    save_file(state, path, metadata={"format": FORMAT, "description": json.dumps(description)})
    with pytest.raises(ValueError, match=rf"head.*head\.safetensors has a description that {words}"):
        load(path)


@pytest.mark.parametrize("change", [{"backbone": {}}, {"decoder": {"surprise": 1}}, {"backbone": {"name": "no_such_model"}}])
def test_a_networks_description_that_cannot_be_used_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "network.safetensors"
    save_network(path, trained_network(decoder=True), task={"class_names": CLASSES})
    text, state = json.dumps(load_network(path)[1] | change), load_file(path)
    save_file(state, path, metadata={"format": NETWORK_FORMAT, "description": text})
    with pytest.raises(ValueError, match=r"network .*network\.safetensors has a description that "):
        load_network(path)


def test_a_description_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    save_file({"weight": torch.zeros(2)}, path, metadata={"format": FORMAT, "description": "{"})
    with pytest.raises(ValueError, match=r"head .*head\.safetensors has a description that cannot be used"):
        load_head(path)


def test_loading_draws_no_random_numbers(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    save(path)
    state = torch.random.get_rng_state()
    load_head(path)
    assert torch.equal(torch.random.get_rng_state(), state)


def trained_network(*, decoder: bool, output_stride: int = 8) -> SegmentationNetwork:
    """After one step, so that running statistics are not the initial ones."""
    torch.manual_seed(0)
    backbone = timm_backbone("mobilenetv2_035", output_stride=output_stride, weights_origin="tensorflow", low_level=decoder)
    backbone.mean.fill_(100.0)
    context = DensePredictionCell(
        CELL, backbone.channels, branch_channels=4, cell_channels=5, output_stride=output_stride, dropout_rate=0.3
    )
    parts = Decoder(backbone.low_level.channels, channels=5, projected_channels=3) if backbone.low_level else None
    network = SegmentationNetwork(backbone, SegmentationHead(context, len(CLASSES)), parts).train()
    network(torch.rand(2, 3, 33, 40) * 255)
    return network


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("output_stride", [8, 16])
def test_network_round_trip(tmp_path: Path, decoder: bool, output_stride: int) -> None:
    """From the file alone: even sizes too, where the padding of the weights' origin shows."""
    network, path = trained_network(decoder=decoder, output_stride=output_stride), tmp_path / "new" / "network.safetensors"
    save_network(path, network, task={"class_names": CLASSES}, source={"data": "made"})
    loaded, description = load_network(path)
    assert list(path.parent.iterdir()) == [path]
    assert not any(module.training for module in loaded.modules())
    assert (tuple(description["class_names"]), description["source"]) == (CLASSES, {"data": "made"})
    assert loaded.head.context.cell == CELL
    assert (loaded.logits_stride, loaded.backbone.output_stride) == (4 if decoder else output_stride, output_stride)
    for key, value in network.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key
    images = torch.rand(1, 3, 34, 50) * 255
    with torch.no_grad():
        assert torch.equal(loaded(images), network.eval()(images))


def network_on(backbone: Backbone) -> SegmentationNetwork:
    context = DensePredictionCell(
        CELL, backbone.layer_channels, branch_channels=4, cell_channels=4, output_stride=backbone.output_stride
    )
    return SegmentationNetwork(backbone, SegmentationHead(context, len(CLASSES))).eval()


NOT_AS_BEFORE = ("align_corners", "layers", "deepest", "patch_size")
ON_OTHER_GRIDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "blocks": ({"name": "test_vit", "layers": (-1, -4)}, {"align_corners": False, "layers": [-1, -4]}),
    "other patches": ({"name": "test_vit", "patch_size": 14}, {"align_corners": False, "patch_size": 14}),
    "a stage": ({"name": "test_convnext"}, {"align_corners": False, "deepest": -2}),
    "stages": ({"name": "efficientvit_b0", "layers": (-1, -2)}, {"layers": [-1, -2], "deepest": -2}),
    "as before": ({"name": "resnet18"}, {}),
}


@pytest.mark.parametrize(("arguments", "fields"), ON_OTHER_GRIDS.values(), ids=ON_OTHER_GRIDS.keys())
def test_layers_patches_and_grid_are_in_the_file(tmp_path: Path, arguments: dict[str, Any], fields: dict[str, Any]) -> None:
    network, path = network_on(timm_backbone(**arguments)), tmp_path / "network.safetensors"
    save_network(path, network, task={"class_names": CLASSES})
    cut_of.cache_clear()
    loaded, description = load_network(path)
    backbone = load_backbone(path)
    assert cut_of.cache_info().misses == 0  # nothing was measured
    assert {key: description["backbone"][key] for key in NOT_AS_BEFORE if key in description["backbone"]} == fields
    assert loaded.backbone.cut == backbone.cut == network.backbone.cut
    height, width = backbone.grid.pixels((3, 4))
    images = torch.rand(1, 3, height, width) * 255
    with torch.no_grad():
        assert torch.equal(loaded(images), network(images))
        assert torch.equal(backbone(images), network.backbone(images))


def test_a_network_on_a_stage_has_one_output_stride(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    save_network(path, network_on(timm_backbone("test_convnext")), task={"class_names": CLASSES})
    expected = r"network\.safetensors cannot be used at output stride {}: backbone 'test_convnext' gives .* at 16 alone$"
    for load, output_stride in itertools.product((load_network, load_backbone), (8, 12)):
        with pytest.raises(ValueError, match=expected.format(output_stride)):
            load(path, output_stride=output_stride)


def test_a_network_is_not_used_at_a_stride_that_timm_does_not_build(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    save_network(path, network_on(timm_backbone("mobilenetv3_small_050")), task={"class_names": CLASSES})
    with pytest.raises(
        ValueError,
        match=r"network\.safetensors cannot be used at output stride 12: timm builds .* at output stride \d+ instead",
    ):
        load_network(path, output_stride=12)


def test_a_cnn_that_cannot_be_dilated_has_one_output_stride(tmp_path: Path) -> None:
    """Its features lie on corners, as those of CNNs that can be."""
    path = tmp_path / "network.safetensors"
    save_network(path, network_on(timm_backbone("efficientvit_b0", output_stride=32)), task={"class_names": CLASSES})
    for load in (load_network, load_backbone):
        with pytest.raises(ValueError, match="timm builds backbone 'efficientvit_b0' at output stride 32 instead"):
            load(path, output_stride=16)


def network_without_pooling(name: str) -> SegmentationNetwork:
    torch.manual_seed(0)
    if name == "plain":
        backbone = plain_backbone("plain", (4, 6, 8, 8, 8, 8), output_stride=16)  # two layers behind the last stride
    else:
        backbone = timm_backbone(name, output_stride=16)
    cell = Cell.from_json(
        '[{"op": "conv", "kernel": 3, "rate": [1, 3], "input": -1}, {"op": "conv", "kernel": 3, "rate": [3, 1], "input": 0}]'
    )
    head = SegmentationHead(DensePredictionCell(cell, backbone.channels, branch_channels=4, cell_channels=4), len(CLASSES))
    network = SegmentationNetwork(backbone, head)
    recompute_statistics(network, [torch.rand(2, 3, 129, 129) * 255])
    torch.nn.init.normal_(head.classifier.weight)
    return network.eval()


@pytest.mark.parametrize("name", ["plain", "mobilenetv2_035", "resnet18", "xception41"])
def test_at_output_stride_8_a_network_samples_what_it_was_trained_on_at_16(tmp_path: Path, name: str) -> None:
    """By the definition of atrous convolution every second of the finer logits is one of the coarser ones."""
    network, path = network_without_pooling(name), tmp_path / "network.safetensors"
    save_network(path, network, task={"class_names": CLASSES})
    content = path.read_bytes()
    finer, description = load_network(path, output_stride=8)
    images = torch.rand(1, 3, 97, 129) * 255
    with torch.no_grad():
        expected, actual = network(images), finer(images)
    assert actual.shape[2:] == (13, 17)
    assert expected.std() > 0.1
    torch.testing.assert_close(actual[:, :, ::2, ::2], expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert (description["output_stride"], description["backbone"]["output_stride"]) == (8, 8)
    assert path.read_bytes() == content
    save_network(path, finer, task={"class_names": CLASSES})  # which is a network of its own
    with torch.no_grad():
        assert torch.equal(load_network(path)[0](images), actual)
        torch.testing.assert_close(load_network(path, output_stride=16)[0](images), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("decoder", [False, True])
def test_another_output_stride_is_as_if_the_network_were_built_so(tmp_path: Path, decoder: bool) -> None:
    coarse, path = trained_network(decoder=decoder, output_stride=16).eval(), tmp_path / "network.safetensors"
    coarse.head.context.pin_pooling((3, 5))
    save_network(path, coarse, task={"class_names": CLASSES})
    expected = trained_network(decoder=decoder, output_stride=8).eval()
    expected.load_state_dict(coarse.state_dict())
    expected.head.context.pin_pooling((5, 9))
    finer, _ = load_network(path, output_stride=8)
    images = torch.rand(1, 3, 65, 97) * 255
    with torch.no_grad():
        assert torch.equal(finer(images), expected(images))
    assert torch.equal(load_network(path, output_stride=16)[0](images), coarse(images))


def test_a_plain_network_cannot_be_coarser_than_it_was_trained(tmp_path: Path) -> None:
    path, backbone = tmp_path / "network.safetensors", plain_backbone("plain", (4, 6, 8, 8), output_stride=8)
    context = DensePredictionCell(CELL, 8, branch_channels=4, cell_channels=4, output_stride=8)
    save_network(path, SegmentationNetwork(backbone, SegmentationHead(context, len(CLASSES))), task={"class_names": CLASSES})
    assert load_network(path, output_stride=8)[0].backbone.output_stride == 8
    with pytest.raises(ValueError, match="weights trained at output stride 8 give no features at 16"):
        load_network(path, output_stride=16)


def test_network_of_an_unknown_backbone_is_not_saved(tmp_path: Path) -> None:
    network = trained_network(decoder=False)
    network.backbone.cut = None
    with pytest.raises(ValueError, match="backbone mobilenetv2_035 is not from timm"):
        save_network(tmp_path / "network.safetensors", network, task={"class_names": CLASSES})
    assert Backbone("own", torch.nn.Identity(), channels=3, output_stride=8, mean=torch.ones(3), std=torch.ones(3)).cut is None


def test_network_needs_a_name_for_each_class(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the classifier has 3 classes, got 2 class names"):
        save_network(tmp_path / "network.safetensors", trained_network(decoder=False), task={"class_names": CLASSES[:2]})
    with pytest.raises(ValueError, match="the classifier has 3 classes, got 2 class names"):
        save_head(tmp_path / "head.safetensors", trained_head(), task={"class_names": CLASSES[:2]}, backbone=BACKBONE)
    assert list(tmp_path.iterdir()) == []


def test_heads_and_networks_are_told_apart(tmp_path: Path) -> None:
    head, network = tmp_path / "head.safetensors", tmp_path / "network.safetensors"
    save(head)
    save_network(network, trained_network(decoder=True), task={"class_names": CLASSES})
    with pytest.raises(
        ValueError, match=r"network .*head\.safetensors is not in the format 'dense-prediction-cell network 1'"
    ):
        load_network(head)
    with pytest.raises(ValueError, match=r"head .*network\.safetensors is not in the format 'dense-prediction-cell head 1'"):
        load_head(network)


@pytest.mark.parametrize("kind", ["head", "network"])
def test_the_cell_alone_is_read_from_either(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"{kind}.safetensors"
    if kind == "head":
        context = save(path, pooling_size=(4, 5)).context
    else:
        network = trained_network(decoder=True)
        save_network(path, network, task={"class_names": CLASSES})
        context = network.head.context
    loaded = load_context(path)
    assert not any(module.training for module in loaded.modules())
    assert (loaded.cell, loaded.output_stride, loaded.pooling_size) == (CELL, context.output_stride, context.pooling_size)
    assert loaded.state_dict().keys() == context.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in context.state_dict().items())


def test_the_cell_of_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"other\.safetensors is not in the format '.* head 1' or '.* network 1', got 'pt'"):
        load_context(path)


@pytest.mark.parametrize("change", ["lacks", "other shape"])
def test_weights_that_do_not_fit_the_network_are_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "network.safetensors"
    save_network(path, trained_network(decoder=True), task={"class_names": CLASSES})
    description, state = json.dumps(load_network(path)[1]), load_file(path)
    del state["decoder.projection.weight"]
    if change == "other shape":
        state["decoder.projection.weight"] = torch.zeros(2, 2)
    save_file(state, path, metadata={"format": NETWORK_FORMAT, "description": description})
    with pytest.raises(ValueError, match=r"network\.safetensors does not hold the weights that its description names"):
        load_network(path)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a folder: give a file in it, such as best\.safetensors"):
        load_network(tmp_path)


def test_a_file_says_what_it_is(tmp_path: Path) -> None:
    save(tmp_path / "head.safetensors")
    found = describe_file(tmp_path / "head.safetensors")
    assert found is not None
    assert (found[0], found[1]["backbone"]) == ("head", BACKBONE)
    save_context(tmp_path / "cell.safetensors", load_context(tmp_path / "head.safetensors"))
    found = describe_file(tmp_path / "cell.safetensors")
    assert found is not None
    assert found[0] == "cell"
    assert describe_file(tmp_path / "absent.safetensors") is None
    save_file({"weight": torch.zeros(1)}, tmp_path / "state.safetensors")
    assert describe_file(tmp_path / "state.safetensors") is None
