"""Where a training stands: what a checkpoint keeps of it beside weights and optimisers."""

from typing import Any

from torch import Tensor


class LoopState:
    """Where a run stands; everything in it is resumed."""

    def __init__(self) -> None:
        self.epoch = 0
        """Finished epochs."""
        self.step = 0
        """Finished steps of the epoch that is under way."""
        self.global_step = 0
        self.best: dict[str, float] = {}
        self.evals_without_better = 0
        """Evaluations since the score was best."""
        self.history: list[dict[str, Any]] = []
        self.sums: dict[str, Any] = {}
        self.num_summed = 0
        self.objects_per_s = 0.0

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Add one step's scalars to the running sums, without waiting for a GPU."""
        for name, value in scalars.items():
            # Sums in float64: means over an epoch are the same wherever it was interrupted.
            self.sums[name] = self.sums.get(name, 0.0) + value.double()
        self.num_summed += 1

    def reset_sums(self) -> None:
        """Start the next epoch's means."""
        self.sums, self.num_summed = {}, 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {**self.__dict__, "sums": {name: float(value) for name, value in self.sums.items()}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LoopState":
        """The inverse of :meth:`to_dict`."""
        state = cls()
        state.__dict__.update(values)
        return state
