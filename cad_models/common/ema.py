"""Exponential moving average of a module's weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """Moving average of a module's parameters and persistent buffers.

    Floating-point tensors are averaged (in float32 where the module has less); others, such as counters, are copied.
    The decay of update *n* (from 0) is ``min(decay, (1 + n) / (10 + n))``, so that the random start is forgotten within
    a few updates (TensorFlow's ``ExponentialMovingAverage``; 0.9995 helps in MixCon3D, arXiv:2311.01734).

    Raises ``ValueError`` for a decay outside [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float = 0.9995):
        if not 0 <= decay < 1:
            raise ValueError(f"the EMA decay is {decay}: it must lie in [0, 1), for instance 0.9995")
        self.decay = decay
        self.num_updates = 0
        self.average: dict[str, Tensor] = {
            name: tensor.detach().to(_average_dtype(tensor), copy=True) for name, tensor in module.state_dict().items()
        }

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Moves the average towards the module's present tensors; call it after each optimizer step."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        averages, currents = [], []
        for name, current in module.state_dict().items():
            average = self.average[name]
            if average.is_floating_point():
                averages.append(average)
                currents.append(current.to(average.dtype))
            else:
                average.copy_(current)
        torch._foreach_lerp_(averages, currents, 1 - decay)
        self.num_updates += 1

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Overwrites the module's parameters and buffers by their averages."""
        for name, tensor in module.state_dict().items():
            tensor.copy_(self.average[name])

    @contextmanager
    def applied_to(self, module: nn.Module) -> Iterator[None]:
        """Within the context the module has the averaged tensors; afterwards its own again, bit for bit."""
        own = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        self.copy_to(module)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, tensor in module.state_dict().items():
                    tensor.copy_(own[name])

    def state_dict(self) -> dict:
        """``{"num_updates": int, "average": {name: tensor}}``, for a checkpoint; tensors are not copied."""
        return {"num_updates": self.num_updates, "average": dict(self.average)}

    def load_state_dict(self, state: dict) -> None:
        """Takes over a stored state; raises ``ValueError`` when its names are not those of the module."""
        different = self.average.keys() ^ state["average"].keys()
        if different:
            raise ValueError(
                f"the stored average belongs to another module; names on one side only: {sorted(different)[:5]}"
            )
        self.num_updates = state["num_updates"]
        with torch.no_grad():
            for name, tensor in self.average.items():
                tensor.copy_(state["average"][name])


def _average_dtype(tensor: Tensor) -> torch.dtype:
    # A step of 5e-4 is below the resolution of bfloat16 (4e-3): its average would never move.
    return torch.promote_types(tensor.dtype, torch.float32) if tensor.is_floating_point() else tensor.dtype
