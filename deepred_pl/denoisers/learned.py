"""A trained network as the denoiser."""

from pathlib import Path

import torch
from torch import Tensor, nn

from deepred_pl.denoisers.denoiser import Denoiser, grey_levels


class Learned(Denoiser):
    """A trained network from a file, or any module.

    It is called as module(x), or as module(x, sigma) where a sigma is given, with x of shape
    (1, C, H, W) in [0, 1] and sigma of shape (1,) on the same scale; on the fit's device, without
    gradients, and in evaluation mode (an exported program in the mode it was exported in). It must
    return an image of x's shape. What else it wants (another range, padding, a channel order, a
    residual to subtract) is a wrapper around it.

    A file holds code that is run: load none that you do not trust.

    Args:
        path: A TorchScript file (`torch.jit.save`) or an exported program (`.pt2`,
            `torch.export.save`, of the image's size unless its sides are dynamic).
        sigma: Noise level it is told, in grey levels of an 8-bit image, in (0, 255]; None for a
            network that takes no level.
        module: A module instead of a file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A file that holds no module, sigma out of range, or not exactly one of path
            and module; at `check`, a module that does not take or give the image.
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
                "denoiser as it is: REDUpdate(function)"
            )
        self.sigma = sigma
        self._level = None if sigma is None else grey_levels(sigma)
        self._module = _load(Path(path)) if path is not None else module.eval()  # type: ignore[union-attr]
        self._device: torch.device | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._device != x.device:
            self._module, self._device = self._module.to(x.device), x.device
        with torch.inference_mode():
            if self._level is None:
                return self._module(x)
            return self._module(x, x.new_full((1,), self._level))

    def check(self, x: Tensor) -> None:
        """Denoise an image like those to come once, so that a misfit is found before the fit.

        Raises:
            ValueError: The module failed on it, or gave another shape or no finite values.
        """
        channels, size = x.shape[1], tuple(x.shape[-2:])
        told = "x" if self._level is None else "x, sigma"
        try:
            denoised = self(x)
        except Exception as error:  # modules raise what they like
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            other = "give a sigma" if self._level is None else "sigma=null (None)"
            raise ValueError(
                f"expected a module that takes ({told}) with x of {channels} channels and "
                f"{size[0]}×{size[1]} pixels; it failed: {reason}; if it takes "
                f"{'a noise level' if self._level is None else 'no noise level'}, {other}"
            ) from error
        if not isinstance(denoised, Tensor) or denoised.shape != x.shape:
            got = tuple(denoised.shape) if isinstance(denoised, Tensor) else type(denoised).__name__
            raise ValueError(
                f"expected a module that gives {tuple(x.shape)} like its input, got {got}; wrap "
                "it in one that does"
            )
        if not denoised.isfinite().all():
            raise ValueError("expected a module that gives finite values, got NaN or infinity")


def _load(path: Path) -> nn.Module:
    if not path.is_file():
        raise FileNotFoundError(f"expected a network's file, found none at {path}")
    try:
        if path.suffix == ".pt2":
            return torch.export.load(path).module()  # exported in the mode it was in
        return torch.jit.load(path, map_location="cpu").eval()
    except Exception as error:  # unpicklers raise what they like
        raise ValueError(
            f"expected a TorchScript file or an exported program (.pt2), got {path}, which is "
            "damaged or neither; weights alone are no network: make one with torch.jit.script or "
            "torch.export"
        ) from error
