"""Exported programs against the network or head they were made from."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import search.export
from fast import Decoder, DensePredictionCell, SegmentationHead, SegmentationNetwork
from fast.backbone import timm_backbone
from fast.bilinear_resize import bilinear_resize
from fast.checkpoint import load_head, load_network, save_head, save_network
from reference.cell import BACKBONE_FEATURE, AtrousSeparableConv, Branch, Cell, Conv1x1, PyramidPooling
from search.cells.space import load_cell
from search.errors import InputError
from search.export import TOLERANCE, ExportSettings, Free, export, main
from tests.search.composed import changed

CLASSES = ("sky", "road", "öther")
DYNAMIC_CELL = Cell(  # every kind of operation that can follow the size
    (
        Branch(BACKBONE_FEATURE, AtrousSeparableConv(rate=(6, 3))),
        Branch(0, PyramidPooling(grid_size=(1, 1))),
        Branch(BACKBONE_FEATURE, Conv1x1()),
    )
)
needs_onnx = pytest.mark.skipif(
    bool(missing := [name for name in search.export._ONNX_PACKAGES if find_spec(name) is None]),
    reason=f"the extra `export` is not installed: {missing}",
)


def train_a_little(module: nn.Module, *inputs: Tensor) -> None:
    """Running statistics and biases are no longer the initial ones."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for norm in (child for child in module.modules() if isinstance(child, nn.BatchNorm2d)):
            norm.bias.normal_(0.0, 0.3, generator=generator)
            norm.momentum = 0.5
        module.train()(*inputs)
    module.eval()


def head_file(folder: Path, cell: Cell = DYNAMIC_CELL, **options: Any) -> Path:
    torch.manual_seed(0)
    head = SegmentationHead(DensePredictionCell(cell, 6, branch_channels=8, cell_channels=8, **options), len(CLASSES))
    train_a_little(head, torch.rand(2, 6, 17, 17))
    path = folder / "head.safetensors"
    save_head(path, head, task={"class_names": CLASSES}, backbone={"name": "mobilenetv2_100"})
    return path


def network_file(folder: Path, *, decoder: bool) -> Path:
    torch.manual_seed(0)
    backbone = timm_backbone("test_efficientnet", output_stride=16, low_level=decoder)
    head = SegmentationHead(DensePredictionCell(DYNAMIC_CELL, backbone.channels, branch_channels=8, cell_channels=8), 3)
    refine = Decoder(backbone.low_level.channels, channels=8, projected_channels=4) if backbone.low_level else None
    network = SegmentationNetwork(backbone, head, refine)
    train_a_little(network, 255 * torch.rand(2, 3, 65, 97))
    path = folder / "network.safetensors"
    save_network(path, network, task={"class_names": CLASSES})
    return path


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """TOLERANCE is the promise of the command itself."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()


def run_card(card: Path, **names: Any) -> dict[str, Any]:
    """Run the lines of a model card that say how the file is used; return all names that they leave."""
    exec(card.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0], names)
    return names


@pytest.mark.parametrize("decoder", [False, True])
def test_a_network_at_other_sizes(
    tmp_path: Path, decoder: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = network_file(tmp_path, decoder=decoder), tmp_path / "new" / "network.pt2"
    main(ExportSettings(network=path, out=out, size=(65, 97)))
    assert re.search(
        r"input images: any batch and size\nchecked on 1×3×65×97 and 3×3×98×123: deviates by", capsys.readouterr().out
    )
    network, description = load_network(path)
    extra = {"description.json": ""}
    program = torch.export.load(out, extra_files=extra).module()
    for shape in ((1, 3, 65, 97), (2, 3, 130, 80), (1, 3, 97, 97)):
        images = 255 * torch.rand(shape)
        assert_close(program(images), network(images))
    told = json.loads(extra["description.json"])
    assert {key: told[key] for key in description} == description
    assert told["class_names"] == list(CLASSES)
    assert told["backbone"]["mean"] == network.backbone.mean.flatten().tolist()
    assert sorted(each.name for each in out.parent.iterdir()) == ["network.pt2", "network.pt2.md"]
    monkeypatch.chdir(out.parent)
    names = run_card(Path("network.pt2.md"), images=images)
    assert_close(names["logits"], network(images))


def test_a_network_at_another_output_stride(tmp_path: Path) -> None:
    path, out = network_file(tmp_path, decoder=False), tmp_path / "network.pt2"
    network, description = load_network(path)
    source = {"iteration": 90_000, "mean_iou": 0.4}  # which is the score at 16
    save_network(path, network, task={"class_names": description["class_names"]}, source=source)
    main(ExportSettings(network=path, out=out, size=(65, 97), output_stride=8))
    card = out.with_name("network.pt2.md").read_text()
    assert "| iterations | 90,000 |" in card
    assert "mean_iou" not in card
    extra = {"description.json": ""}
    program, images = torch.export.load(out, extra_files=extra).module(), 255 * torch.rand(1, 3, 65, 97)
    assert_close(program(images), load_network(path, output_stride=8)[0](images))
    assert program(images).shape[2:] == (9, 13)
    assert json.loads(extra["description.json"])["backbone"]["output_stride"] == 8


def test_logits_of_the_images_size(tmp_path: Path) -> None:
    path, out = network_file(tmp_path, decoder=False), tmp_path / "network.pt2"
    main(ExportSettings(network=path, out=out, size=(65, 97), full_size=True))
    images = 255 * torch.rand(1, 3, 70, 101)
    actual = torch.export.load(out).module()(images)
    assert_close(actual, bilinear_resize(load_network(path)[0](images), (70, 101)))


@needs_onnx
@pytest.mark.parametrize("fixed_size", [False, True])
def test_onnx_runs_in_onnxruntime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fixed_size: bool
) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    path, out = head_file(tmp_path), tmp_path / "head.onnx"
    main(ExportSettings(head=path, out=out, format="onnx", size=(17, 21), fixed_size=fixed_size))
    head, description = load_head(path)
    session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
    for shape in ((1, 6, 17, 21),) if fixed_size else ((1, 6, 17, 21), (3, 6, 40, 9)):
        features = 4 * torch.rand(shape)
        (actual,) = session.run(["logits"], {"features": features.numpy()})
        assert_close(torch.from_numpy(actual), head(features))
    told = json.loads(session.get_modelmeta().custom_metadata_map["description"])
    assert (told["class_names"], told["cell"]) == (list(CLASSES), description["cell"])
    model = onnx.load(out)
    onnx.checker.check_model(model)
    said = capsys.readouterr().out
    assert f", ONNX opset {model.opset_import[0].version}, " in said
    assert ("batch 1, size fixed: 17 × 21 (as asked)" if fixed_size else "any batch and size") in said
    monkeypatch.chdir(tmp_path)
    names = run_card(Path("head.onnx.md"), features=features.numpy())
    assert_close(torch.from_numpy(names["logits"]), head(features))
    assert sorted(each.name for each in tmp_path.iterdir() if "onnx" in each.name) == [
        "head.onnx",
        "head.onnx.md",
    ]  # with weights


POOLING = Cell((*DYNAMIC_CELL.branches, Branch(BACKBONE_FEATURE, PyramidPooling(grid_size=(2, 4)))))


@pytest.mark.parametrize("pooling", ["sliding_window", "grid_cells"])
def test_pooling_whose_windows_follow_the_size_fixes_it(
    tmp_path: Path, pooling: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = head_file(tmp_path, POOLING, pooling=pooling), tmp_path / "head.pt2"
    main(ExportSettings(head=path, out=out, size=(17, 21)))
    assert "features: any batch, size fixed: 17 × 21 (the windows of its pyramid pooling" in capsys.readouterr().out
    program = torch.export.load(out).module()
    for batch in (1, 4):
        features = 4 * torch.rand(batch, 6, 17, 21)
        assert_close(program(features), load_head(path)[0](features))
    with pytest.raises(Exception, match=r"."):  # whatever torch calls it: another size is no longer taken
        program(torch.rand(1, 6, 18, 21))


def test_pinned_windows_leave_the_size_free(tmp_path: Path) -> None:
    path, out = head_file(tmp_path, POOLING, pooling_size=(9, 9)), tmp_path / "head.pt2"
    main(ExportSettings(head=path, out=out, size=(17, 21)))
    features = 4 * torch.rand(2, 6, 25, 19)
    assert_close(torch.export.load(out).module()(features), load_head(path)[0](features))


def test_the_published_cells_are_free_in_size() -> None:
    for name, depends in (("dpc", False), ("aspp", False), ("psp", True)):
        assert (search.export._what_fixes_the_size(DensePredictionCell(load_cell(name), 3)) is not None) is depends


class OneSize(nn.Module):
    """Takes pictures of one size alone, and any number of them."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], 6, 5, 5)


def test_what_the_tracer_does_not_follow_fixes_the_size_alone(tmp_path: Path) -> None:
    description = {"input": {"name": "x"}, "output": {"name": "y"}}
    shape, path = (6, 5, 5), tmp_path / "m.pt2"
    result = export(OneSize(), shape, path, export_format="torch-export", free=Free(), description=description)
    assert result.free == Free(size=False)
    assert result.reason is not None
    assert result.checked == ((1, 6, 5, 5), (3, 6, 5, 5))
    assert torch.export.load(path).module()(torch.rand(7, *shape)).shape == (7, *shape)


def timm_network_file(folder: Path, name: str) -> Path:
    torch.manual_seed(0)
    backbone = timm_backbone(name)
    context = DensePredictionCell(DYNAMIC_CELL, backbone.channels, branch_channels=8, cell_channels=8)
    network = SegmentationNetwork(backbone, SegmentationHead(context, 3)).eval()
    path = folder / "network.safetensors"
    save_network(path, network, task={"class_names": CLASSES})
    return path


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_networks_on_patches_are_free_in_size(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also a transformer's, whose position embeddings are resampled; the second size that is checked lies on the grid."""
    path, out = timm_network_file(tmp_path, name), tmp_path / "network.pt2"
    main(ExportSettings(network=path, out=out, size=(64, 96), full_size=True))
    assert re.search(
        r"input images: any batch and size\nchecked on 1×3×64×96 and 3×3×112×128: deviates by", capsys.readouterr().out
    )
    images = 255 * torch.rand(1, 3, 96, 80)
    logits = bilinear_resize(load_network(path)[0](images), (96, 80), align_corners=False)
    assert_close(torch.export.load(out).module()(images), logits)


def test_a_size_that_cuts_patches_is_refused(tmp_path: Path) -> None:
    path = timm_network_file(tmp_path, "test_vit")
    message = (
        r"the input \(2, 3, 65, 96\) does not fit: backbone test_vit takes pictures of 16·k pixels each way, such as 64×96"
    )
    with pytest.raises(InputError, match=message):
        main(ExportSettings(network=path, out=tmp_path / "network.pt2", size=(65, 96)))


def test_default_sizes_follow_the_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def spy(module: nn.Module, shape: tuple[int, ...], *_: Any, **__: Any) -> None:
        asked.append(shape)
        raise InputError("enough")

    monkeypatch.setattr(search.export, "export", spy)
    files = (network_file(tmp_path, decoder=False), timm_network_file(tmp_path / "centres", "test_vit"))
    for network in files:
        with pytest.raises(InputError, match="enough"):
            main(ExportSettings(network=network, out=tmp_path / "n.pt2"))
    with pytest.raises(InputError, match="enough"):
        main(ExportSettings(head=head_file(tmp_path), out=tmp_path / "n.pt2"))
    assert asked == [(3, 513, 513), (3, 512, 512), (6, 33, 33)]


def test_attention_in_windows_fixes_the_size() -> None:
    windowed = nn.Module()
    windowed.window_size = (7, 7)  # type: ignore[assignment]  # as timm's Swin has it
    network = nn.Sequential(windowed, DensePredictionCell(DYNAMIC_CELL, 3))
    assert search.export._what_fixes_the_size(network) == "the windows of its attention depend on the size"


class Drifting(nn.Module):
    """Is traced with one constant and runs with another, as a wrong export would."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (0.0 if torch.compiler.is_compiling() else 0.01)


@pytest.mark.parametrize("old", [None, b"the old file"])
def test_a_program_that_deviates_is_not_written(tmp_path: Path, old: bytes | None) -> None:
    path = tmp_path / "drifting.pt2"
    if old is not None:
        path.write_bytes(old)
    description = {"input": {"name": "x"}, "output": {"name": "y"}}
    with pytest.raises(InputError, match=r"was not written: its outputs deviate by .*e-03 of the largest, allowed is 1e-04"):
        export(Drifting(), (6, 5, 5), path, export_format="torch-export", free=Free(), description=description)
    assert [each.read_bytes() for each in tmp_path.iterdir()] == ([] if old is None else [old])


class NotFinite(nn.Module):
    """Right on one image, and not a number on more, once it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (3 - x.shape[0]) * 2 if torch.compiler.is_compiling() else x


class Untraceable(nn.Module):
    """Depends on values, which no program can follow."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (1.0 if x.sum() > 0 else 2.0)


@pytest.mark.parametrize(
    ("module", "words"),
    [(NotFinite(), "deviate by (nan|inf)"), (Untraceable(), r"cannot be exported so \(.*try --fixed-size")],
)
def test_what_no_program_can_do_is_not_written(tmp_path: Path, module: nn.Module, words: str) -> None:
    description = {"input": {"name": "x"}, "output": {"name": "y"}}
    with pytest.raises(InputError, match=words):
        export(module, (6, 5, 5), tmp_path / "m.pt2", export_format="torch-export", free=Free(), description=description)
    assert list(tmp_path.iterdir()) == []


def test_a_nan_on_the_second_input_alone_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(x: Tensor) -> Tensor:
        return x if x.shape[0] == 1 else x * float("nan")

    _, deviation = search.export._compare(run, nn.Identity(), ((1, 3, 5, 5), (3, 3, 5, 5)))
    assert deviation != deviation


def test_tensorflows_padding_fixes_the_size() -> None:
    backbone = timm_backbone("test_efficientnet", output_stride=16, weights_origin="tensorflow")
    head = SegmentationHead(DensePredictionCell(DYNAMIC_CELL, backbone.channels, branch_channels=8, cell_channels=8), 3)
    reason = search.export._what_fixes_the_size(SegmentationNetwork(backbone, head))
    assert reason == "TensorFlow's padding in its backbone depends on the size"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": None}, "give either --network FILE or --head FILE"),
        ({"network": Path("n.safetensors")}, "give either --network FILE or --head FILE"),
        ({"full_size": True}, "--full-size is for networks"),
        ({"output_stride": 8}, "--output-stride is for networks"),
        ({"head": Path("nowhere.safetensors")}, "head nowhere.safetensors cannot be read"),
        ({"out": Path("head.bin")}, "--out head.bin: a file of the format torch-export must end in .pt2"),
        ({"out": Path("head.pt2"), "format": "onnx"}, "--out head.pt2: a file of the format onnx must end in .onnx"),
        ({"size": (0, 5)}, "`size` 0 5: both must be at least 1"),
        ({"size": (3, 3)}, "the input (2, 6, 3, 3) does not fit: pooling window of 9"),
        ({"out": Path("head.safetensors/head.pt2")}, "--out head.safetensors/head.pt2 cannot be written"),
    ],
)
def test_bad_input_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    head_file(tmp_path, POOLING, pooling_size=(9, 9))
    settings = ExportSettings(head=Path("head.safetensors"), out=Path("head.pt2"), size=(17, 17))
    with pytest.raises(InputError, match=re.escape(message)):
        main(changed(settings, **change))
    assert [each.name for each in tmp_path.iterdir()] == ["head.safetensors"]


def test_a_head_given_as_a_network_is_sent_to_its_own_flag(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not in the format .*; give a head as --head, a whole network as --network"):
        main(ExportSettings(network=head_file(tmp_path), out=tmp_path / "x.pt2"))


def test_lacking_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search.export, "find_spec", lambda name: None if name == "onnxscript" else True)
    with pytest.raises(InputError, match=r"--format onnx needs onnxscript: pip install -e '\.\[export\]'"):
        main(ExportSettings(head=head_file(tmp_path), out=tmp_path / "head.onnx", format="onnx"))
