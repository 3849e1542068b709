"""Random numbers of one training, whatever else draws in the same process meanwhile."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor


class RandomSequence:
    """Begins where PyTorch's default generators, of the CPU and of `device`, stand now. Inside `with`, they give its numbers.

    So several trainings in turns draw what each would draw alone. What a CUDA graph that was captured inside draws at its
    replays belongs to it too, wherever it is replayed.
    """

    def __init__(self, device: torch.device) -> None:
        self._of_cpu = torch.get_rng_state()
        self._generator: Any = _default_generator(device) if device.type == "cuda" else None
        self._of_gpu: Any = self._generator and self._generator.clone_state()
        self._outer: tuple[Any, Any] | None = None  # the states that are set back at the end
        self._depth = 0

    def state(self) -> dict[str, Tensor]:
        """Where it stands, between two uses: bytes (B,) on the CPU, of each generator."""
        return {"cpu": self._of_cpu} | ({} if self._generator is None else {"gpu": self._of_gpu.get_state()})

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on where another one stood, on a device of the same kind."""
        self._of_cpu = state["cpu"].clone()
        if self._generator is not None:
            self._of_gpu.set_state(state["gpu"].clone())

    def __enter__(self) -> Self:
        self._depth += 1
        if self._depth == 1:
            self._outer = torch.get_rng_state(), self._generator and self._generator.graphsafe_get_state()
            torch.set_rng_state(self._of_cpu)
            if self._generator is not None:
                self._generator.graphsafe_set_state(self._of_gpu)  # shared, not copied: draws move it on
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._depth -= 1
        if self._depth == 0:
            assert self._outer is not None
            self._of_cpu = torch.get_rng_state()
            torch.set_rng_state(self._outer[0])
            if self._generator is not None:
                self._generator.graphsafe_set_state(self._outer[1])


def _default_generator(device: torch.device) -> Any:
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.default_generators[index]
