"""Image files to an inverse problem."""

import itertools
import os
from collections.abc import Iterable

import skimage.data
import torch
from pytorch_lightning import LightningDataModule
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor

from deepred_pl.images import ImageFormat, read_image
from deepred_pl.noise import NoiseModel
from deepred_pl.operators import Identity, Operator
from deepred_pl.problem import InverseProblem

# Crops of images that ship inside scikit-image: rows, columns.
SAMPLES = {
    "astronaut": (slice(64, 192), slice(160, 288)),
    "camera": (slice(60, 188), slice(150, 278)),
    "chelsea": (slice(80, 208), slice(180, 308)),
    "coffee": (slice(120, 248), slice(250, 378)),
    "rocket": (slice(60, 188), slice(250, 378)),
}
DEFAULT_SAMPLE = "sample:astronaut"


class RestorationDataModule(LightningDataModule):
    """One image to restore, from files.

    With a `measurement`, that is what is restored, and a `ground_truth` serves the metrics
    alone. With a `ground_truth` alone, its degradation is simulated. With neither, the
    embedded sample "sample:astronaut" is the ground truth.

    Args:
        ground_truth: Image file (PNG, JPEG, TIFF, NPY), or "sample:NAME" for a 128×128 crop of
            an image inside scikit-image: astronaut, camera, chelsea, coffee or rocket.
        measurement: Image file of what was observed.
        operator: The forward operator A; None is the identity.
        noise: The noise model; None means the mean squared residual as data term.
        seed: Seed of the simulated degradation.

    Attributes:
        problem: The `InverseProblem`, after `setup`.
        image_format: How the input was stored, after `setup`.

    Raises:
        FileNotFoundError: A file that is not there.
        ValueError: A file that is no image, or files that do not fit together; at `setup`.
    """

    def __init__(
        self,
        ground_truth: str | os.PathLike | None = None,
        measurement: str | os.PathLike | None = None,
        operator: Operator | None = None,
        noise: NoiseModel | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if seed < 0:
            raise ValueError(f"data seed must be >= 0, got {seed}")
        self.ground_truth = ground_truth
        self.measurement = measurement
        self.operator = operator
        self.noise = noise
        self.seed = seed
        self.problem: InverseProblem | None = None
        self.image_format = ImageFormat()

    def setup(self, stage: str | None = None) -> None:
        """Read the files, or simulate; once."""
        if self.problem is not None:
            return
        operator = self.operator or Identity()
        truth_from, y, truth = self.ground_truth, None, None
        if self.measurement is not None:
            y, self.image_format = read_image(self.measurement)
        elif truth_from is None:
            truth_from = DEFAULT_SAMPLE
        if truth_from is not None:
            truth, truth_format = _read(truth_from)
            if y is None:
                self.image_format = truth_format
                y = simulate(truth, operator, self.noise, self.seed)
        assert y is not None
        self.problem = InverseProblem(y, operator, self.noise, truth)
        if self.problem.noise is not self.noise:
            rank_zero_info(f"estimated from the measurement: {self.problem.noise}")

    def train_dataloader(self) -> Iterable[int]:
        """One endless epoch of θ-steps; y is on the device already."""
        return itertools.repeat(0)

    def test_dataloader(self) -> Iterable[int]:
        """The one image, scored once."""
        return [0]

    def predict_dataloader(self) -> Iterable[int]:
        """The one image, written once."""
        return [0]


@torch.no_grad()
def simulate(truth: Tensor, operator: Operator, noise: NoiseModel | None, seed: int) -> Tensor:
    """A measurement of `truth`, (1, C, H, W): A x + noise, clipped to [0, 1], not rounded."""
    y = operator(truth)
    if noise is not None:
        y = noise.sample(y, torch.Generator().manual_seed(seed))
    return y.clamp(0, 1)


def _read(path: str | os.PathLike) -> tuple[Tensor, ImageFormat]:
    kind, _, name = str(path).partition(":")
    if kind != "sample":
        return read_image(path)
    if name not in SAMPLES:
        raise ValueError(f"expected one of the samples {', '.join(SAMPLES)}, got {path}")
    picture = torch.from_numpy(getattr(skimage.data, name)()[SAMPLES[name]]).float() / 255
    picture = picture[..., None] if picture.ndim == 2 else picture
    return picture.movedim(-1, 0)[None].contiguous(), ImageFormat()  # (H, W, C) -> (1, C, H, W)
