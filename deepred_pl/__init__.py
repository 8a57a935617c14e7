"""DeepRED: restore one degraded image without training data.

A Deep Image Prior fitted under Regularization by Denoising (Mataev, Elad, Milanfar 2019,
arXiv:1903.10176), as PyTorch Lightning modules.
"""

from deepred_pl.callbacks import REDUpdate
from deepred_pl.data import RestorationDataModule
from deepred_pl.model import DeepImagePrior, DeepRED
from deepred_pl.problem import InverseProblem
from deepred_pl.restore import restore

__all__ = [
    "DeepImagePrior",
    "DeepRED",
    "InverseProblem",
    "REDUpdate",
    "RestorationDataModule",
    "restore",
]
__version__ = "0.1.0"
