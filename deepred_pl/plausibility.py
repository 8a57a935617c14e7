"""Compare a measurement with what is stated about it, before the fit.

What is nearly surely wrong is refused, with the setting that corrects it; what is doubtful is a
warning. The thresholds are such that no shipped task causes either, on the samples with 20 seeds
each and on the images of the published sets.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deepred_pl.axes import MOST_COLOURS
from deepred_pl.checks import RestorationWarning
from deepred_pl.estimate import local_level, noise_level, unclipped
from deepred_pl.image_format import ImageFormat
from deepred_pl.images import rounded_up
from deepred_pl.lightning import rank_zero_warn
from deepred_pl.noise import NoiseModel, corrected, parameters
from deepred_pl.operators import CUT_OFF, POINT, Blur, Mask, Observed, Operator, Radon, unknown_blur
from deepred_pl.problem import LEAST_VARIANCE, InverseProblem

EMPTY, DARK = 1 / 16, 1 / 4  # largest value in units of white: 12 and 14 bits in a file of 16
# The measured noise in units of the stated one.
TOO_STRONG, STRONG = 1 / 3, 0.6
STRONG_COUNTS = 0.8  # counts and speckle are not the result of a lossy compression
WEAK, TOO_WEAK = 2.5, 10.0
UNLIKE = 4.0  # noise of one channel in units of another's
# Grey levels: that much texture may look like noise, and that much of it like white noise, which is
# not COARSER times as strong at half the size.
TEXTURE, WHITE_TEXTURE, COARSER = 12.0, 6.0, 1.15
UNITS = 0.5, 2.0  # a sigma below the first, noise above the second: stated for the range [0, 1]
SMALLEST = 8  # pixels of a side, below which there are too few values to judge
FEW_KNOWN, CONNECTED = 0.4, 0.55  # shares of known pixels, and of known ones next to them
FEWEST_ANGLES = 6
MISFIT = 0.005  # of the detectors
# Agreement of the estimates of a kernel: at least 0.71 on 15 images of 128×128 pixels with noise of
# σ = 1, 0.48 to 0.66 with σ = 5, and at most 0.59 with σ = 10 and 30.
DETERMINED = 0.68
LEAST_SEEN = 0.3  # of the measurement, with an unknown boundary


def check_layout(image: Tensor, name: str) -> None:
    """Refuse an array (H, W, C), read as an image (1, C, H, W), whose channels come first."""
    channels, height, width = image.shape[1:]
    if channels <= MOST_COLOURS:
        return
    read = f"{name} is read as {height}×{width} pixels with {channels} channels"
    moved = (
        "arrays are (H, W, C), tensors (C, H, W): set data.axes of an array, such as CYX, or move "
        "the axis (numpy.moveaxis, torch.movedim)"
    )
    first_is_short = height < width == channels or 2 * height <= min(width, channels)
    if min(height, width) <= MOST_COLOURS or first_is_short:
        raise ValueError(f"{read}, which come last in an array; {moved}")
    if channels >= min(height, width):
        warn(f"{read}, as many as its rows or columns, or more. If this is wrong, {moved}")


def check_span(image: Tensor, image_format: ImageFormat, from_zero: bool) -> None:
    """Refuse an image that fills a small part of its type's range: another range was meant.

    Args:
        image: The image as read with the range "dtype", (1, C, H, W); NaN where values are missing.
        image_format: How it was stored.
        from_zero: Whether 0 must mean no light, so that minmax is no remedy.
    """
    bits = image_format.dtype in ("uint8", "uint16")
    largest = torch.nan_to_num(image, nan=0.0).abs().amax(dim=(0, 2, 3))  # (C,)
    stored = float(largest.max()) * float(np.max(image_format.high))
    if stored == 0:
        raise ValueError("every value of the measurement is 0; check the file")
    if not bits and largest.max() > 1 / 255:
        return
    means = f"{image_format.dtype} from 0 to {np.max(image_format.high):g}"
    share = f"{float(largest.max()):.2g} of its range, {means}"
    ranges = (
        f"set data.intensity_range to the [lo, hi] that are black and white, such as [0, "
        f"{rounded_up(stored):g}]"
    )
    if largest.max() <= EMPTY:
        raise ValueError(
            f"the largest value of the measurement, {stored:g}, is {share}; {ranges}"
            f"{'' if from_zero else ' (or minmax)'}, or to the type's own range if the image is as "
            "dark as that"
        )
    most = float(np.nanquantile(image.numpy()[..., :: _every(image), :: _every(image)], 0.999))
    if most <= EMPTY:
        warn(
            f"all but a thousandth of the measurement's values are at most {EMPTY:.4g} of their "
            f"range, {means}. If the brighter ones are hot pixels, set data.intensity_range to "
            f"[0, {rounded_up(most * float(np.max(image_format.high))):g}]"
        )
    elif largest.max() <= DARK and image_format.dtype == "uint16":
        warn(
            f"the largest value of the measurement, {stored:g}, is {share}. If it has fewer than "
            f"16 bits, {ranges}"
        )


def _every(image: Tensor) -> int:
    """A step at which some hundred thousand pixels are enough for a quantile."""
    return max(1, math.isqrt(image.shape[-2] * image.shape[-1] // 2**18))


def check_channels(image: Tensor) -> None:
    """Question channels of unlike brightness in one range; image as read, (1, C, H, W)."""
    largest = torch.nan_to_num(image, nan=0.0).abs().amax(dim=(0, 2, 3))  # (C,)
    dim = [str(i) for i, one in enumerate(largest) if 0 < one <= EMPTY * largest.max()]
    if dim:
        warn(
            f"the brightest value of channel {', '.join(dim)} (from 0) is at most 1/16 of that of "
            "another, which may lend it its structure. To restore channels of unlike brightness, "
            "set data.intensity_range to minmax, which scales each, and data.noise.sigma to null"
        )


def check_outside(image: Tensor, image_format: ImageFormat) -> None:
    """Refuse an explicit range that most values lie outside of."""
    known = image[image.isfinite()]
    far = (known < -0.5) | (known > 1.5)
    outside = float(far.float().mean())
    low, high = np.min(image_format.low), np.max(image_format.high)
    span = high - low
    beyond = known[known < -0.5]
    if len(beyond) > 1 and beyond.min() == beyond.max():
        raise ValueError(
            f"{len(beyond)} of the measurement's values are {low + span * float(beyond[0]):g}, far "
            f"outside of intensity_range [{low:g}, {high:g}]; if that marks missing values, set "
            "them to NaN"
        )
    if outside > 0.5:
        raise ValueError(
            f"{outside:.0%} of the measurement's values, from {low + span * float(known.min()):g} "
            f"to {low + span * float(known.max()):g}, lie outside of intensity_range [{low:g}, "
            f"{high:g}]; set data.intensity_range to the stored values that are black and white"
        )


def check_mask(operator: Operator, y: Tensor) -> None:
    """Refuse or question a mask that seems to be inverted or empty; y is the measurement."""
    mask = operator.mask if isinstance(operator, Mask) else None
    if mask is None:
        return
    known, share = mask.bool(), float(mask.mean())
    if share == 1:
        warn(
            "every pixel of the mask is known, so that nothing is filled. Known pixels are white "
            "(1), missing ones black (0)"
        )
        return
    channels = [c[k] for c, k in zip(y[0], known.expand_as(y)[0], strict=True)]
    if all(len(c) > 1 and c.min() == c.max() for c in channels):
        raise ValueError(
            f"the {share:.1%} of the pixels that the mask marks as known all have one value, so "
            "that nothing can be filled from them; known pixels are white (1): invert the mask"
        )
    right, down = known[..., 1:] & known[..., :-1], known[..., 1:, :] & known[..., :-1, :]
    connected = float(right.sum() + down.sum()) / (2 * float(known.sum()))
    if share < FEW_KNOWN and connected > CONNECTED:
        warn(
            f"only {share:.1%} of the pixels are known, in connected regions. If these are the "
            "missing ones, invert the mask: known pixels are white (1)"
        )


def check_sinogram(problem: InverseProblem) -> None:
    """Refuse angles in radians and a transposed sinogram, and question inconsistent projections.

    Parallel projections of an object within the field of view all have the same sum, and their
    moments depend on the angle in a known way (Helgason-Ludwig conditions of orders 0 to 2).
    """
    operator, y = problem.operator, problem.y
    if not isinstance(operator, Radon) or problem.operator.observed is not None:
        return
    angles = operator.angles.detach().cpu().double().numpy()
    detectors, count = sides = y.shape[-2:]
    largest = float(np.abs(angles).max())
    if count < FEWEST_ANGLES:
        return
    if np.ptp(angles) > 1 and largest <= 2 * math.pi + 1e-3:
        text = (
            f"the {count} angles lie between {angles.min():.3g} and {angles.max():.3g}, which "
            "seems to be radians; data.operator.angles are in degrees (numpy.rad2deg)"
        )
        if angles.min() >= 0:
            raise ValueError(text)
        warn(text)  # as in tomosynthesis over a few degrees
    sinogram = y[0].mean(dim=0).cpu().double().numpy()  # (detectors, angles)
    variance = problem.noise_variance()
    sigma = 0.0 if variance is None else math.sqrt(float(variance) / y.shape[1])
    spread, across = (_variation(sinogram.sum(axis=i), sigma * sides[i] ** 0.5) for i in (0, 1))
    if spread > 0.2 and detectors == count and across < spread / 3:
        raise ValueError(
            "the sinogram seems to be transposed: its columns must be the projections, which have "
            f"the same sum, but their sums vary by {spread:.0%}, and those of the rows by "
            f"{across:.0%}; transpose it to (detectors, angles)"
        )
    edges, inside = float(sinogram[[0, -1]].mean()), float(sinogram.mean())
    if edges > inside + 3 * sigma / math.sqrt(2 * count):
        warn(
            "the outermost detectors measure more than the others, as if nothing were outside of "
            "the object but light: projections are sums along rays, for transmitted intensities "
            "−log(I / I₀)"
        )
        return
    offset = _angle_misfit(sinogram, angles, sigma)
    if spread > 0.2 or offset > MISFIT * detectors:
        found = (
            f"the sums of the projections vary by {spread:.0%}"
            if spread > 0.2
            else f"their centres or widths are {offset:.1f} detectors off"
        )
        warn(
            f"the sinogram is not that of one object at these angles: {found}. Check "
            "data.operator.angles, their order and unit (degrees), the axes (detectors, angles), "
            "the centre of rotation, and that nothing lies outside of the field of view"
        )


def check_kernel(problem: InverseProblem) -> None:
    """Warn if a blur leaves little to fit, or if an estimated kernel is unreliable."""
    blur, operator = unknown_blur(problem.operator), problem.operator
    inner = operator.operator if isinstance(operator, Observed) else operator
    if isinstance(inner, Blur) and inner.boundary == "unknown":
        seen = float(operator.observed.mean()) if operator.observed is not None else 1.0
        if seen < LEAST_SEEN:
            warn(
                f"only {seen:.0%} of the measurement is far enough from its border not to depend "
                "on the image beyond it, because the blur's kernel is large. A smaller kernel, or "
                "a data.operator.boundary such as reflect, would use more"
            )
    if blur is None:
        return
    largest = float(blur.kernel.max())
    if blur.agreement < DETERMINED:
        warn(
            "the blur cannot be determined from this image: estimates of its kernel agree only to "
            f"{blur.agreement:.2f}, and to more than {DETERMINED} where they are right. The image "
            "may be too noisy, have too little detail, or not be blurred; or another "
            "data.operator.size may help"
        )
    elif largest > POINT:
        warn(
            f"the blur's kernel is nearly a point, with {largest:.0%} of it in one pixel: the "
            "image is hardly blurred, or too noisy to see how; restore it without a blur"
        )
    elif blur.share_at_border > CUT_OFF:
        warn(
            f"the blur's kernel is probably cut off, with {blur.share_at_border:.0%} of it at the "
            f"border of {blur.size}×{blur.size} pixels; increase data.operator.size"
        )


def _variation(values: np.ndarray, by_noise: float) -> float:
    """Standard deviation over mean, less what noise explains."""
    return max(0.0, float(values.std()) - 2 * by_noise) / max(abs(float(values.mean())), 1e-12)


def _angle_misfit(sinogram: np.ndarray, angles: np.ndarray, sigma: float) -> float:
    """How far the projections' centres and widths are from those of one object, in detectors.

    Up to what noise explains. The first moment of a projection is a sinusoid of the angle, and the
    second one also has terms of twice the angle; terms of the first order allow for a shift.
    """
    detectors = sinogram.shape[0]
    offsets = np.arange(detectors) - detectors // 2
    mass = max(float(sinogram.sum(axis=0).mean()), 1e-12)
    turn = np.deg2rad(angles)
    first = [np.ones_like(turn), np.cos(turn), np.sin(turn)]
    second = [*first, np.cos(2 * turn), np.sin(2 * turn)]
    centre, spread = offsets @ sinogram / mass, offsets**2 @ sinogram / mass
    width = max(math.sqrt(abs(float(spread.mean()))), 1.0)
    misfits = []
    for moment, basis, power, unit in ((centre, first, 1, 1.0), (spread, second, 2, 2 * width)):
        if len(turn) <= 2 * len(basis):
            continue
        columns = np.stack(basis, axis=1)
        weights, *_ = np.linalg.lstsq(columns, moment, rcond=None)
        left = moment - columns @ weights
        if power == 1 and np.hypot(*weights[1:]) > detectors / 2:  # outside of the field of view
            left = moment - moment.mean()
        by_noise = sigma * float(np.linalg.norm(offsets.astype(float) ** power)) / mass
        misfits.append((float(left.std()) - 3 * by_noise) / unit)
    return max(0.0, *misfits)


def check_noise(problem: InverseProblem) -> None:
    """Refuse or question a noise model whose strength is not that of the measurement."""
    noise, observed = problem.noise, problem.operator.observed
    if noise is None or min(problem.y.shape[-2:]) < SMALLEST:
        return
    smooth = F.avg_pool2d(problem.y, 3, stride=1, padding=1, count_include_pad=False)
    stated = noise.variance(smooth).clamp(min=LEAST_VARIANCE).expand_as(problem.y)
    valid = unclipped(problem.y)
    if noise.from_zero:  # where there is too little light, its variance is not known either
        valid = valid & (4 * stated < smooth.square())
    if observed is not None:
        valid = valid & observed.bool()
    scaled = problem.y / stated.sqrt()
    fine = noise_level(scaled, valid)  # (C,)
    found = fine[fine.isfinite()]
    if len(found) == 0:
        return
    # The noise of a JPEG, a demosaiced image or grain is weak only at the finest scales.
    half, quarter = (
        by * local_level(F.avg_pool2d(scaled, by), F.avg_pool2d(valid.float(), by) == 1)
        for by in (2, 4)
    )
    most = max(float(found.max()), 0.0 if math.isnan(half) else half)
    level, mean = local_level(scaled, valid), 255 * math.sqrt(float(stated.mean()))
    if most < (STRONG_COUNTS if noise.from_zero else STRONG) and mean > UNITS[0]:
        text = _disagreement(noise, float(found.mean()))
        if most < TOO_STRONG and not quarter >= TOO_STRONG:
            raise ValueError(text)
        warn(f"{text}, or keep it if the noise is not white")
    elif len(found) > 1 and found.max() > UNLIKE * found.min() and found.min() < STRONG:
        factors = ", ".join(f"{factor:.2g}" for factor in fine)
        warn(
            f"the noise is stated as {noise}, but that of the channels seems to be {factors} times "
            "as strong; set data.noise.sigma to null, and data.intensity_range to minmax"
        )
    if level > TOO_WEAK and mean < UNITS[0] and level * mean > UNITS[1]:
        raise ValueError(
            f"{_disagreement(noise, level)}: sigma is in grey levels of an 8-bit image, not in "
            "[0, 1]"
        )
    # Texture is stronger at half the size; and what averages pixels leaves less of it.
    texture = TEXTURE if half > COARSER * level else WHITE_TEXTURE
    left = texture / math.sqrt(problem.operator.largest_gain(problem.y))
    if level > WEAK and level * mean > left:
        warn(f"{_disagreement(noise, level)}, or keep it if the whole image is fine texture")


def _disagreement(noise: NoiseModel, factor: float) -> str:
    return (
        f"the noise is stated as {noise}, but that of the measurement seems to be {factor:.3g} "
        f"times as strong; set {corrected(parameters(noise), factor)}"
    )


def warn(text: str) -> None:
    """Warn with a sentence whose first letter and full stop are added."""
    rank_zero_warn(f"{text[0].upper()}{text[1:]}.", category=RestorationWarning)
