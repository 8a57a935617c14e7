"""What the ready-made denoisers have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


class Denoiser(ABC):
    """A map from an image to a cleaner one, (1, C, H, W) in [0, 1] to the same.

    The base class lets the command line find denoisers by their short names.
    """

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """The denoised x, of its shape, device and dtype."""

    def check(self, x: Tensor) -> None:  # noqa: B027  most take any image
        """Refuse images like x; called before the fit.

        Raises:
            ValueError: It cannot denoise them; the message says why.
        """


def through_numpy(function: Callable[[np.ndarray], np.ndarray], x: Tensor) -> Tensor:
    """Apply `function`, (H, W, C) to (H, W, C) in float64, to an image (1, C, H, W)."""
    if x.ndim != 4 or x.shape[0] != 1:
        raise ValueError(f"expected one image (1, C, H, W), got {tuple(x.shape)}")
    image = x[0].detach().cpu().double().movedim(0, -1).numpy()  # (C, H, W) -> (H, W, C)
    denoised = np.ascontiguousarray(function(np.ascontiguousarray(image)))
    return torch.from_numpy(denoised).movedim(-1, 0)[None].to(x)


def each_channel(function: Callable[[np.ndarray], np.ndarray], image: np.ndarray) -> np.ndarray:
    """Apply `function`, (H, W) to (H, W), to every channel of an image (H, W, C)."""
    return np.stack([function(channel) for channel in np.moveaxis(image, -1, 0)], axis=-1)


def grey_levels(sigma: float) -> float:
    """A denoiser's sigma from grey levels of an 8-bit image to the [0, 1] scale.

    Raises:
        ValueError: sigma outside (0, 255].
    """
    if not 0 < sigma <= 255:
        raise ValueError(
            f"denoiser sigma must be in (0, 255] grey levels, got {sigma}; give 3 for 3/255"
        )
    return sigma / 255
