"""Denoisers f for Regularization by Denoising.

Any callable from (1, C, H, W) to (1, C, H, W) serves as a denoiser; these are ready-made.
"""

from deepred_pl.denoisers.bm3d import BM3D
from deepred_pl.denoisers.classical import Bilateral, Median, Wavelet
from deepred_pl.denoisers.components import PrincipalComponents
from deepred_pl.denoisers.declipped import Declipped
from deepred_pl.denoisers.denoiser import Denoiser
from deepred_pl.denoisers.learned import Learned
from deepred_pl.denoisers.nlm import NonLocalMeans
from deepred_pl.denoisers.tv import TotalVariation

__all__ = [
    "BM3D",
    "Bilateral",
    "Declipped",
    "Denoiser",
    "Learned",
    "Median",
    "NonLocalMeans",
    "PrincipalComponents",
    "TotalVariation",
    "Wavelet",
]
