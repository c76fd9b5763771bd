"""Learning rate as a function of the step."""

import math


def lr_factor(step: int, *, num_steps: int, num_warmup_steps: int, min_ratio: float) -> float:
    """Factor of the peak learning rate at ``step`` (from 0): linear warm-up, then half a cosine down to ``min_ratio``.

    The warm-up's first step is at ``1 / num_warmup_steps`` and its last at 1; step ``num_steps`` and later ones are
    at ``min_ratio``. A pure function of the step, so that a resumed run continues where it stopped (SGDR without
    restarts, arXiv:1608.03983).

    Raises ``ValueError`` when the warm-up is longer than the run or ``min_ratio`` is outside [0, 1].

    >>> [round(lr_factor(step, num_steps=6, num_warmup_steps=2, min_ratio=0.0), 3) for step in range(7)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if not 0 <= num_warmup_steps <= num_steps:
        raise ValueError(
            f"{num_warmup_steps} warm-up steps do not fit into {num_steps} steps: shorten the warm-up or train longer"
        )
    if not 0 <= min_ratio <= 1:
        raise ValueError(f"min_ratio is {min_ratio}: it is a share of the peak learning rate, in [0, 1]")
    if step < num_warmup_steps:
        return (step + 1) / num_warmup_steps
    if step >= num_steps:
        return min_ratio
    progress = (step - num_warmup_steps) / (num_steps - num_warmup_steps)
    return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
