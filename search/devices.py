"""One device, or several processes with one device each, behind one interface for trainings.

Started as a plain command, a training runs on one device. Started by `torchrun` or `accelerate launch`, each process has
one device, and Hugging Face Accelerate (the extra `devices`) joins them.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from search.commands import to_install
from search.errors import InputError


def resolve_device(device: str) -> str:
    """The device's full name, a GPU's with its number; auto is a GPU if there is one. Raises InputError for an absent one."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        if place.type == "cuda" and torch.cuda.is_available():  # no tensor: its context takes half a gigabyte
            index = torch.cuda.current_device() if place.index is None else place.index
            torch.cuda.get_device_properties(index)
            return f"cuda:{index}"
        return str(torch.empty(1, device=place).device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"`device` {device} cannot be used ({reason}): give cpu, or leave it out") from error


def is_full_memory(error: Exception) -> bool:
    """Whether the error means a full memory. PyTorch has an exception type for a full GPU, but only words for a CPU."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, MemoryError) or any(each in str(error).lower() for each in words)


class Devices:
    """This is process `rank` of `count`; `device` is its device."""

    rank, count = 0, 1

    def __init__(self, device: str) -> None:
        self.device = torch.device(resolve_device(device))

    def prepare(self, network: nn.Module) -> nn.Module:
        """Wrap a network for training, so that its backward pass averages the gradients of all processes."""
        return network

    def alone(self, network: nn.Module) -> AbstractContextManager[Any]:
        """Inside, a backward pass only adds to this process's gradients, because another one follows."""
        return nullcontext()

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes."""
        return values

    def wait(self) -> None:
        """Wait until all processes have reached this point."""

    def close(self) -> None:
        """Leave the group of processes."""


class AcceleratedDevices(Devices):
    """Several processes joined by Accelerate, which reads the launcher's environment variables."""

    def __init__(self, device: str) -> None:
        try:
            from accelerate import Accelerator
        except ImportError as error:
            raise InputError(
                f"several processes need Accelerate: {to_install('devices')}, or start without torchrun"
            ) from error
        self._accelerator = Accelerator(cpu=device == "cpu")
        self.device = self._accelerator.device
        self.rank, self.count = self._accelerator.process_index, self._accelerator.num_processes

    def prepare(self, network: nn.Module) -> nn.Module:
        prepared: nn.Module = self._accelerator.prepare_model(network)
        return prepared

    def alone(self, network: nn.Module) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self._accelerator.no_sync(network)
        return context

    def total(self, values: Tensor) -> Tensor:
        summed: Tensor = self._accelerator.reduce(values, reduction="sum")
        return summed

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()

    def close(self) -> None:
        self._accelerator.end_training()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def join_devices(device: str) -> Devices:
    """The devices that this process was started with. Raises InputError for an absent one, or if Accelerate is missing."""
    return AcceleratedDevices(device) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else Devices(device)
