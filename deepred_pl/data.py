"""Image files to an inverse problem."""

import itertools
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import skimage.data
import torch
from PIL import Image
from pytorch_lightning import LightningDataModule
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor

from deepred_pl.images import ImageFormat, IntensityRange, read_image, to_tensor
from deepred_pl.metrics import MetricOn
from deepred_pl.noise import NoiseModel
from deepred_pl.operators import Downsample, Operator, as_operator
from deepred_pl.problem import InverseProblem
from deepred_pl.tiles import Region

# Crops of images that ship inside scikit-image: rows, columns.
SAMPLES = {
    "astronaut": (slice(64, 192), slice(160, 288)),
    "camera": (slice(60, 188), slice(150, 278)),
    "chelsea": (slice(80, 208), slice(180, 308)),
    "coffee": (slice(120, 248), slice(250, 378)),
    "rocket": (slice(60, 188), slice(250, 378)),
}
DEFAULT_SAMPLE = "sample:astronaut"

Degrade = Literal["operator", "antialiased_resize"]


class RestorationDataModule(LightningDataModule):
    """One image to restore, from files.

    With a `measurement`, that is what is restored, and a `ground_truth` serves the metrics
    alone. With a `ground_truth` alone, its degradation is simulated. With neither, the
    embedded sample "sample:astronaut" is the ground truth.

    Args:
        ground_truth: Image file (PNG, JPEG, TIFF, NPY); without one and a measurement,
            "sample:astronaut" is restored. "sample:NAME" for a 128×128 crop of an
            image inside scikit-image: astronaut, camera, chelsea, coffee or rocket; or
            "set:SET/IMAGE" for one of the literature (`deepred_pl.datasets`).
        measurement: Image file of what was observed; as an attribute, before `setup`, also an array
            (H, W) or (H, W, C).
        operator: The forward operator A; None is the identity.
        noise: The noise model; None means the mean squared residual as data term.
        degrade: What simulates A: the "operator", or "antialiased_resize", Pillow's Lanczos-3
            resize to 8 bits, the test data of super-resolution (then A is a model of it).
        clip: Clip a simulated measurement to [0, 1], as a camera does.
        intensity_range: Which stored values are 0 and 1, for all images: "dtype" (0 and 255, or
            65535; floats as they are), "minmax" or "percentile" (0.1 and 99.9) of the image, or
            [lo, hi]. Every sigma is in 255ths of it. The restored image is stored in it, too.
        page: Which page of a TIFF file with several, from 0; with a measurement, of that alone.
        crop: Keep the middle crop × crop pixels of the ground truth (all, where there are fewer),
            and of a mask, before it is degraded, to try something on a small image; not with a
            measurement.
        region: Restore this part of the image alone, [top, left, height, width] in its pixels; the
            noise is estimated, and a degradation simulated, on all of it.
        as_floats: Store the restored image as floats in [0, 1], whatever the input.
        metric_on: What PSNR and SSIM of colour images compare: "rgb", or "luminance".
        seed: Seed of the simulated degradation.

    Attributes:
        problem: The `InverseProblem`, after `setup`.
        image_format: How the input was stored, after `setup`.

    Raises:
        FileNotFoundError: A file that is not there.
        OSError: An image of a set that cannot be downloaded.
        ValueError: A file that is no image, or files that do not fit together; at `setup`.
    """

    def __init__(
        self,
        ground_truth: str | os.PathLike | None = None,
        measurement: str | os.PathLike | None = None,
        operator: Operator | None = None,
        noise: NoiseModel | None = None,
        degrade: Degrade = "operator",
        clip: bool = True,
        intensity_range: IntensityRange = "dtype",
        page: int | None = None,
        crop: int | None = None,
        region: tuple[int, int, int, int] | None = None,
        as_floats: bool = False,
        metric_on: MetricOn = "rgb",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if seed < 0:
            raise ValueError(f"data seed must be >= 0, got {seed}")
        if degrade not in ("operator", "antialiased_resize"):
            raise ValueError(f"degrade must be 'operator' or 'antialiased_resize', got {degrade!r}")
        if crop is not None and crop < 1:
            raise ValueError(f"crop must be at least 1 pixel, got {crop}")
        if metric_on not in ("rgb", "luminance"):
            raise ValueError(f"metric_on must be 'rgb' or 'luminance', got {metric_on!r}")
        self.ground_truth = ground_truth
        self.measurement: str | os.PathLike | np.ndarray | None = measurement
        self.operator = operator
        self.noise = noise
        self.degrade = degrade
        self.clip = clip
        self.intensity_range = intensity_range
        self.page = page
        self.crop = crop
        self.region = region
        self.as_floats = as_floats
        self.metric_on = metric_on
        self.seed = seed
        self.problem: InverseProblem | None = None
        self.image_format = ImageFormat()

    @property
    def name(self) -> str:
        """The image's name: that of its file without folder and suffix; "unnamed" for an array."""
        named = self.ground_truth, self.measurement
        source = next((s for s in named if s is not None), DEFAULT_SAMPLE)
        if not isinstance(source, str | os.PathLike):
            return "unnamed"
        return Path(str(source).removeprefix("sample:").removeprefix("set:")).stem

    def setup(self, stage: str | None = None) -> None:
        """Read the files, or simulate; once."""
        if self.problem is not None:
            return
        operator = as_operator(self.operator)
        truth_from, y, truth = self.ground_truth, None, None
        truth_range, truth_page = self.intensity_range, self.page
        if self.measurement is not None:
            if self.crop is not None:
                raise ValueError(
                    f"crop={self.crop} is of a ground truth whose degradation is simulated, and "
                    "there is a measurement; give region=[top, left, height, width] for a part"
                )
            self._check_range(operator)
            y, self.image_format = _read(self.measurement, self.intensity_range, self.page)
            truth_page = None
            if not operator.keeps_units:
                self.image_format, truth_range = ImageFormat("float32"), "dtype"
            elif self.intensity_range != "dtype":
                truth_range = (self.image_format.low, self.image_format.high)
        elif truth_from is None:
            truth_from = DEFAULT_SAMPLE
            rank_zero_info(f"no image was named; this restores {DEFAULT_SAMPLE}")
        if truth_from is not None:
            original, truth_format = _read(truth_from, truth_range, truth_page)
            if self.crop is not None:
                middle = Region.middle(original.shape[-2], original.shape[-1], self.crop)
                original, truth_format = middle.of(original), _part(truth_format, middle)
                operator = operator.cropped(middle)
            truth = operator.admissible(original)
            if truth.shape != original.shape:
                rank_zero_info(
                    f"ground truth: {_size(original)} made {_size(truth)} for {operator}"
                )
            if y is None:
                self.image_format = truth_format
                generator = torch.Generator().manual_seed(self.seed)
                operator = operator.drawn(tuple(truth.shape), generator)
                y = simulate(truth, operator, self.noise, generator, self.degrade)
                y = y.clamp(0, 1) if self.clip else y
        assert y is not None
        self.problem = InverseProblem(y, operator, self.noise, truth, self.metric_on)
        if self.problem.noise is not self.noise:
            rank_zero_info(f"estimated from the measurement: {self.problem.noise}")
        if self.region is not None:
            region = Region(*self.region)
            whole, self.problem = self.problem, self.problem.part(region)
            alpha = self.image_format.alpha
            if alpha is not None and alpha.shape == whole.image_shape[-2:]:
                self.image_format = _part(self.image_format, region)
        if self.as_floats:
            self.image_format = ImageFormat("float32")

    def _check_range(self, operator: Operator) -> None:
        part: Operator | NoiseModel | None = None if operator.keeps_units else operator
        if self.noise is not None and self.noise.from_zero:
            part = self.noise
        if part is not None and self.intensity_range in ("minmax", "percentile"):
            raise ValueError(
                f"intensity_range={self.intensity_range!r} moves 0, which {type(part).__name__} "
                "needs where it is; give [0, hi]: for sums along rays hi is the number of "
                "detectors times the object's maximum"
            )

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
def simulate(
    truth: Tensor,
    operator: Operator,
    noise: NoiseModel | None,
    generator: torch.Generator,
    degrade: Degrade = "operator",
) -> Tensor:
    """A measurement of `truth`, (1, C, H, W): A x + noise, neither clipped nor rounded.

    Raises:
        ValueError: "antialiased_resize" with an operator that is no `Downsample`.
    """
    if degrade == "operator":
        y = operator(truth)
    elif isinstance(operator, Downsample):
        y = antialiased_resize(truth, operator.factor)
    else:
        raise ValueError(
            f"degrade='antialiased_resize' needs a Downsample, got {type(operator).__name__}; "
            "give degrade='operator'"
        )
    return y if noise is None else noise.sample(y, generator)


def antialiased_resize(image: Tensor, factor: int) -> Tensor:
    """The image (1, C, H, W), `factor` times smaller, by Pillow's Lanczos-3 filter in 8 bits."""
    levels = image[0].clamp(0, 1).mul(255).round().byte().numpy()  # (C, H, W)
    size = (image.shape[-1] // factor, image.shape[-2] // factor)  # width, height
    small = [Image.fromarray(c).resize(size, Image.Resampling.LANCZOS) for c in levels]
    return torch.from_numpy(np.stack([np.asarray(c) for c in small]))[None].float() / 255


def _read(
    path: str | os.PathLike | np.ndarray, intensity_range: IntensityRange, page: int | None
) -> tuple[Tensor, ImageFormat]:
    if isinstance(path, np.ndarray):
        return to_tensor(path, intensity_range)
    if not str(path).startswith("sample:"):
        return read_image(path, intensity_range, page)
    name = str(path).removeprefix("sample:")
    if name not in SAMPLES:
        raise ValueError(f"expected one of the samples {', '.join(SAMPLES)}, got {path}")
    return to_tensor(getattr(skimage.data, name)()[SAMPLES[name]], intensity_range, str(path))


def _part(image_format: ImageFormat, region: Region) -> ImageFormat:
    alpha = image_format.alpha
    return replace(image_format, alpha=None if alpha is None else region.of(alpha))


def _size(image: Tensor) -> str:
    return f"{image.shape[-2]}×{image.shape[-1]}"
