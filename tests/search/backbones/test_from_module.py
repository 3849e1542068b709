"""Any module as a backbone: what its features are is measured, and a grid that the cells cannot read is refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fast.checkpoint import save_network
from reference.grid import Grid
from search import InputError, backbone_from_module
from search.pipeline import Found
from tests.search.python_parts import Strided, found_head

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def backbone_of(module: nn.Module, **changes: Any) -> Any:
    return backbone_from_module(module, **({"name": "mine", "mean": MEAN, "std": STD} | changes))


class Several(nn.Module):
    """A module that gives its maps in one of the usual ways."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.inner, self.pack = Strided(4), pack

    def forward(self, images: Tensor) -> Any:
        return self.pack(images, self.inner(images))


@pytest.mark.parametrize(
    "pack",
    [
        lambda early, last: last,
        lambda early, last: [early, last],
        lambda early, last: (early, last),
        lambda early, last: {"early": early, "out": last},
    ],
    ids=["map", "list", "tuple", "mapping"],
)
def test_the_last_map_counts(pack: Callable[[Tensor, Tensor], Any]) -> None:
    module = Several(pack)
    backbone = backbone_of(module).eval()
    assert (backbone.name, backbone.channels, backbone.output_stride) == ("mine", 8, 16)
    images = torch.randint(256, (2, 3, 33, 49)).float()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    expected = module.inner((images / 255 - mean) / std)
    torch.testing.assert_close(backbone(images), expected, rtol=0, atol=1e-5)  # float32, in another order
    assert backbone.body.module is module


@pytest.mark.parametrize(("halvings", "stride"), [(2, 4), (3, 8), (4, 16), (5, 32)])
def test_the_output_stride_is_measured(halvings: int, stride: int) -> None:
    assert backbone_of(Strided(halvings)).grid == Grid(stride)


@pytest.mark.parametrize("patch", [4, 14, 16, 32])
def test_patches_have_their_features_at_centres(patch: int) -> None:
    patches = nn.Conv2d(3, 8, patch, stride=patch)
    backbone = backbone_of(patches)
    assert backbone.grid == Grid(patch, align_corners=False)
    images = torch.zeros(1, 3, 3 * patch, 2 * patch)
    assert backbone(images).shape == (1, 8, 3, 2)
    with pytest.raises(ValueError, match=rf"takes pictures of {patch}·k pixels each way, such as "):
        backbone(torch.zeros(1, 3, 3 * patch + 1, 2 * patch))


def test_windows_of_two_that_halve_the_map_have_their_features_at_centres() -> None:
    assert backbone_of(nn.Sequential(*(nn.MaxPool2d(2) for _ in range(4)))).grid == Grid(16, align_corners=False)


def test_measuring_changes_nothing() -> None:
    module = Strided(4).train()
    module.norm.eval()
    before = copy.deepcopy(module.state_dict())
    backbone_of(module)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert module.training
    assert not module.norm.training


class LeansToOneSide(nn.Sequential):
    """Its maps have as many features as corners have, but each convolution is padded at the bottom and right alone."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(4):
            self.append(nn.ZeroPad2d((0, 2, 0, 2)))
            self.append(nn.Conv2d(8 if i else 3, 8, kernel_size=3, stride=2))


class Raises(nn.Module):
    """A module for pictures of one size."""

    def forward(self, images: Tensor) -> Tensor:
        raise ValueError("224×224 only\nin any case")


MISFITS: dict[str, tuple[nn.Module, str]] = {
    "output stride 64": (
        Strided(6),
        r"gives 3×3 features of 129×161 pixels; .* would be 9×11, .*: pad each odd kernel by half its size",
    ),
    "output stride 2": (
        Strided(1),
        r"gives 65×81 features .*, an output stride of 2, where 4 to 32 can be read: change strides to dilation",
    ),
    "a stride beside the kernel": (
        nn.Conv2d(3, 8, 3, stride=16),
        r"has features at 16·i \+ 1\.0 pixels: neither on every 16th pixel",
    ),
    "padded on one side": (
        LeansToOneSide(),
        r"has features at 16·i \+ 1\d\.\d pixels: neither on every 16th pixel, .* or leave out even ones",
    ),
    "a classifier": (
        nn.Sequential(Strided(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        r"must give a map .*, got \(1, 8\): cut",
    ),
    "no tensor": (Several(lambda early, last: "maps"), r"must give a map \(N, channels, h, w\), or several, got str"),
    "an error": (Raises(), r"gives no features of images \(1, 3, 513, 33\) \(224×224 only\): correct it"),
}


@pytest.mark.parametrize(("module", "sentence"), MISFITS.values(), ids=MISFITS.keys())
def test_other_grids_are_refused(module: nn.Module, sentence: str) -> None:
    with pytest.raises(InputError, match=rf"^`module` mine {sentence}"):
        backbone_of(module)


@pytest.mark.parametrize("mean", [(123.7, 116.3, 103.5), (0.5,), 0.5])
def test_a_mean_of_other_pixels_is_refused(mean: Any) -> None:
    with pytest.raises(InputError, match=r"`mean` must be three numbers for pixels from 0 to 1, got "):
        backbone_of(Strided(4), mean=mean)


def test_a_deviation_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"`std` must be above 0, got \(0.2, 0.0, 0.2\)"):
        backbone_from_module(Strided(4), name="mine", mean=(0.5,) * 3, std=(0.2, 0.0, 0.2))


def test_a_class_in_place_of_a_module_is_refused() -> None:
    of_class: Any = Strided
    with pytest.raises(InputError, match=r"^`module` must be an nn.Module, not <class .*: give an object of the class"):
        backbone_of(of_class)


def test_a_network_with_it_is_not_saved_but_told_how(tmp_path: Any) -> None:
    backbone = backbone_of(Strided(4))
    origin = {"backbone": "strided", "weights_hash": backbone.weights_hash()}
    network = Found(tmp_path, found_head().context.cell, 0.5, found_head(), origin).network(backbone)
    other = Found(tmp_path, found_head().context.cell, 0.5, found_head(), origin | {"weights_hash": "0" * 64})
    with pytest.raises(InputError, match="was trained on strided with other weights: give that one"):
        other.network(backbone)
    with pytest.raises(
        ValueError, match=r"backbone mine is not from timm, .*: save the head by `save_head`, and the backbone"
    ):
        save_network(tmp_path / "network.safetensors", network, task={})
    assert not list(tmp_path.iterdir())
