"""BM3D."""

import threading
from importlib.util import find_spec
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from deepred_pl.denoisers.denoiser import Denoiser, each_channel, grey_levels, through_numpy

# Blocks are 8×8: smaller images are refused by the package, and 8×8 itself crashes the process.
LEAST_SIDE = 16

# Its C library keeps one thread pool for the process and is not re-entrant.
_LOCK = threading.Lock()

# Weights of the opponent colour space that colour BM3D works in, one row a channel.
_OPPONENT = np.array([[1 / 3, 1 / 3, 1 / 3], [1 / 2, 0, -1 / 2], [1 / 4, -1 / 2, 1 / 4]])
_COLOURS = _OPPONENT, np.linalg.inv(_OPPONENT)  # there and back


class BM3D(Denoiser):
    """Block-matching and 3D filtering (Dabov et al. 2007), by the packages `bm3d` or `bm3d-triton`.

    Colour images are matched on luminance, by `bm3d-triton` on each channel of the same opponent
    colours; other channel counts are denoised one by one. The denoiser of the paper's
    super-resolution. **Licence: the `bm3d` package is free for non-commercial use only.**

    Args:
        sigma: Noise level it is told, in grey levels of an 8-bit image, in (0, 255].
        profile: Of `bm3d`: "np", the package's default, "lc", about a third of its time, or "high".
        threads: Of `bm3d`: the cores it uses; 0 are all. Only with one thread are two runs equal.
        backend: "bm3d", on the CPU; "triton", on an NVIDIA GPU (the extra `gpu`), where sums in any
            order make no two results quite equal; "auto": triton for images on a GPU where it is
            installed, otherwise bm3d.

    Raises:
        ValueError: sigma outside (0, 255], an unknown profile or backend, or threads below 0.
    """

    def __init__(
        self,
        sigma: float = 5.0,
        profile: Literal["np", "lc", "high"] = "np",
        threads: int = 0,
        backend: Literal["auto", "bm3d", "triton"] = "auto",
    ) -> None:
        if profile not in ("np", "lc", "high"):
            raise ValueError(f"profile must be 'np', 'lc' or 'high', got {profile!r}")
        if threads < 0:
            raise ValueError(f"threads must be at least 0, which are all cores, got {threads}")
        if backend not in ("auto", "bm3d", "triton"):
            raise ValueError(f"backend must be 'auto', 'bm3d' or 'triton', got {backend!r}")
        self.sigma = sigma
        self.profile = profile
        self.threads = threads
        self.backend = backend
        self._level = grey_levels(sigma)

    def __call__(self, x: Tensor) -> Tensor:
        if self._on_gpu(x):
            return self._denoise_on_gpu(x)
        return through_numpy(self._denoise, x)

    def check(self, x: Tensor) -> None:
        """Refuse what the chosen backend cannot take; x is (1, C, H, W)."""
        if self.backend == "triton" and not (x.is_cuda and find_spec("bm3d_triton")):
            raise ValueError(
                "backend='triton' needs an NVIDIA GPU and the package bm3d-triton, got an image on "
                f"{x.device.type} and {'' if find_spec('bm3d_triton') else 'no '}bm3d-triton; "
                "install the extra gpu (pip install '.[gpu]'), or take backend='bm3d'"
            )

    def _on_gpu(self, x: Tensor) -> bool:
        if self.backend == "auto":
            return x.is_cuda and find_spec("bm3d_triton") is not None
        return self.backend == "triton"

    def _denoise_on_gpu(self, x: Tensor) -> Tensor:
        from bm3d_triton import denoise

        if x.shape[1] != 3:
            return denoise(x.float(), self._level, clamp=False).to(x.dtype)
        there, back = (torch.from_numpy(m).to(x.device, torch.float32) for m in _COLOURS)
        channels = torch.einsum("oc,nchw->nohw", there, x.float())
        channels[:, 1:] += 0.5  # the package clips to [0, 1]
        denoised = [
            denoise(channels[:, i : i + 1], level, clamp=False)
            for i, level in enumerate(np.linalg.norm(_OPPONENT, axis=1) * self._level)
        ]
        channels = torch.cat(denoised, dim=1)
        channels[:, 1:] -= 0.5
        return torch.einsum("co,nohw->nchw", back, channels).to(x.dtype)

    def _denoise(self, image: np.ndarray) -> np.ndarray:
        height, width, channels = image.shape
        short = [(0, max(0, LEAST_SIDE - side)) for side in (height, width)]
        padded = np.pad(image, [*short, (0, 0)], mode="symmetric")
        if channels != 3:
            denoised = each_channel(self._grey, padded)
        elif np.ptp(padded @ _OPPONENT.T, axis=(0, 1)).min() > 1e-6:
            denoised = self._run("bm3d_rgb", padded)
        elif np.ptp(padded, axis=-1).max() < 1e-6:  # grey stored as RGB
            denoised = self._grey(padded[..., 0])[..., None].repeat(3, axis=-1)
        else:  # colour BM3D divides by the range of each opponent channel, and one has none
            denoised = each_channel(self._grey, padded)
        return denoised[:height, :width]

    def _grey(self, channel: np.ndarray) -> np.ndarray:
        return self._run("bm3d", channel)

    def _run(self, function: str, image: np.ndarray) -> np.ndarray:
        import bm3d  # only where it is chosen, for its licence

        profiles = {"np": bm3d.BM3DProfile, "lc": bm3d.BM3DProfileLC, "high": bm3d.BM3DProfileHigh}
        profile = profiles[self.profile]()
        profile.num_threads = self.threads
        with _LOCK:
            return getattr(bm3d, function)(image, self._level, profile=profile)


def deblur(y: Tensor, kernel: Tensor, sigma: float) -> Tensor:
    """BM3D deblurring (Dabov et al. 2008), by the package `bm3d`, each channel by itself.

    A regularized inverse of the blur, whose coloured noise BM3D takes away, in two stages; on one
    thread, so that two runs are equal. **Licence: the `bm3d` package is free for non-commercial
    use only.**

    Args:
        y: The blurred image (1, C, H, W), convolved circularly, of at least `LEAST_SIDE` pixels.
        kernel: (rows, columns), both odd, its centre in the middle.
        sigma: Standard deviation of the noise, in grey levels of an 8-bit image, in (0, 255].

    Returns:
        The deblurred image (1, C, H, W), not clipped.

    Raises:
        ValueError: A smaller image, or sigma outside (0, 255].
    """
    import bm3d

    if min(y.shape[-2:]) < LEAST_SIDE:
        raise ValueError(
            f"BM3D's deblurring needs images of at least {LEAST_SIDE} pixels a side, got "
            f"{y.shape[-2]}×{y.shape[-1]}; take a larger part"
        )
    # bm4d 4.2.5 calls what NumPy 2.4 took away. It stays, for other threads may be in there.
    if not hasattr(np, "trapz"):
        np.trapz = np.trapezoid  # type: ignore[attr-defined]
    level, psf = grey_levels(sigma), kernel.double().cpu().numpy()
    profile = bm3d.BM3DProfile()
    profile.num_threads = 1

    def channel(values: np.ndarray) -> np.ndarray:
        with _LOCK:
            return bm3d.bm3d_deblurring(values[..., None], level, psf, profile)

    return through_numpy(lambda image: each_channel(channel, image), y)
