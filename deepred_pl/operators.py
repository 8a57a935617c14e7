"""Linear forward operators A of y = A x + noise.

Kernels, masks and angles are buffers, which move with the module to its device; pass an
`nn.Parameter` to let an embedding module learn one.
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from numbers import Integral
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from skimage.transform import iradon
from torch import Tensor, nn

from deepred_pl.blind import DETAIL, estimate_kernel
from deepred_pl.checks import as_plain, check_at_least, check_choice, check_positive
from deepred_pl.images import read_image
from deepred_pl.tiles import Region

Boundary = Literal["circular", "replicate", "reflect", "zero", "unknown"]
ResamplingKernel = Literal["lanczos2", "lanczos3", "bicubic", "box"]

GRAM_ITERATIONS = 30  # enough while the eigenvalues of A Aᵀ + ε I span a factor of some hundreds
POINT = 0.2  # of the sum of a kernel: if one pixel has more, there is hardly a blur
# Share of an unknown kernel in its outermost pixels. A motion of 13 pixels on five images was
# found with 0.09 to 0.22 in 9×9 and 11×11 pixels, and with at most 0.04 in 15×15 and 21×21.
CUT_OFF = 0.06
TINY = 1e-30  # keeps a division finite once conjugate gradients have converged
MISMATCH = 0.01  # of ⟨A x, A x⟩; float32 has 1e-5, and an approximate adjoint a few percent

# A mask saved as JPEG has grey values along its edges; a photograph is grey everywhere.
MOST_GREY = 0.05


class Operator(nn.Module, ABC):
    """A linear map from images to measurements; calling it applies A.

    Images are (1, C, H, W).

    Attributes:
        keeps_units: Whether a constant image is measured as the same constant. If not, the
            measurement's file format does not apply to the image.
        factor: Ratio of the image's sides to the measurement's, which is rounded up.
        overshoots: Whether A x may leave [0, 1] next to edges, because a filter has negative
            weights. Then, if there is no noise, values of y that were clipped to 0 or 1 count as
            "at most" and "at least".
    """

    keeps_units: bool = True
    factor: int = 1
    overshoots: bool = False

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """A x, of the measurement's shape."""

    @abstractmethod
    def image_shape(self, measurement_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape (1, C, H, W) of the images whose measurement has `measurement_shape`.

        Raises:
            ValueError: No image has such a measurement.
        """

    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y, (1, C, H, W), so that ⟨A x, y⟩ = ⟨x, Aᵀ y⟩, by differentiating A."""
        x = torch.zeros(self.image_shape(tuple(y.shape)), dtype=y.dtype, device=y.device)
        return torch.func.vjp(self, x)[1](y)[0]

    def inverse_gram(self, residual: Tensor, epsilon: float) -> Tensor:
        """(A Aᵀ + ε I)⁻¹ r for r of the measurement's shape, by conjugate gradients.

        A fixed number of iterations, `GRAM_ITERATIONS`, which waits for no GPU.
        """
        solved = torch.zeros_like(residual)
        rest = direction = residual
        energy = rest.square().sum()
        for _ in range(GRAM_ITERATIONS):
            mapped = self(self.adjoint(direction)) + epsilon * direction
            length = energy / (direction * mapped).sum().clamp(min=TINY)
            solved = solved + length * direction
            rest = rest - length * mapped
            before, energy = energy, rest.square().sum()
            direction = rest + energy / before.clamp(min=TINY) * direction
        return solved

    def first_guess(self, y: Tensor) -> Tensor:
        """A first image from y, (1, C, H, W), at which x and the average start."""
        return y

    def keep_known(self, image: Tensor, y: Tensor) -> Tensor:
        """Replace pixels of `image`, (1, C, H, W), that were measured directly by those of y."""
        return image

    def nearest(self, y: Tensor, measured: Tensor) -> Tensor:
        """The values nearest to `measured` that are recorded as y: y itself, unless it is rounded.

        Args:
            y: A measurement without noise.
            measured: A x, of its shape.
        """
        return y

    @torch.no_grad()
    def largest_gain(self, y: Tensor) -> float:
        """How many times brighter than its measurement a single bright pixel can be, at least 1.

        Args:
            y: A measurement, whose shape and device are used.
        """
        seen = self.adjoint(torch.ones_like(y))  # (1, C, H, W)
        usual = seen[seen > 0].median()  # not that of a border, which may be seen twice
        point = torch.zeros(seen.numel(), device=y.device)
        point[(seen - usual).abs().argmin()] = 1
        return max(1.0, 1 / max(float(self(point.view(seen.shape)).max()), TINY))

    @property
    def observed(self) -> Tensor | None:
        """1 where the measurement was observed and 0 elsewhere; None if all of it was."""
        return None

    def admissible(self, image: Tensor) -> Tensor:
        """The image cropped or padded to a size that A accepts."""
        return image

    def fitted(self, y: Tensor) -> "Operator":
        """The operator with its open parts estimated from its measurement y."""
        return self

    def drawn(self, image_shape: tuple[int, ...], generator: torch.Generator) -> "Operator":
        """The operator with unset parts drawn at random, to simulate a measurement."""
        return self

    def reach(self) -> tuple[int, int] | None:
        """Rows and columns of the measurement next to a cut that depend on the image beyond it.

        None if all of the measurement may depend on all of the image, so that it cannot be cut.
        """
        return None

    def cropped(self, region: Region) -> "Operator":
        """The operator on a region of the image.

        Next to the region's cuts, within `reach`, it differs from the operator on the whole.
        """
        return self


class Identity(Operator):
    """A = I: denoising.

    >>> y = torch.rand(1, 3, 33, 47)
    >>> torch.equal(Identity()(y), y)
    True
    """

    def forward(self, x: Tensor) -> Tensor:
        return x

    def image_shape(self, measurement_shape: tuple[int, ...]) -> tuple[int, ...]:
        return measurement_shape

    def inverse_gram(self, residual: Tensor, epsilon: float) -> Tensor:
        return residual / (1 + epsilon)

    def reach(self) -> tuple[int, int] | None:
        return 0, 0


class Blur(Operator):
    """Convolution of each channel with one kernel, by FFT; the size stays.

    Args:
        kernel: (rows, columns), a tensor or array. Its centre is the value at rows // 2 and
            columns // 2: the middle, and for an even number the one after it, as in
            scipy.ndimage.convolve (scipy.signal's mode "same" has the one before). Zeros around it
            are cut off, and it is divided by its sum, so that brightness is preserved; an
            `nn.Parameter`, whose sides must be odd, is used unchanged.
        boundary: How the image continues beyond its border: periodically ("circular"), with its
            border pixels ("replicate"), mirrored about the border pixels ("reflect"), with zeros
            ("zero"), or "unknown", as in photographs: then an `InverseProblem` leaves out what of
            the measurement depends on it, half of the kernel's size next to the border.

    Raises:
        ValueError: The kernel has another shape, does not sum to a positive number, or is larger
            than the image.

    >>> blur = Blur.gaussian(25, 1.6)
    >>> blur(torch.rand(1, 3, 33, 47)).shape
    torch.Size([1, 3, 33, 47])
    """

    kernel: Tensor

    def __init__(self, kernel: Tensor | np.ndarray, boundary: Boundary = "circular") -> None:
        super().__init__()
        check_choice("boundary", boundary, Boundary)
        kernel = kernel if isinstance(kernel, Tensor) else torch.tensor(as_plain(kernel))
        _check_kernel(kernel)
        self.boundary = boundary
        if not isinstance(kernel, nn.Parameter):
            kernel = _centred(kernel.float() / kernel.sum())
        _keep(self, "kernel", kernel)

    @classmethod
    def uniform(cls, size: int = 9, boundary: Boundary = "circular") -> "Blur":
        """The mean over size × size pixels; size is odd."""
        _check_size(size)
        return cls(torch.ones(size, size), boundary)

    @classmethod
    def gaussian(
        cls, size: int = 25, width: float = 1.6, boundary: Boundary = "circular"
    ) -> "Blur":
        """A Gaussian of standard deviation `width` in pixels, cut to size × size; size is odd."""
        return cls(gaussian_kernel(size, width), boundary)

    @classmethod
    def motion(cls, length: float, angle: float = 0.0, boundary: Boundary = "circular") -> "Blur":
        """A straight motion of `length` pixels, `angle` degrees counter-clockwise from the right.

        The path is sampled densely, and each sample is shared among the four nearest pixels.
        """
        check_positive("the motion's length", length)
        steps = torch.linspace(-0.5, 0.5, 64 * math.ceil(length) + 1, dtype=torch.float64)
        turn = math.radians(angle)
        down, right = -steps * length * math.sin(turn), steps * length * math.cos(turn)
        half = math.ceil(length / 2) + 1
        offsets = torch.arange(-half, half + 1)
        rows = (1 - (down - offsets[:, None]).abs()).clamp(min=0)  # (size, samples)
        columns = (1 - (right - offsets[:, None]).abs()).clamp(min=0)
        return cls(_without_rounding(rows @ columns.T), boundary)

    @classmethod
    def from_file(cls, path: str | os.PathLike, boundary: Boundary = "circular") -> "Blur":
        """A kernel stored as an NPY array (rows, columns) or a grey image (PNG, TIFF)."""
        # For any bit depth, (C, rows, columns).
        picture = read_image(path, [0, 1], axes=_axes_of(path))[0][0]
        if (picture != picture[0]).any():
            raise ValueError(f"expected a grey image of a blur kernel, got a colour image: {path}")
        return cls(picture[0], boundary)

    def forward(self, x: Tensor) -> Tensor:
        self.image_shape(tuple(x.shape))
        rows, columns = (side // 2 for side in self.kernel.shape)
        if self.boundary != "circular":
            x = _extended(_extended(x, -2, rows, self.boundary), -1, columns, self.boundary)
        height, width = x.shape[-2:]
        y = torch.fft.irfft2(torch.fft.rfft2(x) * self.transfer(height, width), s=(height, width))
        if self.boundary != "circular":
            y = y[..., rows : height - rows, columns : width - columns]
        return y

    def fitted(self, y: Tensor) -> Operator:
        if self.boundary != "unknown":
            return self
        rows, columns = (side // 2 for side in self.kernel.shape)
        height, width = y.shape[-2:]
        self.image_shape(tuple(y.shape))
        inside = torch.zeros(1, 1, height, width, device=y.device)
        inside[..., rows : height - rows, columns : width - columns] = 1
        if not inside.any():
            raise ValueError(
                f"the blur's boundary is unknown, and no pixel of {height}×{width} is further from "
                f"the border than half of the kernel, {rows}×{columns}; set boundary to reflect"
            )
        return Observed(self, inside) if rows or columns else self

    def transfer(self, height: int, width: int) -> Tensor:
        """The kernel's Fourier transform on height × width pixels, (height, width // 2 + 1)."""
        rows, columns = self.kernel.shape
        spread = F.pad(self.kernel, (0, width - columns, 0, height - rows))
        return torch.fft.rfft2(spread.roll((-(rows // 2), -(columns // 2)), (0, 1)))

    def inverse_gram(self, residual: Tensor, epsilon: float) -> Tensor:
        """r filtered by 1 / (|H|² + ε), with H the kernel's Fourier transform.

        This is (A Aᵀ + ε I)⁻¹ r for a circular boundary. With the others, A is cut from the
        circular convolution of an image extended by half of the kernel, whose filter is applied to
        r extended by zeros: symmetric and positive definite too, and nearly equal to the exact one
        away from the border.
        """
        height, width = residual.shape[-2:]
        size = (height, width)
        if self.boundary != "circular":
            size = (height + self.kernel.shape[0] - 1, width + self.kernel.shape[1] - 1)
        weight = 1 / (self.transfer(*size).abs().square() + epsilon)
        filtered = torch.fft.irfft2(torch.fft.rfft2(residual, s=size) * weight, s=size)
        return filtered[..., :height, :width]

    def image_shape(self, measurement_shape: tuple[int, ...]) -> tuple[int, ...]:
        rows, columns = self.kernel.shape
        height, width = measurement_shape[-2:]
        if rows > height or columns > width:
            raise ValueError(
                f"the blur kernel must be no larger than the image, {height}×{width}, got "
                f"{rows}×{columns} values around its centre that are not 0; use a larger image, or "
                "set the kernel's small values to 0"
            )
        return measurement_shape

    def reach(self) -> tuple[int, int] | None:
        if self.boundary == "circular":
            return None
        return self.kernel.shape[0] // 2, self.kernel.shape[1] // 2

    def extra_repr(self) -> str:
        return f"{self.kernel.shape[0]}×{self.kernel.shape[1]}, boundary={self.boundary!r}"


class UnknownBlur(Blur):
    """A blur whose kernel is estimated from the measurement: blind deblurring.

    An `InverseProblem` estimates the kernel from the mean of the channels
    (`blind.estimate_kernel`), and the callback `KernelUpdate` improves it during the fit. Its sum
    is 1, and its centre of mass is in the middle, so that image and kernel exchange neither
    brightness nor position. The boundary is "unknown".

    Args:
        size: Side of the kernel in pixels, odd, from 3 to 127: larger than the blur, by a quarter
            or so; the image must be larger than twice that.
        simulated: The blur that makes the measurement where one is simulated; nothing else uses it.

    Attributes:
        kernel: The kernel at present, (size, size).
        agreement: How much several estimates of it agree, in [0, 1]; 0 before there are any.

    Raises:
        ValueError: size is not odd or out of range, or too large for the image or too small for
            the simulated blur.
    """

    def __init__(self, size: int = 21, simulated: Blur | None = None) -> None:
        check_at_least(3, size=size)
        _check_size(size)
        if 2 * size >= DETAIL:
            raise ValueError(
                f"the size of an unknown kernel must be below {DETAIL // 2}, got {size}; if the "
                "blur is that large, reduce the image first"
            )
        super().__init__(torch.ones(1, 1), "unknown")
        self.size, self.simulated = size, simulated
        self.agreement, self.estimated = 0.0, False
        half = size // 2
        # It is learned, and saved in checkpoints.
        self.register_buffer("kernel", F.pad(torch.ones(1, 1), (half, half, half, half)))

    def drawn(self, image_shape: tuple[int, ...], generator: torch.Generator) -> Operator:
        """The operator with the kernel of the simulated blur."""
        if self.simulated is None:
            raise ValueError(
                "to simulate a measurement, an unknown blur needs one to simulate; set "
                "data.operator.simulated, or give a measurement"
            )
        kernel = self.simulated.kernel
        rows, columns = ((self.size - side) // 2 for side in kernel.shape)
        if min(rows, columns) < 0:
            raise ValueError(
                f"the simulated blur has {kernel.shape[0]}×{kernel.shape[1]} pixels, more than the "
                f"{self.size}×{self.size} of the unknown kernel; use a larger size"
            )
        drawn = UnknownBlur(self.size)
        drawn.kernel = F.pad(kernel, (columns, columns, rows, rows))
        return drawn

    def fitted(self, y: Tensor) -> Operator:
        if self.estimated:
            return super().fitted(y)
        if min(y.shape[-2:]) <= 2 * self.size:
            raise ValueError(
                f"a kernel of {self.size}×{self.size} pixels cannot be estimated from an image of "
                f"{y.shape[-2]}×{y.shape[-1]}; use a smaller size, or a larger image"
            )
        known = UnknownBlur(self.size)
        image = y[0].mean(dim=0).cpu().double().numpy()
        kernel, known.agreement = estimate_kernel(image, self.size)
        known.kernel = torch.from_numpy(kernel).float().to(y.device)
        known.estimated = True
        return known.fitted(y)

    @property
    def share_at_border(self) -> float:
        """The share of the kernel in its outermost pixels."""
        return 1 - float(self.kernel[1:-1, 1:-1].sum())

    def extra_repr(self) -> str:
        if not self.estimated:
            return f"{self.size}×{self.size}"
        return f"{self.size}×{self.size}, estimates agree to {self.agreement:.2f}"


def unknown_blur(operator: Operator) -> UnknownBlur | None:
    """The part of an operator that is a blur with an unknown kernel."""
    return next((part for part in operator.modules() if isinstance(part, UnknownBlur)), None)


def gaussian_kernel(size: int, width: float | Tensor) -> Tensor:
    """A Gaussian of sum 1, (size, size), with a standard deviation of `width` pixels.

    Differentiable in `width`: a module that learns the width w of a blur sets
    `operator.kernel = gaussian_kernel(25, w)` in every training step (and detaches the kernel
    before the module is copied or pickled).

    Raises:
        ValueError: size is not odd, or width is not positive.
    """
    _check_size(size)
    if not isinstance(width, Tensor) and not width > 0:  # reading a tensor could wait for a GPU
        raise ValueError(f"the blur width must be > 0 pixels, got {width}")
    width = torch.as_tensor(width, dtype=torch.float32)
    offsets = torch.arange(size, device=width.device) - size // 2
    profile = torch.exp(-0.5 * (offsets / width) ** 2)
    kernel = profile[:, None] * profile
    return kernel / kernel.sum()


class Downsample(Operator):
    """An antialiasing filter, then every factor-th pixel: super-resolution.

    Pixels of the small image are centred on blocks of factor × factor pixels, as in common
    resizing; border pixels are replicated. The sides of the large image must be multiples of the
    factor.

    Args:
        factor: Ratio of the image's sides to the measurement's, at least 2.
        kernel: "lanczos2", as in the paper's experiments; "lanczos3", as in Pillow's resize and the
            task `super_resolution`; "bicubic" (a = −1/2); or "box", the mean of each block.

    Raises:
        ValueError: factor is below 2 or above the image's sides, or does not divide them.

    >>> Downsample(4)(torch.rand(1, 3, 36, 48)).shape
    torch.Size([1, 3, 9, 12])
    """

    profile: Tensor

    def __init__(self, factor: int = 4, kernel: ResamplingKernel = "lanczos2") -> None:
        super().__init__()
        whole: Any = as_plain(factor)
        if not isinstance(whole, int | float) or whole != int(whole):
            raise ValueError(
                f"factor must be one whole number for both sides, got {factor}; resize the image "
                "to one factor first"
            )
        factor = int(whole)
        check_at_least(2, factor=factor)
        check_choice("kernel", kernel, ResamplingKernel)
        self.factor = factor
        support, weight = RESAMPLING[kernel]
        reach = math.ceil(support * factor) + 1
        # Distances of pixels from a block's centre, which is a pixel's centre if the factor is odd.
        offsets = torch.arange(-reach, reach) + (0.5 if factor % 2 == 0 else 0.0)
        offsets = offsets[offsets.abs() < support * factor]
        profile = weight(offsets.double() / factor)
        self.overshoots = bool((profile < 0).any())
        self.register_buffer("profile", (profile / profile.sum()).float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"the image's sides must be multiples of the factor {self.factor}, got "
                f"{height}×{width}; crop it"
            )
        taps = self.profile.shape[0]
        pad = (taps - self.factor) // 2
        y = _extended(_extended(x, -2, pad, "replicate"), -1, pad, "replicate")
        # Products and sums: torch may round a convolution to 10 bits on a GPU.
        y = (y.unfold(-2, taps, self.factor) * self.profile).sum(-1)  # (1, C, H / factor, W')
        return (y.unfold(-1, taps, self.factor) * self.profile).sum(-1)

    def image_shape(self, measurement_shape: tuple[int, ...]) -> tuple[int, ...]:
        *leading, height, width = measurement_shape
        return (*leading, height * self.factor, width * self.factor)

    def first_guess(self, y: Tensor) -> Tensor:
        """Bicubic interpolation."""
        # With antialias=True torch takes a = −1/2, as Pillow does; nothing is smoothed.
        return F.interpolate(y, scale_factor=self.factor, mode="bicubic", antialias=True)

    def admissible(self, image: Tensor) -> Tensor:
        """The centre of the image, with sides that are multiples of the factor."""
        height, width = (side - side % self.factor for side in image.shape[-2:])
        if min(height, width) == 0:
            raise ValueError(
                f"the downsampling factor {self.factor} is larger than the image, "
                f"{image.shape[-2]}×{image.shape[-1]}; take a smaller one"
            )
        top, left = (image.shape[-2] - height) // 2, (image.shape[-1] - width) // 2
        return image[..., top : top + height, left : left + width]

    def reach(self) -> tuple[int, int] | None:
        pixels = math.ceil((self.profile.shape[0] - self.factor) / 2 / self.factor)
        return pixels, pixels

    def extra_repr(self) -> str:
        return f"factor={self.factor}, taps={self.profile.shape[0]}"


def _lanczos(lobes: int) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.sinc(t) * torch.sinc(t / lobes)


def _bicubic(t: Tensor) -> Tensor:
    t = t.abs()  # Keys 1981, a = −1/2
    near = 1.5 * t**3 - 2.5 * t**2 + 1
    far = -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2
    return torch.where(t < 1, near, far)


# Support on either side, in pixels of the small image, and weight as a function of distance.
RESAMPLING: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "lanczos2": (2, _lanczos(2)),
    "lanczos3": (3, _lanczos(3)),
    "bicubic": (2, _bicubic),
    "box": (0.5, torch.ones_like),
}


class Mask(Operator):
    """Keeps the known pixels and sets the others to 0: inpainting.

    Args:
        mask: 1 or True where a pixel is known, 0 elsewhere, of the image's size: an array (H, W) or
            (H, W, C), a tensor (H, W), (1, 1, H, W) or (1, C, H, W), with one mask per channel, or
            an image file in which white is known. A file is thresholded at half of its brightest
            value, and refused if many of its values are grey. Of a file in two colours, such as red
            on white, the brighter one is known; if its colours are all the same, its opaque pixels
            are known.
        keep_fraction: Without a mask, fraction of pixels in (0, 1] to keep, drawn at random, to
            simulate a measurement.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The mask has another size, grey values, or no known pixel.

    >>> mask = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    >>> Mask(mask)(torch.full((1, 1, 2, 2), 0.5)).flatten().tolist()
    [0.5, 0.0, 0.0, 0.5]
    """

    mask: Tensor | None

    def __init__(
        self,
        mask: Tensor | np.ndarray | str | os.PathLike | None = None,
        keep_fraction: float | None = None,
    ) -> None:
        super().__init__()
        if mask is None and keep_fraction is None:
            raise ValueError(
                "Mask needs mask, an image in which known pixels are white, or keep_fraction to "
                "simulate missing pixels"
            )
        if keep_fraction is not None and not 0 < keep_fraction <= 1:
            raise ValueError(f"keep_fraction must be in (0, 1], got {keep_fraction}; 0.5 is half")
        if mask is not None:
            if isinstance(mask, (str, os.PathLike)):
                mask = _read_mask(mask)
            if isinstance(mask, np.ndarray):
                mask = torch.from_numpy(mask.copy())  # it may be read-only
                mask = mask.movedim(-1, 0)[None] if mask.ndim == 3 else mask  # (H, W, C)
            mask = torch.as_tensor(mask)
            mask = mask[None, None] if mask.ndim == 2 else mask
            _check_mask(mask)
        self.keep_fraction = keep_fraction
        _keep(self, "mask", None if mask is None else mask.float())

    def forward(self, x: Tensor) -> Tensor:
        self.image_shape(tuple(x.shape))
        assert self.mask is not None
        return x * self.mask

    def image_shape(self, measurement_shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.mask is None:
            raise ValueError(
                "keep_fraction simulates missing pixels; with a measurement give the mask "
                "(data.operator.mask), an image in which known pixels are white"
            )
        channels, height, width = (1, 1, *measurement_shape)[-3:]
        shapes = dict.fromkeys([(1, 1, height, width), (1, channels, height, width)])
        if tuple(self.mask.shape) not in shapes:
            got, wanted = self.mask.shape, " or ".join(map(str, dict.fromkeys([1, channels])))
            raise ValueError(
                f"mask must have the image's {height}×{width} pixels and {wanted} "
                f"channel{'s' * (channels > 1)}, got "
                f"{got[-2]}×{got[-1]} pixels and {got[1]}; save it at the image's size, without "
                "smoothing"
            )
        return measurement_shape

    def inverse_gram(self, residual: Tensor, epsilon: float) -> Tensor:
        return self(residual) / (1 + epsilon)

    def first_guess(self, y: Tensor) -> Tensor:
        """The known pixels; missing ones are the mean of known pixels around, coarse to fine."""
        return y if self.mask is None else _fill(y, self.mask.to(y).expand_as(y))

    def keep_known(self, image: Tensor, y: Tensor) -> Tensor:
        return image if self.mask is None else torch.where(self.mask.bool(), y, image)

    @property
    def observed(self) -> Tensor | None:
        return self.mask

    def drawn(self, image_shape: tuple[int, ...], generator: torch.Generator) -> "Mask":
        """The operator itself, or without a mask one with `keep_fraction` of the pixels."""
        if self.mask is not None:
            return self
        assert self.keep_fraction is not None
        _, _, height, width = image_shape
        order = torch.randperm(height * width, generator=generator).view(1, 1, height, width)
        return Mask(order < max(1, round(self.keep_fraction * height * width)))

    def reach(self) -> tuple[int, int] | None:
        return 0, 0

    def cropped(self, region: Region) -> "Mask":
        if self.mask is None:
            return self
        mask = region.of(self.mask)
        if not mask.any():
            raise ValueError(
                f"no pixel is known in the region {list(region)} [top, left, height, width] of the "
                "image; use larger tiles, or restore the image whole"
            )
        return Mask(mask)

    def extra_repr(self) -> str:
        if self.mask is None:
            return f"keep_fraction={self.keep_fraction}"
        shares = ", ".join(f"{float(share):.1%}" for share in self.mask.mean(dim=(0, 2, 3)))
        return f"{self.mask.shape[-2]}×{self.mask.shape[-1]}, {shares} known"


class Radon(Operator):
    """Projections of the image at a set of angles: parallel-beam tomography.

    The geometry is that of `skimage.transform.radon`, whose values are divided here by the
    number of detectors: a projection is the mean along its ray, and the sinogram
    (1, C, detectors, angles) is in [0, 1] like the image.

    All angles are sampled at once with torch's grid sampling, so that the angles are on the device
    and can be learned. It takes about 12 bytes per angle and detector², 16 MB for 60 angles and
    128×128 pixels.

    Args:
        angles: Angles in degrees, or their number, spread evenly over 180°.
        circle: Whether the object lies within the circle inscribed in the image, with as many
            detectors as image rows, as tomographs record it. Otherwise the detectors span the
            image's diagonal.

    Raises:
        ValueError: There are no angles, the image is not square, or the sinogram has another
            number of angles.

    >>> Radon(60)(torch.rand(1, 1, 33, 33)).shape
    torch.Size([1, 1, 47, 60])
    """

    keeps_units = False
    angles: Tensor

    def __init__(self, angles: int | Sequence[float] | Tensor = 60, circle: bool = False) -> None:
        super().__init__()
        if isinstance(angles, Integral):
            angles = int(angles)
            angles = torch.arange(max(0, angles)) * (180 / max(1, angles))
        angles = angles if isinstance(angles, Tensor) else torch.tensor(as_plain(angles))
        if angles.ndim != 1 or angles.numel() == 0 or not angles.isfinite().all():
            raise ValueError(
                "expected at least one angle in degrees, or the number of angles, got "
                f"{angles.tolist()}"
            )
        self.circle = circle
        _keep(self, "angles", angles if isinstance(angles, nn.Parameter) else angles.float())

    def forward(self, x: Tensor) -> Tensor:
        side = x.shape[-1]
        if x.shape[-2] != side:
            raise ValueError(
                f"Radon needs a square image, got {x.shape[-2]}×{side}; pad it with zeros "
                "(Radon.admissible)"
            )
        if not self.circle:
            before = self._detectors(side) // 2 - side // 2
            after = self._detectors(side) - side - before
            x = F.pad(x, (before, after, before, after))
        size, count = x.shape[-1], self.angles.numel()
        # Offsets from pixel size // 2, the centre of rotation, in pixels.
        offsets = torch.arange(size, device=x.device) - size // 2
        turn = torch.deg2rad(self.angles)[:, None, None]
        cos, sin = turn.cos(), turn.sin()
        across = cos * offsets + sin * offsets[:, None]  # (angles, size, size)
        down = cos * offsets[:, None] - sin * offsets
        grid = (2 * (torch.stack([across, down], dim=-1) + size // 2) + 1) / size - 1  # in [−1, 1]
        turned = F.grid_sample(x.expand(count, -1, -1, -1), grid, align_corners=False)
        return turned.mean(dim=2).permute(1, 2, 0)[None]  # (1, C, detectors, angles)

    def image_shape(self, measurement_shape: tuple[int, ...]) -> tuple[int, ...]:
        *leading, detectors, count = measurement_shape
        if count != self.angles.numel():
            raise ValueError(
                f"the sinogram must be (detectors, angles) with {self.angles.numel()} angles, "
                f"got {detectors}×{count}; set angles to its angles, or transpose it"
            )
        side = detectors if self.circle else math.floor(detectors / math.sqrt(2))
        if detectors != self._detectors(side):
            raise ValueError(
                f"no square image has a diagonal of {detectors} detectors; set "
                "data.operator.circle to true if there are as many detectors as image rows, or pad "
                "the sinogram"
            )
        return (*leading, side, side)

    def inverse_gram(self, residual: Tensor, epsilon: float) -> Tensor:
        """r filtered along the detectors by 1 / (g + ε), g = P / (π D² |ω|): a ramp.

        P angles spread over 180° and D detectors, ω in cycles per detector: by the projection-slice
        theorem the eigenvalues of A Aᵀ for a sinogram that an image can have, if the angles are
        dense. So this approximates (A Aᵀ + ε I)⁻¹ r.
        """
        detectors, count = residual.shape[-2:]
        size = 2 * detectors  # extended by zeros, so that the ends do not meet
        frequency = torch.fft.rfftfreq(size, device=residual.device).clamp(min=0.25 / size)
        gram = count / (math.pi * detectors**2 * frequency)
        spectrum = torch.fft.rfft(residual, n=size, dim=-2)
        filtered = torch.fft.irfft(spectrum / (gram + epsilon)[:, None], n=size, dim=-2)
        return filtered[..., :detectors, :]

    def largest_gain(self, y: Tensor) -> float:
        """The number of detectors: a projection is the mean along its ray."""
        return float(y.shape[-2])

    def first_guess(self, y: Tensor) -> Tensor:
        """Filtered back-projection with the ramp filter, by scikit-image."""
        *_, side = self.image_shape(tuple(y.shape))
        angles = self.angles.detach().cpu().double().numpy()
        sums = y[0].detach().cpu().double().numpy() * y.shape[-2]  # (C, detectors, angles)
        images = [iradon(s, angles, output_size=side, circle=self.circle) for s in sums]
        return torch.from_numpy(np.stack(images))[None].to(y)

    def admissible(self, image: Tensor) -> Tensor:
        """The image centred in a square of zeros."""
        height, width = image.shape[-2:]
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        return F.pad(image, (left, side - width - left, top, side - height - top))

    def _detectors(self, side: int) -> int:
        return side if self.circle else math.ceil(math.sqrt(2) * side)

    def extra_repr(self) -> str:
        span = f"{float(self.angles.min()):.4g}° to {float(self.angles.max()):.4g}°"
        return f"{self.angles.numel()} angles, {span}, circle={self.circle}"


class Observed(Operator):
    """Another operator, whose measurement was only partly observed.

    Args:
        operator: The operator.
        mask: 1 where its measurement was observed, 0 elsewhere, (1, 1, H, W) or (1, C, H, W).
    """

    mask: Tensor

    def __init__(self, operator: Operator, mask: Tensor) -> None:
        super().__init__()
        self.operator = operator
        self.keeps_units = operator.keeps_units
        self.factor = operator.factor
        self.overshoots = operator.overshoots
        _keep(self, "mask", mask.float())

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "kernel":
            _check_own(self, "operator", name)
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(x) * self.mask

    def image_shape(self, measurement_shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.operator.image_shape(measurement_shape)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.operator.adjoint(y * self.mask)

    def inverse_gram(self, residual: Tensor, epsilon: float) -> Tensor:
        """That of the operator, on r with zeros where nothing was observed: an approximation."""
        return self.operator.inverse_gram(residual * self.mask, epsilon) * self.mask

    def first_guess(self, y: Tensor) -> Tensor:
        """The operator's first guess, with unobserved values filled from those around."""
        return self.operator.first_guess(_fill(y, self.mask.expand_as(y)))

    def keep_known(self, image: Tensor, y: Tensor) -> Tensor:
        known = self.operator.keep_known(image, y)
        is_image = self.mask.shape[-2:] == image.shape[-2:]
        return torch.where(self.mask.bool(), known, image) if is_image else known

    def nearest(self, y: Tensor, measured: Tensor) -> Tensor:
        return self.operator.nearest(y, measured)

    def fitted(self, y: Tensor) -> Operator:
        if isinstance(self.operator, Observed):  # of a part, whose operator was fitted
            return self
        if unknown_blur(self.operator) is not None:
            y = _fill(y, self.mask.to(y).expand_as(y))
        return Observed(self.operator.fitted(y), self.mask)

    @property
    def observed(self) -> Tensor:
        within = self.operator.observed
        return self.mask if within is None else self.mask * within

    def reach(self) -> tuple[int, int] | None:
        return self.operator.reach()

    def cropped(self, region: Region) -> "Observed":
        measured = region.measured(self.factor)
        return Observed(self.operator.cropped(region), measured.of(self.mask))

    def __repr__(self) -> str:
        return f"{self.operator}, {float(self.mask.mean()):.1%} observed"


def without(operator: Operator, missing: Tensor) -> Operator:
    """The operator for a measurement in which values are missing.

    Args:
        operator: The operator.
        missing: True where a value is missing, of the measurement's shape, (1, C, H, W).
    """
    observed = ~(missing[:, :1] if (missing == missing[:, :1]).all() else missing)
    if isinstance(operator, Identity):
        return Mask(observed)
    if isinstance(operator, Mask) and operator.mask is not None:
        return Mask(observed * operator.mask)
    return Observed(operator, observed)


class Physics(Protocol):
    """A linear operator with an adjoint, such as deepinv's."""

    def A(self, x: Tensor) -> Tensor: ...

    def A_adjoint(self, y: Tensor) -> Tensor: ...


class Adapted(Operator):
    """Adapts any object with `A(x)` and its adjoint `A_adjoint(y)`, such as deepinv's operators.

    Gradients reach the image through `A_adjoint`, so A need not be differentiable, and its own
    parameters get no gradient. With the back-projection every θ-step takes 30 more pairs of A and
    `A_adjoint`, and the choice of ε some 500. `as_operator` applies it where such an object is
    given.
    """

    keeps_units = False  # not known

    def __init__(self, physics: Physics) -> None:
        super().__init__()
        self.physics = physics

    def __setattr__(self, name: str, value: Any) -> None:
        _check_own(self, "physics", name)
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return _ByAdjoint.apply(x, self.physics)

    def adjoint(self, y: Tensor) -> Tensor:
        return _real(self.physics.A_adjoint(y))

    @torch.no_grad()
    def image_shape(self, measurement_shape: tuple[int, ...]) -> tuple[int, ...]:
        zeros = torch.zeros(measurement_shape, device=_device_of(self))
        return tuple(self.physics.A_adjoint(zeros).shape)

    def first_guess(self, y: Tensor) -> Tensor:
        return _scaled_adjoint(self, y)


def _device_of(operator: Operator) -> torch.device | None:
    return next((t.device for t in (*operator.parameters(), *operator.buffers())), None)


@torch.no_grad()
def check_adjoint(operator: Operator, y: Tensor) -> None:
    """Test an operator's adjoint, ⟨A x, v⟩ = ⟨x, Aᵀ v⟩ with v = A x and a random v.

    Args:
        operator: The operator.
        y: A measurement, whose shape and device are used.

    Raises:
        ValueError: A_adjoint is not the adjoint of A.
    """
    shape, generator = operator.image_shape(tuple(y.shape)), torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, device="cpu").to(_device_of(operator) or y.device)
    measured = operator(x)
    if measured.shape != y.shape:
        raise ValueError(
            f"the operator's A must return {tuple(y.shape)} like the measurement, got "
            f"{tuple(measured.shape)} for an image of {shape}, the shape that A_adjoint returns"
        )
    expected, got = float(measured.square().sum()), float((x * operator.adjoint(measured)).sum())
    if not abs(got - expected) <= MISMATCH * expected:
        raise ValueError(
            "the operator's A_adjoint is not the adjoint of its A, so the fit would follow a "
            f"wrong gradient: expected ⟨x, A_adjoint(A(x))⟩ = ⟨A(x), A(x)⟩ = {expected:.6g}, "
            f"got {got:.6g}; correct A_adjoint (it is neither an inverse nor a pseudo-inverse)"
        )
    v = torch.randn(measured.shape, generator=generator, device="cpu").to(measured)
    expected, got = float((measured * v).sum()), float((x * operator.adjoint(v)).sum())
    spread = float(measured.norm() * v.norm()) / math.sqrt(v.numel())  # of random ⟨A x, v⟩
    if not abs(got - expected) <= 10 * MISMATCH * spread:
        raise ValueError(
            "the operator's A_adjoint is not the adjoint of its A: expected ⟨x, A_adjoint(v)⟩ "
            f"= ⟨A(x), v⟩ = {expected:.6g} for a random v, got {got:.6g}; correct A_adjoint, "
            "which must transpose every step of A, also a mask"
        )


class _ByAdjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, physics: Physics) -> Tensor:
        ctx.physics = physics
        return physics.A(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _real(ctx.physics.A_adjoint(gradients[0])), None


def _check_own(wrapper: Operator, inner: str, name: str) -> None:
    """Raise AttributeError if an attribute of the wrapped object is set on its wrapper."""
    wrapped = getattr(wrapper, inner, None)
    if wrapped is not None and not hasattr(wrapper, name) and hasattr(wrapped, name):
        raise AttributeError(
            f"{name} is an attribute of the operator that was given: set operator.{inner}.{name}"
        )


def _real(image: Tensor) -> Tensor:
    return image.real if image.is_complex() else image


class RealParts(Operator):
    """The real and imaginary parts, (..., 2), of an operator's complex measurement, (...).

    Args:
        operator: A linear map from real images to complex measurements.
    """

    keeps_units = False

    def __init__(self, operator: Operator) -> None:
        super().__init__()
        self.operator = operator

    def __setattr__(self, name: str, value: Any) -> None:
        _check_own(self, "operator", name)
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(self.operator(x))

    def adjoint(self, y: Tensor) -> Tensor:
        if type(self.operator).adjoint is Operator.adjoint:
            return super().adjoint(y)
        return _real(self.operator.adjoint(torch.view_as_complex(y.contiguous())))

    def image_shape(self, measurement_shape: tuple[int, ...]) -> tuple[int, ...]:
        shape = measurement_shape[:-1]
        if not isinstance(self.operator, Adapted):
            return self.operator.image_shape(shape)
        zeros = torch.zeros(shape, dtype=torch.complex64, device=_device_of(self))
        return tuple(self.operator.adjoint(zeros).shape)

    @property
    def observed(self) -> Tensor | None:
        within = self.operator.observed
        return None if within is None else within[..., None]

    def first_guess(self, y: Tensor) -> Tensor:
        return _scaled_adjoint(self, y)

    def __repr__(self) -> str:
        return f"{self.operator}, complex"


def is_adapted(operator: Operator) -> bool:
    """Whether it is an object with `A` and `A_adjoint`."""
    return isinstance(operator.operator if isinstance(operator, RealParts) else operator, Adapted)


@torch.no_grad()
def _scaled_adjoint(operator: Operator, y: Tensor) -> Tensor:
    """Aᵀ y, scaled to fit y best: one step of steepest descent from 0."""
    back = operator.adjoint(y)
    explained = operator(back)
    return back * ((explained * y).sum() / explained.square().sum().clamp(min=1e-20))


def as_operator(operator: Operator | Physics | None) -> Operator:
    """Convert to an `Operator`: objects with `A` and `A_adjoint` are adapted, None is the identity.

    Raises:
        ValueError: It is neither.
    """
    if operator is None:
        return Identity()
    if isinstance(operator, Operator):
        return operator
    if callable(getattr(operator, "A", None)) and callable(getattr(operator, "A_adjoint", None)):
        return Adapted(operator)
    raise ValueError(
        "operator must be one of deepred_pl.operators, derived from Operator, or have methods A "
        f"and A_adjoint, got {type(operator).__name__}"
    )


def _extended(x: Tensor, dim: int, by: int, boundary: Boundary) -> Tensor:
    """x with `by` more values at both ends of an axis.

    `F.pad` adds up its gradient in an order that varies on a GPU, or refuses to be deterministic.
    """
    size = x.shape[dim]
    if boundary in ("reflect", "unknown"):
        before, after = x.narrow(dim, 1, by).flip(dim), x.narrow(dim, size - 1 - by, by).flip(dim)
    else:
        shape = list(x.shape)
        shape[dim] = by
        before, after = (x.narrow(dim, at, 1).expand(shape) for at in (0, size - 1))
    if boundary == "zero":
        before, after = torch.zeros_like(before), torch.zeros_like(after)
    return torch.cat([before, x, after], dim)


def _keep(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Register a parameter, or else a buffer, which is not saved: the settings define it."""
    if isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    else:
        module.register_buffer(name, value, persistent=False)


def _check_size(size: int) -> None:
    if size < 1 or size % 2 == 0:
        raise ValueError(
            f"the blur kernel's size must be odd and at least 1, got {size}; use {abs(size) | 1}"
        )


def _check_kernel(kernel: Tensor) -> None:
    shape = "×".join(map(str, kernel.shape))
    if kernel.ndim != 2 or kernel.numel() == 0:
        raise ValueError(f"the blur kernel must be rows × columns, got {shape or 'a number'}")
    even = kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0
    if even and isinstance(kernel, nn.Parameter):
        raise ValueError(
            f"a blur kernel that is learned must have odd sides, got {shape}; append a row or "
            "column of zeros at the end"
        )
    if not kernel.isfinite().all() or not kernel.sum() > 0:
        raise ValueError(
            f"the blur kernel must be finite with a positive sum, got {float(kernel.sum()):g}; "
            "check the file and its values"
        )


def _without_rounding(kernel: Tensor) -> Tensor:
    """The kernel without values that differ from 0 only by rounding."""
    return torch.where(kernel < 1e-9 * kernel.max(), 0, kernel)


def _centred(kernel: Tensor) -> Tensor:
    """The kernel with odd sides, its centre in the middle, and without zeros all around."""
    rows, columns = kernel.shape
    kernel = F.pad(kernel, (0, 1 - columns % 2, 0, 1 - rows % 2))
    while kernel.shape[0] > 1 and not kernel[[0, -1]].any():
        kernel = kernel[1:-1]
    while kernel.shape[1] > 1 and not kernel[:, [0, -1]].any():
        kernel = kernel[:, 1:-1]
    return kernel


def _check_mask(mask: Tensor) -> None:
    if mask.ndim != 4 or mask.shape[0] != 1:
        raise ValueError(
            "mask must be an array (H, W) or (H, W, C), or a tensor (H, W), (1, 1, H, W) or "
            f"(1, C, H, W), got {tuple(mask.shape)}"
        )
    grey = (mask != 0) & (mask != 1)
    if grey.any():
        raise ValueError(
            f"mask must be 1 where a pixel is known and 0 elsewhere, got {int(grey.sum())} other "
            f"values of up to {float(mask.max()):g}; threshold it first, as in mask > "
            f"{float(mask.max()) / 2:g}"
        )
    if not mask.any():
        raise ValueError("mask has no known pixel; known pixels are white (1): invert it")


def _axes_of(path: str | os.PathLike) -> str | None:
    """The axes of an NPY array with three, (H, W, C), which masks and kernels always have."""
    with suppress(OSError, ValueError):  # another kind of file, or none
        return {3: "YXC"}.get(np.load(path, mmap_mode="r", allow_pickle=False).ndim)
    return None


def _read_mask(path: str | os.PathLike) -> Tensor:
    # For any bit depth; white may be 1 or 255.
    picture, image_format = read_image(path, [0, 1], axes=_axes_of(path))
    alpha = image_format.alpha
    if alpha is not None and (picture == picture[..., :1, :1]).all():
        picture = torch.from_numpy(alpha.astype(np.float32))[None, None]
    picture = picture / picture.max().clamp(min=1e-6)
    if picture.shape[1] == 3 and (picture != picture[:, :1]).any():
        picture = _in_two_colours(picture, path)
    grey = float(((picture > 0.1) & (picture < 0.9)).float().mean())
    if grey > MOST_GREY:
        raise ValueError(
            f"expected a black-and-white mask with known pixels white, but {grey:.0%} of {path} "
            "is grey; threshold it"
        )
    known = picture > 0.5
    return known[:, :1] if (known == known[:, :1]).all() else known


def _in_two_colours(picture: Tensor, path: str | os.PathLike) -> Tensor:
    """The brighter of two colours as white, (1, 1, H, W); a mask per channel is left as it is."""
    bright = (picture > 0.4).long()
    colours = bright[:, :1] + 2 * bright[:, 1:2] + 4 * bright[:, 2:]  # (1, 1, H, W), 0 is black
    count = len(colours.flatten().bincount().nonzero())
    if count == 2:
        weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)  # of luminance
        brightness = (picture * weights).sum(dim=1, keepdim=True)
        return (brightness > (brightness.min() + brightness.max()) / 2).float()
    # Labels have areas of one colour on a background; a mask per channel has not.
    coloured = (colours > 0) & (colours < 7)
    alike = (colours[..., 1:] == colours[..., :-1]) & coloured[..., 1:]
    if (colours == 0).any() and alike.sum() > 0.5 * coloured.sum():
        raise ValueError(
            f"expected a black-and-white mask with known pixels white, got {count} colours in "
            f"{path}; save it in black and white"
        )
    return picture


def _fill(y: Tensor, known: Tensor) -> Tensor:
    """y where `known` is 1; elsewhere the mean of known pixels at the finest scale that has any."""
    if known.bool().all() or y.shape[-2:] == (1, 1):
        return y
    counts = F.avg_pool2d(known, 2, ceil_mode=True)
    means = F.avg_pool2d(y * known, 2, ceil_mode=True) / counts.clamp(min=1e-6)
    coarse = _fill(means, (counts > 0).to(y))
    size = y.shape[-2:]
    return torch.where(known.bool(), y, F.interpolate(coarse, size, mode="bilinear"))
