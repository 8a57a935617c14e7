"""Total-variation denoising."""

from functools import partial

from skimage.restoration import denoise_tv_chambolle
from torch import Tensor

from deepred_pl.checks import check_positive
from deepred_pl.denoisers.denoiser import Denoiser, through_numpy


class TotalVariation(Denoiser):
    """Total-variation denoising of all channels together (Chambolle 2004), by scikit-image.

    Args:
        weight: Strength, > 0, on the scale of images in [0, 1]; 0.1 is strong.

    Raises:
        ValueError: weight is not positive.

    >>> import torch
    >>> TotalVariation(weight=0.1)(torch.rand(1, 3, 33, 47)).shape
    torch.Size([1, 3, 33, 47])
    """

    def __init__(self, weight: float = 0.1) -> None:
        check_positive("weight", weight, "0.1 is strong, 0.02 is weak")
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        return through_numpy(partial(denoise_tv_chambolle, weight=self.weight, channel_axis=-1), x)
