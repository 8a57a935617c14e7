"""Optimizers and learning-rate schedules for the θ-update."""

import math
from collections.abc import Iterable

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def adam(parameters: Iterable) -> Optimizer:
    """Adam with a learning rate of 0.01."""
    return torch.optim.Adam(parameters, lr=0.01, fused=True)


class WarmupCosine(LambdaLR):
    """Learning rate with a linear warm-up, then a cosine down to 0 at `total_steps`.

    Args:
        optimizer: The optimizer, with the peak learning rate.
        total_steps: θ-steps until the rate is 0, where it stays.
        warmup_steps: θ-steps until the rate reaches its peak.

    Raises:
        ValueError: Not 0 <= warmup_steps < total_steps.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0) -> None:
        if not 0 <= warmup_steps < total_steps:
            raise ValueError(
                f"expected 0 <= warmup_steps < total_steps, got {warmup_steps} and {total_steps}"
            )

        def factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / (warmup_steps + 1)
            done = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
            return 0.5 * (1 + math.cos(math.pi * done))

        super().__init__(optimizer, factor)
