"""Running mean and variance of a sequence of images."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class RunningMoments:
    """Mean and variance per value, without storing the images (Welford 1962).

    Attributes:
        count: Number of images.
        mean: Their mean, of their shape; 0-dim before the first.
        scatter: Sum of their squared deviations from the mean, of their shape.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.scatter = torch.zeros(())

    def add(self, image: Tensor) -> None:
        """Add an image; all have the same shape and device."""
        if self.count == 0:
            self.mean = self.scatter = torch.zeros_like(image)
        mean, scatter = self.mean.to(image.device), self.scatter.to(image.device)
        self.count += 1
        deviation = image - mean
        self.mean = mean + deviation / self.count
        self.scatter = scatter + deviation * (image - self.mean)

    @property
    def variance(self) -> Tensor:
        """The mean squared deviation, of the images' shape."""
        return self.scatter / self.count

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and a number."""
        return {"count": self.count, "mean": self.mean, "scatter": self.scatter}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        self.count, self.mean, self.scatter = state["count"], state["mean"], state["scatter"]


def together(parts: Sequence[RunningMoments]) -> tuple[Tensor, Tensor]:
    """Mean and variance per value over several parts with equal numbers of images."""
    device = parts[-1].mean.device  # parts loaded from a checkpoint may still be on the CPU
    means = torch.stack([part.mean.to(device) for part in parts])
    within = torch.stack([part.variance.to(device) for part in parts]).mean(0)
    return means.mean(0), within + means.var(0, correction=0)
