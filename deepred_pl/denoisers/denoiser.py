"""Base classes and helpers of the denoisers."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from deepred_pl.checks import as_plain, check_grey_levels


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


class GreyLevelDenoiser(Denoiser):
    """A denoiser with a noise level, which may be changed at any time.

    Args:
        sigma: Assumed noise level in grey levels of an 8-bit image, in (0, 255].

    Raises:
        ValueError: sigma outside (0, 255].
    """

    _sigma: float | None = None  # only of networks that take no noise level

    def __init__(self, sigma: float) -> None:
        self.sigma = sigma

    @property
    def sigma(self) -> float | None:
        """The noise level in grey levels of an 8-bit image."""
        return self._sigma

    @sigma.setter
    def sigma(self, sigma: float) -> None:
        sigma = as_plain(sigma)
        check_grey_levels("denoiser sigma", sigma, "3 means 3/255")
        self._sigma = sigma

    @property
    def level(self) -> float:
        """The noise level on the [0, 1] scale."""
        assert self._sigma is not None
        return self._sigma / 255


def through_numpy(function: Callable[[np.ndarray], np.ndarray], x: Tensor) -> Tensor:
    """Apply `function`, (H, W, C) to (H, W, C) in float64, to an image (1, C, H, W)."""
    if x.ndim != 4 or x.shape[0] != 1:
        raise ValueError(f"expected one image (1, C, H, W), got {tuple(x.shape)}")
    image = _to_host(x.detach())[0].double().movedim(0, -1).numpy()  # (C, H, W) -> (H, W, C)
    denoised = np.ascontiguousarray(function(np.ascontiguousarray(image)))
    result = torch.from_numpy(denoised).movedim(-1, 0)[None].to(x.dtype)
    return result.pin_memory().to(x.device, non_blocking=True) if x.is_cuda else result.to(x)


def _to_host(x: Tensor) -> Tensor:
    if not x.is_cuda:
        return x.cpu()
    # Through pinned memory: other copies are staged by the driver piece by piece.
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    host.copy_(x, non_blocking=True)
    copied = torch.cuda.current_stream(x.device).record_event(torch.cuda.Event(blocking=True))
    copied.synchronize()
    return host


def each_channel(function: Callable[[np.ndarray], np.ndarray], image: np.ndarray) -> np.ndarray:
    """Apply `function`, (H, W) to (H, W), to each channel of an image (H, W, C)."""
    channels = np.moveaxis(image, -1, 0)
    # scikit-image's non-local means drops an axis of one pixel.
    return np.stack([function(c).reshape(c.shape) for c in channels], axis=-1)
