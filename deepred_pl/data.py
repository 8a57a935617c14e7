"""Build an inverse problem from image files."""

import math
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from deepred_pl import plausibility
from deepred_pl.axes import Page, check_axes, count_pages
from deepred_pl.checks import check_at_least, check_choice
from deepred_pl.estimate import noise_level
from deepred_pl.image_format import ImageFormat
from deepred_pl.images import IntensityRange, layout_of, page_of, read_image, to_tensor
from deepred_pl.jpeg import JPEG, compress, read_jpeg
from deepred_pl.lightning import LightningDataModule, rank_zero_info
from deepred_pl.metrics import MetricOn
from deepred_pl.noise import NoiseModel
from deepred_pl.operators import Downsample, Mask, Operator, as_operator, without
from deepred_pl.problem import InverseProblem
from deepred_pl.sources import find_image, name_of
from deepred_pl.tiles import Region
from deepred_pl.trainer import Epoch

DEFAULT_SAMPLE = "sample:astronaut"

BEYOND = 6.0  # standard deviations of the noise, by which a value is surely outside of the range
GUESSED = 1.25  # largest value of a first guess that may be one of an image in [0, 1]
MOST_OPAQUE = 0.5  # share of values between 0 and opaque, from which alpha is not transparency

Degrade = Literal["operator", "antialiased_resize"]


class RestorationDataModule(LightningDataModule):
    """One image to restore, from files.

    Given a `measurement`, it is restored, and a `ground_truth` is only used by the metrics. Given
    only a `ground_truth`, its degradation is simulated. Given neither, the embedded sample
    "sample:astronaut" is the ground truth.

    Args:
        ground_truth: Image file (PNG, JPEG, TIFF, NPY); "sample:NAME" for a 128×128 crop of an
            image of scikit-image: astronaut, camera, chelsea, coffee or rocket; or
            "set:SET/IMAGE" for an image of a published set (`deepred_pl.sources`).
        measurement: Image file of what was observed; as an attribute, before `setup`, also an array
            (H, W) or (H, W, C). Values that are NaN, infinite, masked (`numpy.ma`), or marked by a
            TIFF's nodata tag are missing: they are not fitted, and the result fills them.
        operator: The forward operator A; None is the identity.
        noise: The noise model; None means the mean squared residual as data term.
        degrade: What simulates A: the "operator", or "antialiased_resize", Pillow's Lanczos-3
            resize to 8 bits, as in the test data of super-resolution (A is then a model of it).
        clip: Clip a simulated measurement to [0, 1], as a camera does.
        intensity_range: Which stored values are 0 and 1, for all images: "dtype" (0 and 255, or
            65535; floats as they are), "minmax" or "percentile" (0.1 and 99.9) of each channel, or
            [lo, hi], numbers or lists with one for each channel. Every sigma is in 255ths of this
            range. The restored image is stored in the same range, and may leave it where the
            measurement does, and with "minmax" and "percentile" also where the operator averages
            light, as a blur does.
        axes: The axes of the image's file or array, as OME names them: Y, X, C for channels, and T
            (time), Z (slice) or others, along which one image, a page, is chosen; such as "CYX",
            "YXC" or "TZCYX". None are those of a TIFF's metadata, or of an array (H, W) or
            (H, W, C). The restored image has those of one page.
        page: Page of a file with several, from 0, in the order in which they are stored; also of
            the ground truth if it is a file with several. "all" takes them as channels of one
            image, which one network restores together.
        crop: Keep the central crop × crop pixels of the ground truth and of a mask before the
            degradation is simulated, to try something on a small image. Not with a measurement.
        region: Restore only this part of the image, [top, left, height, width] in its pixels; the
            noise is estimated, and a degradation simulated, on the whole image.
        hold_out: Share of the measured values, in [0, 0.5], that the fit does not use: by their
            error `AutoStop` with the rule "holdout" judges it, and `Monitor` shows it.
        as_floats: Store the restored image as floats in [0, 1], whatever the input's type.
        metric_on: Whether PSNR and SSIM of colour images compare "rgb" or "luminance".
        seed: Seed of the simulated degradation.

    Attributes:
        problem: The `InverseProblem`, after `setup`.
        image_format: How the input was stored, after `setup`.
        reading: One line on how everything was read, after `setup`.

    Raises:
        FileNotFoundError: A file does not exist.
        OSError: An image of a set cannot be downloaded.
        ValueError: A file is not an image, files do not fit together, or the measurement is not
            what is stated about it (`deepred_pl.plausibility`); at `setup`.
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
        axes: str | None = None,
        page: Page = None,
        crop: int | None = None,
        region: tuple[int, int, int, int] | None = None,
        hold_out: float = 0.0,
        as_floats: bool = False,
        metric_on: MetricOn = "rgb",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_at_least(0, seed=seed)
        check_choice("degrade", degrade, Degrade)
        check_choice("metric_on", metric_on, MetricOn)
        check_at_least(1, crop=1 if crop is None else crop)
        self.ground_truth = ground_truth
        self.measurement: str | os.PathLike | np.ndarray | None = measurement
        self.operator = operator
        self.noise = noise
        self.degrade = degrade
        self.clip = clip
        self.intensity_range = intensity_range
        self.axes = axes
        self.page = page
        self.crop = crop
        self.region = region
        self.hold_out = hold_out
        self.as_floats = as_floats
        self.metric_on = metric_on
        self.seed = seed
        self.reading = ""
        self.problem: InverseProblem | None = None
        self.image_format = self._stored = ImageFormat()

    @property
    def name(self) -> str:
        """The image's name: that of its file without folder and suffix; "unnamed" for an array."""
        named = self.ground_truth, self.measurement
        source = next((s for s in named if s is not None), DEFAULT_SAMPLE)
        return name_of(source) if isinstance(source, str | os.PathLike) else "unnamed"

    def setup(self, stage: str | None = None) -> None:
        """Read the files and build the problem; further calls do nothing."""
        if self.problem is not None:
            return
        if self.measurement is None and self.ground_truth is None:
            rank_zero_info(f"no image given; restoring {DEFAULT_SAMPLE}")
            self.ground_truth = DEFAULT_SAMPLE
        operator = as_operator(self.operator)
        if isinstance(operator, JPEG):
            self._check_jpeg()
        truth: Tensor | None
        if self.measurement is None:
            y, operator, truth = self._simulated(operator)
            self.problem = InverseProblem(y, operator, self.noise, truth, self.metric_on)
        else:
            self.problem = self._measured(operator)
        plausibility.check_sinogram(self.problem)
        plausibility.check_kernel(self.problem)
        if self.measurement is not None and self.problem.noise is self.noise:
            plausibility.check_noise(self.problem)
        self.reading = self._reading()
        rank_zero_info(self.reading)
        if self.region is not None:
            region, alpha = Region(*self.region), self.image_format.alpha
            if alpha is not None and alpha.shape == self.problem.image_shape[-2:]:
                self.image_format = _part(self.image_format, region)
            self.problem = self.problem.part(region)
        if self.hold_out:
            self.problem = self.problem.hold_out(self.hold_out, self.seed)
        if self.as_floats:
            self.image_format = _as_floats(self.image_format)

    def _measured(self, operator: Operator) -> InverseProblem:
        """The problem of a measurement, with a ground truth only for the metrics."""
        assert self.measurement is not None
        if self.crop is not None:
            raise ValueError(
                f"crop={self.crop} is for a ground truth whose degradation is simulated, but there "
                "is a measurement; set region to [top, left, height, width] for a part of it"
            )
        self._check_range(operator)
        y, stored = self.read(self.intensity_range, missing=True)
        self._stored = stored
        if not stored.axes:
            plausibility.check_layout(y, self._source)
        if isinstance(operator, JPEG):
            return self._compressed(stored)
        operator.image_shape(tuple(y.shape))  # refuses a mask, kernel or angles that do not fit
        if self.intensity_range == "dtype":
            plausibility.check_span(y, stored, self._needs_zero(operator) is not None)
        elif not isinstance(self.intensity_range, str):
            plausibility.check_outside(y, stored)
        if not isinstance(self.intensity_range, str) or self.intensity_range == "dtype":
            plausibility.check_channels(y)
        lost = ~y.isfinite()
        y = torch.where(lost, 0, y)
        plausibility.check_mask(operator, y)
        if lost.any():
            known = operator.mask if isinstance(operator, Mask) else None
            unmarked = lost if known is None else lost & known.bool()
            operator = without(operator, lost)
            if unmarked.any():
                plausibility.warn(
                    f"{int(unmarked.sum())} of the {lost.numel()} values of {self._source} are "
                    "NaN, infinite or marked as missing. They are not fitted, and the restored "
                    "image has estimates in their place"
                )
        truth_range: IntensityRange = self.intensity_range
        self.image_format = _enlarged(stored, operator.factor)
        if not operator.keeps_units:
            self.image_format, truth_range = _as_floats(stored), "dtype"
        elif self.intensity_range != "dtype":
            truth_range = (stored.low, stored.high)  # type: ignore[assignment]
        truth = None
        if self.ground_truth is not None:
            truth = self._admissible(self._read_truth(truth_range), operator)
        limits = _limits(y, operator.fitted(y), stored, self.intensity_range)
        return InverseProblem(y, operator, self.noise, truth, self.metric_on, limits)

    def _check_jpeg(self) -> None:
        """Refuse settings that do not apply to the coefficients of a JPEG."""
        given = {
            "noise": self.noise is not None,
            "intensity_range": self.intensity_range != "dtype",
            "degrade": self.degrade != "operator",
            "hold_out": self.hold_out > 0,
        }
        if unsuitable := [f"data.{name}" for name, is_given in given.items() if is_given]:
            raise ValueError(
                "a JPEG's coefficients are known to within their quantization, so that "
                f"{', '.join(unsuitable)} cannot be used; leave it out"
            )

    def _compressed(self, stored: ImageFormat) -> InverseProblem:
        """The problem of a JPEG file, with a ground truth only for the metrics."""
        assert self.measurement is not None
        file = self.measurement
        file = file if isinstance(file, np.ndarray) else find_image(file)  # or a sample's pixels
        if isinstance(file, np.ndarray):
            raise ValueError(
                "the coefficients of a JPEG are in its file, got an array: set data.measurement to "
                "the file, or use InverseProblem(*read_jpeg(path)) of deepred_pl.jpeg"
            )
        y, operator = read_jpeg(file)
        self.image_format = stored
        truth = None if self.ground_truth is None else self._read_truth("dtype")
        return InverseProblem(y, operator, None, truth, self.metric_on)

    def read(
        self, intensity_range: IntensityRange, missing: bool = False
    ) -> tuple[Tensor, ImageFormat]:
        """Read the measurement, or else the ground truth, as `images.read_image`."""
        source = self.ground_truth if self.measurement is None else self.measurement
        assert source is not None
        if not isinstance(source, np.ndarray):
            image, stored = read_image(source, intensity_range, self.page, missing, self.axes)
            if stored.alpha is not None and not _is_transparency(stored.alpha):
                plausibility.warn(
                    f"the last channel of {source} was taken for transparency, as the file says, "
                    "and is not restored, but most of its values are neither 0 nor opaque. If it "
                    "is a channel of the image, save it as an NPY array (H, W, C)"
                )
            return image, stored
        if self.axes is not None:
            axes = check_axes(self.axes, source.shape, "the image")
            source, described = page_of(source, axes, self.page)
            image, stored = to_tensor(source, intensity_range, missing=missing)
            return image, replace(
                stored, axes=described.axes, shape=described.shape, page=described.page
            )
        has_alpha = source.ndim == 3 and source.shape[-1] in (2, 4)  # grey or RGB and opacity
        if has_alpha and (source[..., -1] == _opaque(source)).all():
            image, stored = to_tensor(source[..., :-1], intensity_range, missing=missing)
            return image, replace(stored, alpha=source[..., -1].astype(stored.dtype))
        return to_tensor(source, intensity_range, missing=missing)

    def _read_truth(self, intensity_range: IntensityRange) -> Tensor:
        """The ground truth of a measurement, or its page if it has several."""
        assert self.ground_truth is not None
        axes, page = self.axes, None
        if Path(self.ground_truth).is_file():
            try:
                letters, shape, _ = layout_of(self.ground_truth, axes)
            except ValueError:  # its axes are not those of the measurement
                axes = None
                letters, shape, _ = layout_of(self.ground_truth)
            axes = axes if letters else None
            page = self.page if count_pages(letters, shape) > 1 else None
        return read_image(self.ground_truth, intensity_range, page, axes=axes)[0]

    @property
    def _source(self) -> str:
        named = self.ground_truth if self.measurement is None else self.measurement
        return str(named) if isinstance(named, str | os.PathLike) else "the image"

    def _reading(self) -> str:
        """One line on how everything was read."""
        assert self.problem is not None
        stored, (*_, channels, height, width) = self._stored, self.problem.y.shape
        if self.measurement is None or isinstance(self.problem.operator, JPEG):
            channels, height, width = self.problem.image_shape[1:]
        lows, highs = np.atleast_1d(stored.low), np.atleast_1d(stored.high)
        ranges = [f"{low:.6g} to {high:.6g}" for low, high in zip(lows, highs, strict=True)]
        parts = [
            f"{height}×{width} pixels",
            f"{channels} channel{'s' * (channels > 1)}",
            stored.dtype,
            f"black and white at {', '.join(ranges[:4])}{', …' * (len(ranges) > 4)}",
        ]
        parts += [stored.page] if stored.page else []
        if stored.alpha is not None:
            parts.append("with transparency")
        text = f"{self._source}: {', '.join(parts)}; operator {self.problem.operator}"
        noise = self.problem.noise
        if noise is None:
            return f"{text}; no noise model."
        return f"{text}; {'estimated ' * (noise is not self.noise)}noise {noise}."

    def _simulated(self, operator: Operator) -> tuple[Tensor, Operator, Tensor]:
        """A simulated measurement, the operator that made it, and the ground truth."""
        assert self.ground_truth is not None
        original, self.image_format = self.read(self.intensity_range)
        self._stored = self.image_format
        if not self.image_format.axes:
            plausibility.check_layout(original, self._source)
        if self.crop is not None:
            middle = Region.middle(original.shape[-2], original.shape[-1], self.crop)
            original, self.image_format = middle.of(original), _part(self.image_format, middle)
            operator = operator.cropped(middle)
        truth = self._admissible(original, operator)
        generator = torch.Generator().manual_seed(self.seed)
        operator = operator.drawn(tuple(truth.shape), generator)
        if isinstance(operator, JPEG):
            y, operator = compress(truth, operator.quality, operator.subsampling)
            return y, operator, truth
        y = simulate(truth, operator, self.noise, generator, self.degrade)
        plausibility.check_mask(operator, y)
        return y.clamp(0, 1) if self.clip else y, operator, truth

    def _admissible(self, original: Tensor, operator: Operator) -> Tensor:
        truth = operator.admissible(original)
        if truth.shape != original.shape:
            rank_zero_info(
                f"ground truth: {_size(original)} cropped or padded to {_size(truth)} for "
                f"{operator}"
            )
        return truth

    def _needs_zero(self, operator: Operator) -> Operator | NoiseModel | None:
        """The part that needs 0 to mean no light, if any."""
        if self.noise is not None and self.noise.from_zero:
            return self.noise
        return None if operator.keeps_units else operator

    def _check_range(self, operator: Operator) -> None:
        """Refuse an intensity range that moves 0 if operator or noise need 0 to mean no light."""
        part = self._needs_zero(operator)
        if part is not None and self.intensity_range in ("minmax", "percentile"):
            raise ValueError(
                f"intensity_range={self.intensity_range!r} shifts 0, but {type(part).__name__} "
                "requires 0 to mean no light; set it to [0, hi] with hi the value of white; for "
                "sums along rays, that is the number of detectors times the object's maximum"
            )

    def train_dataloader(self) -> Iterable[int]:
        """An epoch of θ-steps, without data: y is already on the device."""
        return Epoch(self.trainer)

    def test_dataloader(self) -> Iterable[int]:
        """One item: the image is scored once."""
        return [0]

    def predict_dataloader(self) -> Iterable[int]:
        """One item: the image is written once."""
        return [0]


@torch.no_grad()
def simulate(
    truth: Tensor,
    operator: Operator,
    noise: NoiseModel | None,
    generator: torch.Generator,
    degrade: Degrade = "operator",
) -> Tensor:
    """Simulate a measurement of `truth`, (1, C, H, W): A x + noise, neither clipped nor rounded.

    Raises:
        ValueError: "antialiased_resize" with another operator than `Downsample`.
    """
    if degrade == "operator":
        y = operator(truth)
    elif isinstance(operator, Downsample):
        y = antialiased_resize(truth, operator.factor)
    else:
        raise ValueError(
            f"degrade='antialiased_resize' needs a Downsample, got {type(operator).__name__}; "
            "set degrade='operator'"
        )
    return y if noise is None else noise.sample(y, generator)


def antialiased_resize(image: Tensor, factor: int) -> Tensor:
    """Reduce an image (1, C, H, W) by `factor` with Pillow's Lanczos-3 filter in 8 bits."""
    levels = image[0].clamp(0, 1).mul(255).round().byte().numpy()  # (C, H, W)
    size = (image.shape[-1] // factor, image.shape[-2] // factor)  # width, height
    small = [Image.fromarray(c).resize(size, Image.Resampling.LANCZOS) for c in levels]
    return torch.from_numpy(np.stack([np.asarray(c) for c in small]))[None].float() / 255


def _limits(
    y: Tensor, operator: Operator, stored: ImageFormat, intensity_range: IntensityRange
) -> tuple[float, float]:
    """The least and the largest value that the image may have, at most 0 and at least 1."""
    if not operator.keeps_units:  # a first guess has artefacts of single pixels
        guess = F.avg_pool2d(operator.first_guess(y), 3, stride=1, padding=1)
        brightest = float(guess.max()) - BEYOND * _noise(guess)
        return 0.0, 2 * brightest if brightest > GUESSED else 1.0
    if intensity_range == "dtype" and stored.dtype != "float32":
        return 0.0, 1.0  # of the type, or of the camera
    noise = BEYOND * _noise(y)
    low, high = float(y.min()), float(y.max())
    limits = [low if low < -noise else 0.0, high if high > 1 + noise else 1.0]
    if intensity_range in ("minmax", "percentile"):  # where the measurement, not the image, ends
        gain = operator.largest_gain(y)
        # What is stored as 0, in each channel; values that are all positive stay positive.
        zeros = -np.asarray(stored.low) / np.subtract(stored.high, stored.low)
        nothing = float(zeros.min()) if zeros.max() <= 0 else -math.inf
        limits = [max(limits[0] + 1 - gain, nothing), limits[1] * gain]
    return min(0.0, limits[0]), limits[1]


def _noise(image: Tensor) -> float:
    """The largest noise of the channels; 0 if it is not known."""
    return float(torch.nan_to_num(noise_level(image, torch.ones_like(image) > 0)).max())


def _as_floats(stored: ImageFormat) -> ImageFormat:
    """The format of floats in [0, 1] with the same axes."""
    return ImageFormat("float32", axes=stored.axes, shape=stored.shape)


def _enlarged(stored: ImageFormat, factor: int) -> ImageFormat:
    """The format of an image with `factor` times as many pixels per unit."""
    if stored.resolution is None or factor == 1:
        return stored
    x, y, unit = stored.resolution
    return replace(stored, resolution=(factor * x, factor * y, unit))


def _is_transparency(alpha: np.ndarray) -> bool:
    return bool(((alpha > 0) & (alpha < _opaque(alpha))).mean() <= MOST_OPAQUE)


def _opaque(alpha: np.ndarray) -> float:
    return np.iinfo(alpha.dtype).max if alpha.dtype.kind in "iu" else 1.0


def _part(image_format: ImageFormat, region: Region) -> ImageFormat:
    alpha = image_format.alpha
    return replace(image_format, alpha=None if alpha is None else region.of(alpha))


def _size(image: Tensor) -> str:
    return f"{image.shape[-2]}×{image.shape[-1]}"
