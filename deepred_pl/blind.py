"""Estimate the kernel of an unknown blur.

`estimate_kernel` needs only the blurred image. From coarse to fine, it alternates between a sharp
image with few edges, and the kernel between that and the blurred one (Cho & Lee 2009; the edges are
those of the L0 gradient prior of Xu et al. 2011, as Pan et al. 2014 use it for kernels). It does so
with several strengths, and takes the mean of what they find; how much they agree shows whether the
blur can be determined.

`kernel_between` solves for the kernel given a sharp image, with which a fit improves the kernel.

Images are (H, W); their `gain` scales those of `with_few_edges` and `kernel_between`. Kernels are
(size, size), non-negative, of sum 1, with the centre of mass in the middle to within half a pixel,
so that image and kernel exchange neither brightness nor position.
"""

import math
from functools import lru_cache

import numpy as np
from scipy import ndimage
from scipy.fft import irfft2, next_fast_len, rfft2
from scipy.signal import correlate

Array = np.ndarray

# Estimates are made with each strength of the gradient prior and each damping of the kernel.
STRENGTHS, DAMPINGS = (0.002, 0.004, 0.008, 0.016), (4.0, 12.0)
ROUNDS, DECAY, LEAST_STRENGTH = 5, 1.1, 1e-4  # of each scale; the strength falls in every round
COARSEST = 3  # side of the kernel at the first scale; it grows by √2
LEAST_VALUE, LEAST_PART = 0.05, 0.1  # of the largest value, and of the sum, that are kept
DETAIL = 256  # side of the part of a large image by which the kernel is estimated

# The standard deviation that images are scaled to, to which the weights refer. With 0.14 the mean
# correlation of 15 estimates with their true kernels was 0.878, and with 0.1 and 0.2 0.87.
CONTRAST = 0.14

ITERATIONS = 150  # of `kernel_between`
DAMPING = 1.0


def estimate_kernel(image: Array, size: int) -> tuple[Array, float]:
    """Estimate the kernel by which an image, (H, W), was blurred.

    Args:
        image: The blurred image, such as the mean of the channels. Of a large one, the 256×256
            pixels with most detail are used.
        size: Side of the kernel in pixels, odd, at least 3.

    Returns:
        The kernel, (size, size), and the mean correlation of the estimates whose mean it is, in
        [0, 1]; a point and 0 if the image is constant.
    """
    image = image[most_detailed(image)].astype(float)
    image = gain(image) * image
    kernel, agreement = _estimate_all(image.tobytes(), image.shape, size)
    return kernel.copy(), agreement


@lru_cache(maxsize=4)  # an image is read several times while its settings are chosen
def _estimate_all(pixels: bytes, shape: tuple[int, int], size: int) -> tuple[Array, float]:
    image = np.frombuffer(pixels).reshape(shape)
    if not image.any():
        return np.pad([[1.0]], size // 2), 0.0
    kernels = [_estimate(image, size, s, d) for s in STRENGTHS for d in DAMPINGS]
    alike = np.array([[correlation(a, b) for b in kernels] for a in kernels])
    middle = kernels[int(alike.sum(axis=0).argmax())]
    mean = np.mean([ndimage.shift(k, _offset(k, middle), order=0) for k in kernels], axis=0)
    count = len(kernels)
    return _cleaned(mean), float((alike.sum() - count) / (count * (count - 1)))


def kernel_between(sharp: Array, blurred: Array, size: int) -> Array:
    """The kernel k of sum 1, without negative values, that minimizes ‖k ∗ ∇x − ∇y‖² + ‖k‖².

    Values of ∇y that depend on x beyond its border are left out. By accelerated projected gradients
    (Beck & Teboulle 2009), restarted when they overshoot.

    Args:
        sharp: x, (H, W).
        blurred: y, (H, W).
        size: Side of the kernel, odd.
    """
    half, shape = size // 2, sharp.shape
    gradients = [np.roll(sharp, -1, axis) - sharp for axis in (0, 1)]
    spectra = [rfft2(g) for g in gradients]
    wanted = [np.roll(blurred, -1, axis) - blurred for axis in (0, 1)]
    valid = np.zeros(shape)
    valid[half : shape[0] - half - 1, half : shape[1] - half - 1] = 1

    def blur(k: Array) -> list[Array]:
        transfer = _transfer(k, shape)
        return [valid * irfft2(transfer * s, s=shape) for s in spectra]

    def adjoint(parts: list[Array]) -> Array:
        total = sum(np.conj(s) * rfft2(p) for s, p in zip(spectra, parts, strict=True))
        return np.roll(irfft2(total, s=shape), (half, half), (0, 1))[:size, :size]

    backprojected = adjoint([valid * w for w in wanted])
    vector = np.random.default_rng(0).normal(size=(size, size))
    for _ in range(15):  # the largest eigenvalue, by power iteration
        vector = adjoint(blur(vector / np.linalg.norm(vector)))
    bound = 1.05 * np.linalg.norm(vector) + DAMPING
    kernel = ahead = np.full((size, size), 1 / size**2)
    momentum = 1.0
    for _ in range(ITERATIONS):
        slope = adjoint(blur(ahead)) - backprojected + DAMPING * ahead
        step = _on_simplex(ahead - slope / bound)
        if ((ahead - step) * (step - kernel)).sum() > 0:
            kernel, ahead, momentum = step, step, 1.0
            continue
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = step + (momentum - 1) / following * (step - kernel)
        kernel, momentum = step, following
    return _centred(kernel)


def with_few_edges(image: Array, strength: float, kernel: Array | None = None) -> Array:
    """The image x, (H, W), that minimizes ‖k ∗ x − y‖² + strength · (number of edges of x).

    By half-quadratic splitting (Xu et al. 2011); the image is periodic.

    Args:
        image: y, (H, W).
        strength: Weight of the gradients of x that are not 0, > 0.
        kernel: k; None is a point, so that only weak edges are removed.
    """
    shape, sharp = image.shape, image
    transfer = np.ones(()) if kernel is None else _transfer(kernel, shape)
    differences = [
        _transfer(d, shape) for d in (np.array([[1], [-1], [0]]), np.array([[1, -1, 0]]))
    ]
    seen, gram = np.conj(transfer) * rfft2(image), np.abs(transfer) ** 2
    slopes = sum(np.abs(d) ** 2 for d in differences)
    weight = 2 * strength
    while weight < 1e5:
        edges = [np.roll(sharp, -1, axis) - sharp for axis in (0, 1)]
        strong = edges[0] ** 2 + edges[1] ** 2 >= strength / weight
        pulled = sum(
            np.conj(d) * rfft2(strong * e) for d, e in zip(differences, edges, strict=True)
        )
        sharp = irfft2((seen + weight * pulled) / (gram + weight * slopes), s=shape)
        weight *= 2
    return sharp


def correlation(first: Array, second: Array) -> float:
    """The largest normalized correlation of two kernels over all shifts by whole pixels."""
    norms = math.sqrt((first**2).sum() * (second**2).sum())
    return float(correlate(first, second, method="fft").max() / norms)


def gain(image: Array) -> float:
    """The factor that gives the image the contrast to which all weights refer; 0 if it has none."""
    return 0.0 if np.ptp(image) == 0 else float(CONTRAST / image.std())


def _estimate(image: Array, size: int, strength: float, damping: float) -> Array:
    """The estimate with one strength of the prior and one damping, from coarse to fine."""
    sides = [size]
    while sides[-1] > COARSEST:
        sides.append(int(sides[-1] / math.sqrt(2)) | 1)
    kernel = np.full((COARSEST, COARSEST), 1 / COARSEST**2)
    for side in reversed(sides):
        reduced = _reduced(image, side / size)
        blurred = _faded(reduced, side)
        inside = np.zeros(blurred.shape)
        inside[side : side + reduced.shape[0], side : side + reduced.shape[1]] = 1
        inside = ndimage.gaussian_filter(inside, side / 6)
        if kernel.shape[0] < side:
            larger = ndimage.zoom(
                kernel, side / kernel.shape[0], order=1, mode="grid-constant", grid_mode=True
            )
            kernel = _cleaned(larger)
        for _ in range(ROUNDS):
            sharp = with_few_edges(blurred, strength, kernel)
            kernel = _cleaned(_damped_kernel(sharp, blurred, side, damping, inside))
            strength = max(strength / DECAY, LEAST_STRENGTH)
    return kernel


def _damped_kernel(sharp: Array, blurred: Array, size: int, damping: float, inside: Array) -> Array:
    """The kernel that minimizes ‖k ∗ ∇x − ∇y‖² + damping · ‖k‖², by one division of spectra."""
    product, power = 0, 0
    for axis in (0, 1):
        x = rfft2(inside * (np.roll(sharp, -1, axis) - sharp))
        y = rfft2(inside * (np.roll(blurred, -1, axis) - blurred))
        product, power = product + np.conj(x) * y, power + np.abs(x) ** 2
    kernel = irfft2(product / (power + damping), s=sharp.shape)
    return np.roll(kernel, (size // 2, size // 2), (0, 1))[:size, :size]


def _cleaned(kernel: Array) -> Array:
    """The kernel without negative, small and isolated values, centred, of sum 1."""
    if not kernel.max() > 0:  # nothing in the image determines it
        return np.pad([[1.0]], kernel.shape[0] // 2)
    kernel = np.where(kernel < LEAST_VALUE * kernel.max(), 0, kernel)
    parts, count = ndimage.label(kernel > 0, np.ones((3, 3)))
    sums = ndimage.sum_labels(kernel, parts, range(count + 1))
    kernel = np.where(sums[parts] < LEAST_PART * kernel.sum(), 0, kernel)
    return _centred(kernel / kernel.sum())


def _centred(kernel: Array) -> Array:
    """The kernel shifted by whole pixels, so that its centre of mass is in the middle."""
    middle = np.array(kernel.shape) // 2
    moved = ndimage.shift(kernel, np.rint(middle - ndimage.center_of_mass(kernel)), order=0)
    return moved / moved.sum()


def _on_simplex(values: Array) -> Array:
    """The nearest values that are not negative and have the sum 1 (Duchi et al. 2008)."""
    descending = np.sort(values, axis=None)[::-1]
    excess = (descending.cumsum() - 1) / np.arange(1, values.size + 1)
    return np.maximum(values - excess[np.flatnonzero(descending > excess)[-1]], 0)


def _transfer(kernel: Array, shape: tuple[int, ...]) -> Array:
    """The Fourier transform of a kernel with its centre at rows // 2 and columns // 2."""
    rows, columns = kernel.shape
    spread = np.zeros(shape)
    spread[:rows, :columns] = kernel
    return rfft2(np.roll(spread, (-(rows // 2), -(columns // 2)), (0, 1)))


def _offset(kernel: Array, onto: Array) -> tuple[int, ...]:
    """By how many pixels a kernel is best shifted onto another one of its size."""
    found = correlate(onto, kernel, method="fft")
    best = np.unravel_index(found.argmax(), found.shape)
    return tuple(int(at) - side + 1 for at, side in zip(best, kernel.shape, strict=True))


def _reduced(image: Array, scale: float) -> Array:
    """The image at a smaller scale."""
    if scale == 1:
        return image
    smooth = ndimage.gaussian_filter(image, 0.5 * (1 / scale - 1))
    return ndimage.zoom(smooth, scale, order=1, mode="reflect", grid_mode=True)


def _faded(image: Array, margin: int) -> Array:
    """The image mirrored at its borders, and faded there so that opposite ends meet."""
    sides = [next_fast_len(side + 2 * margin, real=True) for side in image.shape]
    extra = [
        (margin, total - side - margin) for side, total in zip(image.shape, sides, strict=True)
    ]
    larger = np.pad(image, extra, mode="symmetric")
    ramps = [
        np.minimum(1, (np.minimum(np.arange(n), n - 1 - np.arange(n)) + 0.5) / margin)
        for n in sides
    ]
    weight = np.outer(*(0.5 - 0.5 * np.cos(np.pi * ramp) for ramp in ramps))
    return weight * larger + (1 - weight) * ndimage.gaussian_filter(larger, margin / 2, mode="wrap")


def most_detailed(image: Array) -> tuple[slice, slice]:
    """The 256×256 pixels with the strongest gradients, or all of a smaller image."""
    rows, columns = (min(DETAIL, length) for length in image.shape)
    energy = sum(np.diff(image, axis=a, append=image.take([-1], a)) ** 2 for a in (0, 1))
    mean = ndimage.uniform_filter(energy, (rows, columns), mode="constant")
    top, left = rows // 2, columns // 2
    within = mean[top : image.shape[0] - rows + top + 1, left : image.shape[1] - columns + left + 1]
    row, column = np.unravel_index(within.argmax(), within.shape)
    return slice(row, row + rows), slice(column, column + columns)
