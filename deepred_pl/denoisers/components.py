"""Denoising of images with many channels, by their principal components."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepred_pl.checks import as_plain, check_at_least, check_grey_levels
from deepred_pl.denoisers.bm3d import BM3D
from deepred_pl.denoisers.denoiser import Denoiser


class PrincipalComponents(Denoiser):
    """Denoises the first principal components of the channels, and drops the others.

    For spectral images, whose bands are nearly mixtures of few images (Zhuang & Bioucas-Dias 2018,
    IEEE JSTARS 11). The components are computed from each x.

    Args:
        denoiser: The denoiser of each component, as of a grey image. Its sigma is that of the
            channels, because white noise is as strong in every component; values are not in [0, 1].
        components: How many are kept.
        channel_sigmas: The noise of each channel in grey levels, if they differ: it is made equal
            before the components are computed, at the root mean square, which is the denoiser's.

    Raises:
        ValueError: An argument is out of range; at `check`, there are fewer channels than
            components, or another number of them than `channel_sigmas`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        components: int,
        channel_sigmas: Sequence[float] | None = None,
    ) -> None:
        if not callable(denoiser):
            raise ValueError(f"expected a denoiser, got {denoiser!r}; use one such as BM3D")
        check_at_least(1, components=components)
        self.denoiser = denoiser
        self.components = components
        self.channel_sigmas = None if channel_sigmas is None else list(as_plain(channel_sigmas))
        for sigma in self.channel_sigmas or ():
            check_grey_levels("channel_sigmas", sigma, "10 means 10/255")

    @property
    def sigma(self) -> float | None:
        """The denoiser's noise level in grey levels of an 8-bit image, if it has one."""
        return getattr(self.denoiser, "sigma", None)

    @sigma.setter
    def sigma(self, sigma: float) -> None:
        self.denoiser.sigma = sigma  # type: ignore[attr-defined]

    def __call__(self, x: Tensor) -> Tensor:
        scale = self._scale(x)
        channels = x[0].float().flatten(1) / scale  # (C, H · W)
        mean = channels.mean(dim=1, keepdim=True)
        centred = channels - mean
        _, vectors = torch.linalg.eigh(centred @ centred.T)  # by increasing eigenvalues
        basis = vectors[:, -self.components :]  # (C, components)
        images = (basis.T @ centred).view(-1, 1, 1, *x.shape[-2:])
        denoised = torch.cat([self.denoiser(image) for image in images], dim=1)
        return (scale * (basis @ denoised[0].flatten(1) + mean)).view_as(x).to(x.dtype)

    def check(self, x: Tensor) -> None:
        """Refuse images with too few channels, or another number than `channel_sigmas`."""
        channels = x.shape[1]
        if channels < self.components:
            raise ValueError(
                f"expected at least as many channels as components, {self.components}, got "
                f"{channels}; use fewer components"
            )
        if self.channel_sigmas is not None and len(self.channel_sigmas) != channels:
            raise ValueError(
                f"expected channel_sigmas for {channels} channels, got {len(self.channel_sigmas)}"
            )
        if isinstance(self.denoiser, BM3D) and self.denoiser.on_gpu(x):
            raise ValueError(
                "bm3d-triton clips to [0, 1], where principal components are not; set the "
                "denoiser's backend='bm3d'"
            )
        if isinstance(self.denoiser, Denoiser):
            self.denoiser.check(x[:, :1])

    def _scale(self, x: Tensor) -> Tensor | float:
        """The noise of each channel in units of their root mean square, (C, 1)."""
        if self.channel_sigmas is None:
            return 1.0
        sigmas = torch.tensor(self.channel_sigmas, dtype=torch.float32, device=x.device)
        return (sigmas / sigmas.square().mean().sqrt())[:, None]
