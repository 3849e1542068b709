"""Export a trained head or network: `python -m search.export --network n.safetensors --format onnx --out n.onnx`.

Two formats: a program of `torch.export` (PyTorch alone runs it), and ONNX. Before the file is written, the program is read
back and run, by PyTorch or onnxruntime, and its outputs are compared with the original's. Besides the graph, the file has
the checkpoint's description (cell, class names, output stride, normalisation); the graph includes the normalisation of images.

The batch stays free, and the image's size where the network allows it. The windows of the authors' pyramid pooling depend on
the map's size, which a traced program cannot express; with it the size is fixed, unless the windows are pinned or cover the
whole map. The same holds for a backbone that pads as TensorFlow does, such as MobileNet-v2 with weights from TensorFlow, for
attention in windows, as Swin's, and for whatever the tracer does not follow. A vision transformer's position embeddings are
resampled within the program.
"""

import contextlib
import json
import shlex
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple, assert_never

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.pool2d_same import AvgPool2dSame
from torch import Tensor, nn
from torch.export import ExportedProgram

import fast.kernels
from fast.bilinear_resize import bilinear_resize
from fast.checkpoint import FORMAT, NETWORK_FORMAT, load_head, load_network, write_whole
from fast.dense_prediction_cell import DensePredictionCell
from fast.model_card import write_card_for
from fast.segmentation import SegmentationHead, SegmentationNetwork
from reference.cell import AtrousSeparableConv, Conv1x1, Operation, PyramidPooling
from reference.grid import Grid
from search.backbones.facts import described_grid
from search.cli import print_next, run_command, spelled, to_install
from search.errors import InputError

ExportFormat = Literal["torch-export", "onnx"]
Run = Callable[[Tensor], Tensor]

# Accepted deviation, as a share of the largest output. Two runtimes add up some fifty float32 convolutions in another order,
# which was measured to be below 1e-5. Weights of a wrong layer, or another padding, are off by 1e-1.
TOLERANCE = 1e-4

_ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_OPSET = 18
_SAME = (Conv2dSame, AvgPool2dSame)  # and what is derived from them
_OF_WINDOWS = ("window_size", "partition_size")  # of timm's attention in windows: Swin and its kin, MaxViT
_SUFFIXES = {"torch-export": ".pt2", "onnx": ".onnx"}


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Write a head or network for torch.export or ONNX, and check that it computes the same."""

    network: Path | None = None
    """Network file (.safetensors): images (N, 3, H, W) of 0 to 255 in, logits out."""
    head: Path | None = None
    """Head file instead: the backbone's features in, logits out."""
    out: Path
    """File to write: .pt2 for torch-export, .onnx for onnx."""
    format: ExportFormat = "torch-export"
    """torch-export, or onnx (install the extra `export`)."""
    size: tuple[int, int] | None = None
    """Height and width of the input. Default: 513 513 pixels for a network, 33 33 features for a head; where features lie in
    the middle of patches, as a vision transformer's, 512 512 or what is nearest, and 32 32."""
    fixed_size: bool = False
    """Fix batch size 1 and --size, also where they could stay free; some runtimes are quicker for it."""
    output_stride: int | None = None
    """Pixels per feature (networks only); a network that was trained at 16 is finer at 8, if its backbone has such features.
    None: as trained."""
    full_size: bool = False
    """Resize the logits to the image's size within the program (networks only)."""


class Free(NamedTuple):
    """What of the input's shape stays free."""

    batch: bool = True
    size: bool = True


@dataclass(frozen=True)
class Exported:
    """The exported file, and how well its outputs agree. Where the size was to be free and is not, the tracer's `reason`."""

    path: Path
    free: Free
    checked: tuple[tuple[int, ...], ...]  # shapes of the inputs that were compared
    deviation: float  # the largest one, as a share of the largest output
    reason: str | None = None


class _Loaded(NamedTuple):
    module: nn.Module
    description: dict[str, Any]  # for the exported file
    channels: int  # of the input
    grid: Grid


def main(settings: ExportSettings) -> None:
    """Read, export, check and write, then print the result."""
    loaded = _load(settings)
    usual = loaded.grid.nearest((512, 512))
    size = settings.size or (usual if settings.network else loaded.grid.features(usual))
    if min(size) < 1:
        raise InputError(f"`size` {size[0]} {size[1]}: both must be at least 1")
    reason = "as asked" if settings.fixed_size else _what_fixes_the_size(loaded.module)
    result = export(
        loaded.module,
        (loaded.channels, *size),
        settings.out,
        export_format=settings.format,
        free=Free(batch=not settings.fixed_size, size=reason is None),
        description=loaded.description,
        grid=loaded.grid if settings.network else None,
    )
    card = write_card_for(result.path, FORMAT if settings.head else NETWORK_FORMAT, loaded.description)
    kind = f"ONNX opset {_OPSET}" if settings.format == "onnx" else "torch.export"
    shape = _in_words(result.free, size, reason or result.reason)
    megabytes = f"{result.path.stat().st_size / 1e6:.1f} MB"
    print(f"wrote {result.path}, {kind}, {megabytes}; input {loaded.description['input']['name']}: {shape}")
    shapes = " and ".join("×".join(map(str, shape)) for shape in result.checked)
    print(f"checked on {shapes}: deviates by {result.deviation:.1e} of the largest logit, at most {TOLERANCE:.0e} is allowed")
    print(f"its model card: {card}")
    print_next(_loading(settings, (1, loaded.channels, *size)))


def _in_words(free: Free, size: tuple[int, int], reason: str | None) -> str:
    if free.size:
        return "any batch and size"
    return f"{'any batch' if free.batch else 'batch 1'}, size fixed: {size[0]} × {size[1]} ({reason})"


def _loading(settings: ExportSettings, shape: tuple[int, ...]) -> str:
    """A command that runs the exported program on an input of zeros."""
    match settings.format:
        case "torch-export":
            code = f"import torch; program = torch.export.load({str(settings.out)!r}).module()"
            code += f"; print(program(torch.zeros{shape}).shape)"
        case "onnx":
            code = f"import numpy, onnxruntime; session = onnxruntime.InferenceSession({str(settings.out)!r})"
            code += f"; inputs = {{session.get_inputs()[0].name: numpy.zeros({shape}, 'float32')}}"
            code += "; print(session.run(None, inputs)[0].shape)"
        case _:
            assert_never(settings.format)
    return shlex.join(["python", "-c", code])


def export(
    module: nn.Module,
    input_shape: tuple[int, int, int],
    path: Path,
    *,
    export_format: ExportFormat,
    free: Free,
    description: dict[str, Any],
    grid: Grid | None = None,
) -> Exported:
    """Write `module`, (N, *input_shape) -> a tensor, to `path`; the file appears only if it is checked, at another size on the
    `grid` if there is one.

    Where the size cannot stay free, it is fixed. Raises InputError for an input that the module refuses, missing packages, and
    outputs that deviate.
    """
    if path.suffix != (suffix := _SUFFIXES[export_format]):
        raise InputError(f"--out {path}: a file of the format {export_format} must end in {suffix}")
    if export_format == "onnx":
        _require_packages()
    example = _inputs((2 if free.batch else 1, *input_shape))
    with _quiet(), fast.kernels.using(None), torch.no_grad():
        try:
            module(example)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"the input {tuple(example.shape)} does not fit: {error}") from error
        try:
            content, exported = _program(module, example, path, export_format, free, description, grid)
        except InputError:
            if not free.size:
                raise
            fixed = free._replace(size=False)
            content, exported = _program(module, example, path, export_format, fixed, description, grid)
            exported = replace(exported, reason="the tracer does not follow what depends on it")
    _write(path, content)
    return exported


def _program(
    module: nn.Module,
    example: Tensor,
    path: Path,
    export_format: ExportFormat,
    free: Free,
    description: dict[str, Any],
    grid: Grid | None,
) -> tuple[bytes, Exported]:
    """The content of the file, checked. Raises InputError where the program cannot be made, or deviates."""
    text = json.dumps(description, ensure_ascii=False)
    names = (description["input"]["name"], description["output"]["name"])
    dimensions = ([0] if free.batch else []) + ([2, 3] if free.size else [])
    dynamic = dict.fromkeys(dimensions, torch.export.Dim.DYNAMIC)
    try:
        program = torch.export.export(module, (example,), dynamic_shapes=(dynamic,) if dynamic else None)
        content, run = _onnx(program, *names, text) if export_format == "onnx" else _torch_program(program, text)
    except Exception as error:  # tracers and converters fail in many ways
        remedy = "try --fixed-size, or the other --format" if free.batch else "try the other --format"
        raise InputError(f"this network cannot be exported so ({_first_line(error)}): {remedy}") from error
    checked, deviation = _compare(run, module, _shapes_to_check(example, free, grid))
    if not deviation <= TOLERANCE:  # nor NaN
        raise InputError(
            f"{path} was not written: its outputs deviate by {deviation:.1e} of the largest, allowed is {TOLERANCE:.0e}"
        )
    return content, Exported(path, free, checked, deviation)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _shapes_to_check(example: Tensor, free: Free, grid: Grid | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """One image of the size that was asked for, and where they are free another number of images and another size."""
    _, channels, height, width = example.shape
    other = (height + height // 2 + 1, width + width // 4 + 2) if free.size else (height, width)
    if grid is not None and not grid.align_corners:  # which takes whole patches alone
        other = grid.rounded_up(other)
    return (1, channels, height, width), (3 if free.batch else 1, channels, *other)


class _FullSize(nn.Module):
    """Resizes the logits to the size of the image."""

    def __init__(self, network: SegmentationNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        align_corners = self.network.backbone.grid.align_corners
        return bilinear_resize(self.network(images), (images.shape[2], images.shape[3]), align_corners=align_corners)


def _load(settings: ExportSettings) -> _Loaded:
    """Load the module, in evaluation mode."""
    if (settings.network is None) == (settings.head is None):
        raise InputError("give either --network FILE or --head FILE")
    if settings.head is not None and settings.full_size:
        raise InputError("--full-size is for networks: a head does not know the image's size")
    if settings.head is not None and settings.output_stride is not None:
        raise InputError("--output-stride is for networks: a head's backbone gives its features")
    try:
        if settings.head is not None:
            head, description = load_head(settings.head)
            channels: int = head.context.in_channels
            grid = described_grid({"output_stride": head.context.output_stride, **(description.get("backbone") or {})})
            scale = "as the input"
            module: nn.Module = head
            input_text = f"features (N, {channels}, h, w) float32"
        else:
            assert settings.network is not None  # one of both is given
            network, description = load_network(settings.network, output_stride=settings.output_stride)
            if settings.output_stride is not None:  # the file's scores are those of the stride that it was trained at
                source = (description.get("source") or {}).items()
                description["source"] = {name: value for name, value in source if not isinstance(value, float)}
            module, channels, grid = (_FullSize(network) if settings.full_size else network), 3, network.backbone.grid
            scale = "as the input" if settings.full_size else f"one on every {network.logits_stride}th pixel"
            input_text = "images (N, 3, H, W) float32, RGB, 0 to 255"
    except ValueError as error:
        raise InputError(f"{error}; give a head as --head, a whole network as --network") from error
    parts = {
        "input": {"name": input_text.split()[0], "is": input_text},
        "output": {"name": "logits", "is": f"logits (N, {_outputs(module)}, ...) float32, {scale}"},
    }
    return _Loaded(module.eval(), {**description, **parts}, channels, grid)


def _outputs(module: nn.Module) -> int:
    (head,) = (child for child in module.modules() if isinstance(child, SegmentationHead))
    return head.classifier.out_channels


def _what_fixes_the_size(module: nn.Module) -> str | None:
    """Names what in the network depends on the map's size in a way that a traced program cannot express; None if nothing."""
    (context,) = (child for child in module.modules() if isinstance(child, DensePredictionCell))
    pinned = context.pooling == "sliding_window" and context.pooling_size is not None
    if not pinned and any(_windows_follow_the_size(branch.operation) for branch in context.cell.branches):
        return "the windows of its pyramid pooling depend on the size"
    if any(isinstance(child, _SAME) for child in module.modules()):  # it could be traced, but the tracer's algebra takes hours
        return "TensorFlow's padding in its backbone depends on the size"
    if any(hasattr(child, attribute) for child in module.modules() for attribute in _OF_WINDOWS):
        return "the windows of its attention depend on the size"
    return None


def _windows_follow_the_size(operation: Operation) -> bool:
    match operation:
        case Conv1x1() | AtrousSeparableConv():
            return False
        case PyramidPooling(grid_size):
            return grid_size != (1, 1)  # which is one mean over the whole map, whatever its size
        case _:
            assert_never(operation)


def _require_packages() -> None:
    lacking = [package for package in _ONNX_PACKAGES if find_spec(package) is None]
    if lacking:
        raise InputError(f"--format onnx needs {', '.join(lacking)}: {to_install('export')}, or use torch-export")


def _onnx(program: ExportedProgram, input_name: str, output_name: str, description: str) -> tuple[bytes, Run]:
    """Export to ONNX: the file with its weights, and a function that runs it by onnxruntime."""
    import onnxruntime

    names: dict[str, Any] = {"input_names": [input_name], "output_names": [output_name]}
    converted = torch.onnx.export(program, dynamo=True, opset_version=_OPSET, verbose=False, **names)
    assert converted is not None  # as always with dynamo=True
    converted.model.metadata_props["description"] = description
    content: bytes = converted.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda x: torch.from_numpy(session.run([output_name], {input_name: x.numpy()})[0])


def _torch_program(program: ExportedProgram, description: str) -> tuple[bytes, Run]:
    """Export by torch.export: the file, and the program read back from it."""
    program.example_inputs = None  # they would be saved too, larger than the weights
    buffer = BytesIO()
    torch.export.save(program, buffer, extra_files={"description.json": description})
    content = buffer.getvalue()
    return content, torch.export.load(BytesIO(content)).module()


def _write(path: Path, content: bytes) -> None:
    try:
        write_whole(path, content)
    except OSError as error:
        raise InputError(f"--out {path} cannot be written ({error.strerror}): choose another place") from error


def _compare(run: Run, module: nn.Module, shapes: tuple[tuple[int, ...], ...]) -> tuple[tuple[tuple[int, ...], ...], float]:
    """Compare on inputs of these shapes: the shapes, and the largest deviation. Raises InputError where the program fails."""
    deviations = []
    for seed, each in enumerate(shapes, start=1):
        x = _inputs(each, seed)
        expected = module(x)
        try:
            actual = run(x)
        except Exception as error:  # of whatever runs it
            raise InputError(f"the exported program fails on an input {each} ({_first_line(error)})") from error
        if actual.shape != expected.shape:
            raise InputError(f"the exported program gives {tuple(actual.shape)} instead of {tuple(expected.shape)}")
        deviations.append(((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item())
    return shapes, torch.tensor(deviations).max().item()  # which keeps a NaN


def _inputs(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random inputs: pixels for a network, features of a similar scale for a head."""
    scale = 255.0 if shape[1] == 3 else 4.0
    return scale * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings of PyTorch's exporters about their own internals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


if __name__ == "__main__":
    run_command(ExportSettings, main, prog=spelled("export"))
