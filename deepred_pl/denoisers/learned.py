"""Trained networks as denoisers."""

from pathlib import Path

import torch
from torch import Tensor, nn

from deepred_pl.denoisers.denoiser import GreyLevelDenoiser


class Learned(GreyLevelDenoiser):
    """A trained network from a file, or any module.

    It is called as module(x), or as module(x, sigma) if a sigma is given, with x of shape
    (1, C, H, W) in [0, 1] and sigma of shape (1,) on the same scale; on the fit's device, without
    gradients, and in evaluation mode (an exported program in the mode it was exported in). It must
    return an image of x's shape. If it needs another range, padding, channel order, or returns the
    residual, wrap it.

    A file contains code that is executed: load only files that you trust.

    Args:
        path: A TorchScript file (`torch.jit.save`) or an exported program (`.pt2`,
            `torch.export.save`, of the image's size unless its sides are dynamic).
        sigma: Noise level passed to the network, in grey levels of an 8-bit image, in (0, 255];
            None for a network without one.
        module: A module instead of a file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file contains no module, sigma is out of range, or not exactly one of path
            and module is given; at `check`, the module does not accept or return the image.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        sigma: float | None = None,
        module: nn.Module | None = None,
    ) -> None:
        if (path is None) == (module is None):
            raise ValueError("expected a path or a module, got " + ("both" if path else "neither"))
        if module is not None and not isinstance(module, nn.Module):
            raise ValueError(
                f"expected a torch.nn.Module, got {type(module).__name__}; a plain function is a "
                "denoiser by itself: REDUpdate(function)"
            )
        if sigma is not None:
            super().__init__(sigma)
        self._module = _load(Path(path)) if path is not None else module.eval()  # type: ignore[union-attr]
        self._device: torch.device | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._device != x.device:
            self._module, self._device = self._module.to(x.device), x.device
        with torch.inference_mode():
            if self.sigma is None:
                return self._module(x)
            return self._module(x, x.new_full((1,), self.level))

    def check(self, x: Tensor) -> None:
        """Denoise x once, to detect a module that does not fit before the fit starts.

        Raises:
            ValueError: The module failed, or returned another shape or values that are not finite.
        """
        (channels, *size), without = x.shape[1:], self.sigma is None
        try:
            denoised = self(x)
        except Exception as error:  # modules raise anything
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise ValueError(
                f"expected a module that takes ({'x' if without else 'x, sigma'}) with x of "
                f"{channels} channels and {size[0]}×{size[1]} pixels, but it failed: {reason}; if "
                f"it takes {'a' if without else 'no'} noise level, set "
                f"sigma{'' if without else '=null (None)'}"
            ) from error
        if not isinstance(denoised, Tensor) or denoised.shape != x.shape:
            got = tuple(denoised.shape) if isinstance(denoised, Tensor) else type(denoised).__name__
            raise ValueError(
                f"expected a module that returns {tuple(x.shape)} like its input, got {got}; wrap "
                "it in one that does"
            )
        if not denoised.isfinite().all():
            raise ValueError("expected a module that returns finite values, got NaN or infinity")


def _load(path: Path) -> nn.Module:
    if not path.is_file():
        raise FileNotFoundError(f"expected the file of a network, found none at {path}")
    try:
        if path.suffix == ".pt2":
            return torch.export.load(path).module()  # its mode was fixed at export
        return torch.jit.load(path, map_location="cpu").eval()
    except Exception as error:  # unpicklers raise anything
        raise ValueError(
            f"expected a TorchScript file or an exported program (.pt2), got {path}, which is "
            "damaged or neither; a file of weights does not contain the network: create one with "
            "torch.jit.script or torch.export"
        ) from error
