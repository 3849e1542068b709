"""Two processes with half a batch each take the step of one process with all of it."""

import os
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from fast import SegmentationHead
from tests.fast.against_reference import every_device
from tests.fast.test_fusion import cell

PROCESSES = 2
BOUND = {"cpu": 1e-11, "cuda": 1e-4}  # float64 with values of order 1; SyncBatchNorm's statistics are float32


class JointBatchNorm(nn.BatchNorm2d):
    """`nn.SyncBatchNorm`, which runs on GPUs only, in a few lines for a CPU: statistics of all processes' maps."""

    def forward(self, x: Tensor) -> Tensor:
        count = x.numel() // x.shape[1] * dist.get_world_size()
        sums: Tensor = all_reduce(  # type: ignore[no-untyped-call]
            torch.stack((x.sum(dim=(0, 2, 3)), x.square().sum(dim=(0, 2, 3))))
        )
        mean, square = sums / count
        var = square - mean.square()
        with torch.no_grad():
            assert self.momentum is not None
            cast(Tensor, self.running_mean).lerp_(mean, self.momentum)
            cast(Tensor, self.running_var).lerp_(var * count / (count - 1), self.momentum)
            cast(Tensor, self.num_batches_tracked).add_(1)
        normalised: Tensor = (x - mean[:, None, None]) * (var + self.eps).rsqrt()[:, None, None]
        return normalised * self.weight[:, None, None] + self.bias[:, None, None]


def model(device: str) -> SegmentationHead:
    torch.manual_seed(0)
    return SegmentationHead(cell(), 3).double().to(device).train()


def batch(device: str) -> Tensor:
    return torch.randn(2 * PROCESSES, 3, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)


def stepped(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """All weights and statistics after a step of SGD."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(x).square().mean().backward()
    optimizer.step()
    return {key.removeprefix("module."): tensor.detach().cpu() for key, tensor in module.state_dict().items()}


def one_of_two(rank: int, folder: str, device: str, training: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    try:
        module: nn.Module = model(device).train(training)
        if training and device == "cuda":
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        elif training:
            join_norms(module)
        state = stepped(DistributedDataParallel(module), batch(device).chunk(PROCESSES)[rank])
        torch.save(state, os.path.join(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


def join_norms(module: nn.Module) -> None:
    for part in list(module.modules()):
        if isinstance(norm := getattr(part, "norm", None), nn.BatchNorm2d):
            joint = JointBatchNorm(norm.num_features, momentum=norm.momentum).double()
            joint.load_state_dict(norm.state_dict())
            part.norm = joint


@every_device
@pytest.mark.parametrize("training", [False, True])
def test_two_processes_take_the_step_of_one(device: str, training: bool, tmp_path: Path) -> None:
    """Training, by norms that take the statistics of all processes; frozen, each on kernels of its own."""
    arguments = str(tmp_path), device, training
    spawn(one_of_two, args=arguments, nprocs=PROCESSES)  # type: ignore[no-untyped-call]
    expected = stepped(model(device).train(training), batch(device))
    for rank in range(PROCESSES):
        state = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert list(state) == list(expected)
        for name, tensor in expected.items():
            assert torch.allclose(state[name], tensor, rtol=0, atol=BOUND[device]), name


def test_pytorchs_own_synchronised_norm_is_called(tmp_path: Path) -> None:
    """It refuses a CPU itself, as soon as there is a process group."""
    module = nn.SyncBatchNorm.convert_sync_batchnorm(model("cpu"))  # type: ignore[no-untyped-call]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
            module(batch("cpu"))
    finally:
        dist.destroy_process_group()
