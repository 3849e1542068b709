"""Which grid the features of a network lie on, measured: the middle of the pixels that a feature depends on.

The energy of the gradient, the square of a feature's derivative by every pixel, surrounds the feature's place. Were all
kernels symmetric, it would do so symmetrically for a network on one of the two grids, whatever its depth: then the feature in
the middle of a map of odd sides lies in the middle of the picture, and so does the energy's centre of mass. A window or a
padding that leans to one side moves it. The kernels are therefore made symmetric, and the picture is taken together with
itself turned by 180°. What is left are the weights of linear layers, as where Swin merges patches; they are many, and cancel.

Branches beside a shortcut may lie elsewhere than the shortcut does, so both are made to count: scales that begin near 0, as of
the last norm in a branch, are raised to a tenth, by which the shortcut weighs more, and to 1.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reference.grid import Grid

TOLERANCE = 1 / 8  # of a stride, by which features may lie beside the grid: three convolutions of size 2 do, by 1.5 pixels
_FEATURES = (5, 3)  # height and width of the map, odd and unequal
_LEAST_SCALES = (0.1, 1.0)
# What networks raise at pictures that they cannot take.
REFUSALS = (AssertionError, RuntimeError, TypeError, ValueError, KeyError, IndexError, NotImplementedError)


class OffGridError(ValueError):
    """Features lie on neither grid; the message says where, as the end of a sentence about the network.

    `as_many_as_corners` says whether pictures of s·k + 1 pixels have k + 1 features all the same, `takes_neither` whether the
    network takes pictures of neither kind.
    """

    as_many_as_corners = False
    takes_neither = False


def measured_grid(module: nn.Module, last_map: Callable[[Any], Tensor], stride: int) -> Grid:
    """The grid of the features that `last_map` takes of the module's output, (N, C, h, w), with `stride` pixels per feature.

    The module is left as it is; its weights are best random ones. Raises OffGridError.
    """
    faults, counted, refused = [], [], []
    for grid in (Grid(stride), Grid(stride, align_corners=False)):
        height, width = grid.pixels(_FEATURES)
        try:
            offset = _worst_offset(module, last_map, height, width)
        except REFUSALS as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
            refused.append(grid)
            faults.append(f"gives no features of pictures of {height}×{width} pixels ({reason})")
            continue
        if isinstance(offset, str):
            faults.append(f"gives {offset} features of {height}×{width} pixels, where a stride of {stride} gives 5×3")
        elif abs(offset) <= TOLERANCE * stride:
            return grid
        else:
            counted.append(grid)
            place = (offset + (0 if grid.align_corners else (stride - 1) / 2)) % stride
            faults.append(
                f"has features at {stride}·i + {place:.1f} pixels: neither on every {stride}th pixel, the corners included, "
                f"nor in the middle of patches, at {stride}·i + {(stride - 1) / 2:g}"
            )
    fault = OffGridError(faults[-1])
    fault.as_many_as_corners, fault.takes_neither = Grid(stride) in counted, len(refused) == 2
    raise fault


def _worst_offset(module: nn.Module, last_map: Callable[[Any], Tensor], height: int, width: int) -> float | str:
    """By how many pixels the middle feature lies behind the picture's middle; the map's size where that is not the grid's."""
    offsets: list[float] = []
    for least_scale in _LEAST_SCALES:
        energy = _energy(module, last_map, (height, width), least_scale)
        if isinstance(energy, str):
            return energy
        offsets += [_centre_of_mass(energy.sum(axis)) for axis in (0, 1)]
    worst = max(offsets, key=abs)
    if worst != worst:
        raise ValueError("no feature depends on a pixel")
    return worst


def _energy(module: nn.Module, last_map: Callable[[Any], Tensor], size: tuple[int, int], least_scale: float) -> Tensor | str:
    """The gradient's energy (H, W) of the feature in the middle; the map's size where that is not `_FEATURES`."""
    generator = torch.Generator().manual_seed(0)
    device = next((each.device for each in module.parameters()), torch.device("cpu"))
    picture = 2 * torch.rand(1, 3, *size, generator=generator) - 1
    with evaluating(module), torch.inference_mode(False), torch.enable_grad():
        images = torch.cat([picture, picture.flip(2, 3)]).to(device).requires_grad_()
        features = last_map(torch.func.functional_call(module, _symmetric(module, least_scale), (images,)))
        height, width = features.shape[2:]
        if (height, width) != _FEATURES:
            return f"{height}×{width}"
        direction = torch.randn(features.shape[1], generator=generator).to(device)
        middle = features[:, :, height // 2, width // 2].float() @ direction
        (gradient,) = torch.autograd.grad(middle.sum(), images)
    return gradient.square().sum((0, 1)).double().cpu()


def _symmetric(module: nn.Module, least_scale: float) -> dict[str, Tensor]:
    """The kernels and scales that stand in for the module's own."""
    found = {}
    for name, weight in module.named_parameters():
        if weight.ndim == 4:  # of a convolution: (out, in, rows, columns)
            found[name] = (weight.detach() + weight.detach().flip(2, 3)) / 2
        elif weight.ndim == 1:
            found[name] = weight.detach().where(weight.abs() >= least_scale, torch.full_like(weight, least_scale))
    return found


def _centre_of_mass(profile: Tensor) -> float:
    """From the profile's middle, in pixels; NaN for one of zeros."""
    profile = profile - profile.min()  # what comes from everywhere, as by global attention
    places = torch.arange(len(profile)) - (len(profile) - 1) / 2
    return float((profile * places).sum() / profile.sum())


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put the module in evaluation mode inside; each of its parts is in its own mode again after that."""
    modes = {each: each.training for each in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes.items():
            each.training = mode
