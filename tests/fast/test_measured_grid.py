"""The grid of made networks whose features lie where their construction says."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fast.measured_grid import OffGridError, measured_grid
from reference.grid import Grid


def itself(features: Tensor) -> Tensor:
    return features


def strided(kernel: int, padding: int, halvings: int = 3) -> nn.Sequential:
    convolutions = [nn.Conv2d(8 if i else 3, 8, kernel, stride=2, padding=padding) for i in range(halvings)]
    return nn.Sequential(*(layer for each in convolutions for layer in (each, nn.BatchNorm2d(8), nn.ReLU())))


class Attends(nn.Module):
    """Patches that all attend to each other."""

    def __init__(self, patch: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, patch, stride=patch)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.patches(images)
        tokens = maps.flatten(2).transpose(1, 2)
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        features: Tensor = (tokens + mixed).transpose(1, 2).reshape(maps.shape)
        return features


class Leaning(nn.Module):
    """Features on corners, beside a branch one feature further to the bottom right, whose last norm begins at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = strided(3, 1)
        convolution, norm = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
        nn.init.normal_(convolution.weight, std=0.5)
        nn.init.zeros_(norm.weight)
        self.branch = nn.Sequential(nn.ZeroPad2d((0, 2, 0, 2)), convolution, norm)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.trunk(images)
        features: Tensor = maps + self.branch(maps)
        return features


CASES: dict[str, tuple[Callable[[], nn.Module], Grid]] = {
    "3 × 3, padded by 1": (lambda: strided(3, 1), Grid(8)),
    "7 × 7, padded by 3": (lambda: strided(7, 3), Grid(8)),
    "2 × 2": (lambda: strided(2, 0), Grid(8, False)),
    "4 × 4, padded by 1": (lambda: strided(4, 1), Grid(8, False)),
    "patches of 14": (lambda: nn.Conv2d(3, 8, 14, stride=14), Grid(14, False)),
    "attention": (lambda: Attends(16), Grid(16, False)),
}


@pytest.mark.parametrize(("build", "grid"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("seed", [0, 1])
def test_the_grid_is_that_of_the_construction(build: Callable[[], nn.Module], grid: Grid, seed: int) -> None:
    torch.manual_seed(seed)
    assert measured_grid(build(), itself, grid.stride) == grid


def test_nothing_is_left_changed() -> None:
    module = strided(3, 1).train()
    module[1].eval()
    before = copy.deepcopy(module.state_dict())
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with torch.no_grad():
        measured_grid(module, itself, 8)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert (module.training, module[1].training) == (True, False)
    assert all(weight.grad is None for weight in module.parameters())


def test_a_branch_that_begins_at_0_counts() -> None:
    torch.manual_seed(0)
    with pytest.raises(OffGridError, match=r"has features at 8·i \+ \d\.\d pixels: neither on every 8th pixel") as raised:
        measured_grid(Leaning(), itself, 8)
    assert raised.value.as_many_as_corners


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (strided(3, 1), r"gives 10×6 features of 80×48 pixels, where a stride of 16 gives 5×3"),
        (nn.Linear(7, 7), r"gives no features of pictures of 80×48 pixels \(mat1 and mat2"),
    ],
)
def test_what_is_no_such_map_is_said(module: nn.Module, words: str) -> None:
    with pytest.raises(OffGridError, match=words):
        measured_grid(module, itself, 16)
