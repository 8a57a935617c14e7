"""BM3D."""

import math
import threading
from importlib.util import find_spec
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from deepred_pl.checks import check_at_least, check_choice
from deepred_pl.denoisers.denoiser import GreyLevelDenoiser, each_channel, through_numpy
from deepred_pl.operators import Blur
from deepred_pl.problem import InverseProblem

Profile = Literal["np", "lc", "high"]
Backend = Literal["auto", "bm3d", "triton"]

# Blocks are 8×8: the package refuses smaller images, and 8×8 crashes the process.
LEAST_SIDE = 16

# Its C library has one thread pool per process and is not re-entrant.
_LOCK = threading.Lock()

# Weights of the opponent colour space of colour BM3D, one row per channel.
_OPPONENT = np.array([[1 / 3, 1 / 3, 1 / 3], [1 / 2, 0, -1 / 2], [1 / 4, -1 / 2, 1 / 4]])
_COLOURS = _OPPONENT, np.linalg.inv(_OPPONENT)  # there and back


class BM3D(GreyLevelDenoiser):
    """Block-matching and 3D filtering (Dabov et al. 2007), by the packages `bm3d` or `bm3d-triton`.

    Colour images are matched on luminance, with `bm3d-triton` on each channel of the same opponent
    colours; with other numbers of channels each is denoised separately. The denoiser of the paper's
    super-resolution. **Licence: the `bm3d` package is free for non-commercial use only.**

    Args:
        sigma: Assumed noise level in grey levels of an 8-bit image, in (0, 255].
        profile: Of `bm3d`: "np", the package's default, "lc", which takes about a third of the
            time, or "high".
        threads: Of `bm3d`: number of cores; 0 uses all. Only one thread is reproducible.
        backend: "bm3d", on the CPU; "triton", on an NVIDIA GPU (the extra `gpu`), where the order
            of sums varies, so that results are not reproducible to the last bit; "auto": triton for
            images on a GPU if it is installed, otherwise bm3d.

    Raises:
        ValueError: sigma outside (0, 255], an unknown profile or backend, or threads below 0.
    """

    def __init__(
        self,
        sigma: float = 5.0,
        profile: Profile = "np",
        threads: int = 0,
        backend: Backend = "auto",
    ) -> None:
        super().__init__(sigma)
        check_choice("profile", profile, Profile)
        check_choice("backend", backend, Backend)
        check_at_least(0, threads=threads)
        self.profile = profile
        self.threads = threads
        self.backend = backend

    def __call__(self, x: Tensor) -> Tensor:
        if self.on_gpu(x):
            return self._denoise_on_gpu(x)
        return through_numpy(self._denoise, x)

    def check(self, x: Tensor) -> None:
        """Refuse images that the backend cannot process; x is (1, C, H, W)."""
        if not self.on_gpu(x):
            return
        try:
            import bm3d_triton  # noqa: F401  it fails without Triton
        except ImportError as error:
            missing = f"which cannot be imported ({error})"
        else:
            missing = "" if x.is_cuda else f"got an image on {x.device.type}"
        if missing:
            raise ValueError(
                f"BM3D on a GPU needs an NVIDIA GPU and the package bm3d-triton, {missing}; "
                "install the extra gpu (pip install '.[gpu]'), or set backend='bm3d'"
            )

    def on_gpu(self, x: Tensor) -> bool:
        """Whether it processes x on a GPU."""
        if self.backend == "auto":
            return x.is_cuda and find_spec("bm3d_triton") is not None
        return self.backend == "triton"

    def _denoise_on_gpu(self, x: Tensor) -> Tensor:
        from bm3d_triton import denoise

        if x.shape[1] != 3:
            return denoise(x.float(), self.level, clamp=False).to(x.dtype)
        there, back = (torch.from_numpy(m).to(x.device, torch.float32) for m in _COLOURS)
        channels = torch.einsum("oc,nchw->nohw", there, x.float())
        channels[:, 1:] += 0.5  # because the package clips to [0, 1]
        denoised = [
            denoise(channels[:, i : i + 1], level, clamp=False)
            for i, level in enumerate(np.linalg.norm(_OPPONENT, axis=1) * self.level)
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
        else:  # colour BM3D divides by the range of each opponent channel, and one is constant
            denoised = each_channel(self._grey, padded)
        return denoised[:height, :width]

    def _grey(self, channel: np.ndarray) -> np.ndarray:
        return self._run("bm3d", channel)

    def _run(self, function: str, image: np.ndarray) -> np.ndarray:
        import bm3d  # only when chosen, because of its licence

        profiles = {"np": bm3d.BM3DProfile, "lc": bm3d.BM3DProfileLC, "high": bm3d.BM3DProfileHigh}
        profile = profiles[self.profile]()
        profile.num_threads = self.threads
        with _LOCK:
            return getattr(bm3d, function)(image, self.level, profile=profile)


def deblur(problem: InverseProblem) -> Tensor:
    """BM3D deblurring (Dabov et al. 2008), by the package `bm3d`, each channel separately.

    A regularized inverse of the blur, whose coloured noise BM3D removes, in two stages; on one
    thread, so that runs are reproducible. To compare with, as `ImageParameter(start=deblur)`.
    **Licence: the `bm3d` package is free for non-commercial use only.**

    Args:
        problem: A circular `Blur` of an image of at least `LEAST_SIDE` pixels a side, and a noise
            model, whose mean variance is taken as that of white noise.

    Returns:
        The deblurred image (1, C, H, W) in [0, 1].

    Raises:
        ValueError: Another operator, no noise model, or a smaller image.
    """
    import bm3d

    operator, variance, y = problem.operator, problem.noise_variance(), problem.y
    if not isinstance(operator, Blur) or operator.boundary != "circular" or variance is None:
        raise ValueError(
            "BM3D's deblurring needs a Blur with a circular boundary and a noise model, got "
            f"{operator} and {problem.noise}; use another method"
        )
    if min(y.shape[-2:]) < LEAST_SIDE:
        raise ValueError(
            f"BM3D's deblurring needs images of at least {LEAST_SIDE}×{LEAST_SIDE} pixels, got "
            f"{y.shape[-2]}×{y.shape[-1]}; use a larger part"
        )
    # bm4d 4.2.5 calls numpy.trapz, which NumPy 2.4 removed. Not undone: other threads may call it.
    if not hasattr(np, "trapz"):
        np.trapz = np.trapezoid  # type: ignore[attr-defined]
    level, psf = math.sqrt(float(variance)), operator.kernel.double().cpu().numpy()
    profile = bm3d.BM3DProfile()
    profile.num_threads = 1

    def channel(values: np.ndarray) -> np.ndarray:
        with _LOCK:
            return bm3d.bm3d_deblurring(values[..., None], level, psf, profile)

    return through_numpy(lambda image: each_channel(channel, image), y).clamp(0, 1)
