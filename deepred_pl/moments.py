"""Mean and variance of many images that are seen one after another."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class RunningMoments:
    """Mean and variance per value, without keeping the images (Welford 1962).

    Attributes:
        count: Images seen.
        mean: Their mean, of their shape; 0-dim before the first.
        scatter: Their summed squared deviation from it, of their shape.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.scatter = torch.zeros(())

    def add(self, image: Tensor) -> None:
        """See one image more; all have one shape and device."""
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
        """Tensors and a number."""
        return {"count": self.count, "mean": self.mean, "scatter": self.scatter}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.count, self.mean, self.scatter = state["count"], state["mean"], state["scatter"]


def together(parts: Sequence[RunningMoments]) -> tuple[Tensor, Tensor]:
    """Mean and variance per value of all images of several parts, each of as many images."""
    device = parts[-1].mean.device  # those of a checkpoint may still be on the CPU
    means = torch.stack([part.mean.to(device) for part in parts])
    within = torch.stack([part.variance.to(device) for part in parts]).mean(0)
    return means.mean(0), within + means.var(0, correction=0)
