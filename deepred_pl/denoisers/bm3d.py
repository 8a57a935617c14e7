"""BM3D."""

import threading
from typing import Literal

import numpy as np
from torch import Tensor

from deepred_pl.denoisers.denoiser import Denoiser, each_channel, grey_levels, through_numpy

# Blocks are 8×8: smaller images are refused by the package, and 8×8 itself crashes the process.
LEAST_SIDE = 16

# Its C library keeps one thread pool for the process and is not re-entrant.
_LOCK = threading.Lock()

# Weights of the opponent colour space that colour BM3D works in, one row a channel.
_OPPONENT = np.array([[1 / 3, 1 / 3, 1 / 3], [1 / 2, 0, -1 / 2], [1 / 4, -1 / 2, 1 / 4]])


class BM3D(Denoiser):
    """Block-matching and 3D filtering (Dabov et al. 2007), by the `bm3d` package.

    Colour images are matched on luminance; other channel counts are denoised one by one. The
    denoiser of the paper's super-resolution. **Licence: the `bm3d` package is free for
    non-commercial use only.**

    Args:
        sigma: Noise level it is told, in grey levels of an 8-bit image, in (0, 255].
        profile: "np", the package's default, "lc", about a third of its time, or "high".

    Raises:
        ValueError: sigma outside (0, 255], or an unknown profile.
    """

    def __init__(self, sigma: float = 5.0, profile: Literal["np", "lc", "high"] = "np") -> None:
        if profile not in ("np", "lc", "high"):
            raise ValueError(f"profile must be 'np', 'lc' or 'high', got {profile!r}")
        self.sigma = sigma
        self.profile = profile
        self._level = grey_levels(sigma)

    def __call__(self, x: Tensor) -> Tensor:
        return through_numpy(self._denoise, x)

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
        with _LOCK:
            return getattr(bm3d, function)(image, self._level, profile=profiles[self.profile]())
