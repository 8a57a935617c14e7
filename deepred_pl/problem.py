"""The inverse problem: measurement, forward operator and noise model."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from deepred_pl.metrics import MetricOn
from deepred_pl.noise import NoiseModel, mean_over
from deepred_pl.operators import (
    Observed,
    Operator,
    Physics,
    RealParts,
    as_operator,
    check_adjoint,
    is_adapted,
    unknown_blur,
)
from deepred_pl.tiles import Region, Tiling, cut
from deepred_pl.torch_state import default_settings

LEAST_VARIANCE = 1e-10  # every value has been rounded
LEAST_HELD_OUT = 64  # values, which give a PSNR to within some tenths of a decibel
BRIGHTEST = 3.0  # mean that no measurement of an image in [0, 1] has, even with speckle


class InverseProblem(nn.Module):
    """y = A x + noise, for one image x.

    Args:
        y: The measurement; for an image (1, C, H, W), float, in [0, 1] up to noise. Values that the
            operator does not observe are set to 0, but not those next to an unknown boundary. A
            complex measurement, as in magnetic resonance imaging, is kept as its real and imaginary
            parts, (..., 2), each with the noise; the given operator is then `operator.operator`.
        operator: A (see `deepred_pl.operators`), or an object with `A` and `A_adjoint`; None is
            the identity. Its parameters and buffers become float32.
        noise: The noise model; None means the mean squared residual as data term. Parameters left
            open (sigma=None) are estimated from y.
        ground_truth: The true x if it is known, of the image's shape. It is only used by metrics,
            and not saved with the problem.
        metric_on: Whether PSNR and SSIM of colour images compare "rgb" or "luminance".
        limits: The least value of x, at most 0, and the largest, at least 1: [0, 1] is the scale of
            all weights and noise levels, but x may leave it as far as this.

    Attributes:
        image_shape: (1, C, H, W) of x.
        clipped_to: The range (low, high) to which the measurement was clipped, infinite where it
            was not.
        held_out: 1 where a value is held out (`hold_out`), broadcastable to y; None if none is.

    Raises:
        ValueError: y or ground_truth is not a finite float tensor of a suitable shape and range,
            operator or noise is another kind of object, or an object's `A_adjoint` is not the
            adjoint of its `A`.

    >>> problem = InverseProblem(torch.rand(1, 3, 33, 47))
    >>> problem.image_shape
    (1, 3, 33, 47)
    """

    operator: Operator
    noise: NoiseModel | None
    y: Tensor
    ground_truth: Tensor | None
    held_out: Tensor | None
    _held_out_y: Tensor | None
    _clipped_at: Tensor

    @default_settings()
    def __init__(
        self,
        y: Tensor,
        operator: Operator | Physics | None = None,
        noise: NoiseModel | None = None,
        ground_truth: Tensor | None = None,
        metric_on: MetricOn = "rgb",
        limits: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        _check("y", y)
        if not (math.isfinite(limits[1] - limits[0]) and limits[0] <= 0 and limits[1] >= 1):
            raise ValueError(
                "limits are the least and the largest value of x, expected at most 0 and at least "
                f"1, got {limits}"
            )
        check_noise_model(noise)
        self.operator = as_operator(operator)
        if y.is_complex():
            if operator is None:
                raise ValueError(
                    "a complex measurement needs an operator, such as a Fourier transform that is "
                    "derived from Operator"
                )
            if None in (getattr(noise, "sigma", 0), getattr(noise, "peak", 0)):
                raise ValueError(
                    "the noise of a complex measurement cannot be estimated: state it, as in "
                    "GaussianNoise(sigma), the standard deviation of each of its two parts"
                )
            self.operator, y = RealParts(self.operator), torch.view_as_real(y.resolve_conj())
        _make_usable(self.operator)
        self.image_shape: tuple[int, ...] = self.operator.image_shape(tuple(y.shape))
        if len(self.image_shape) != 4:
            raise ValueError(
                f"y must be the measurement of an image (1, C, H, W), got {tuple(y.shape)}, which "
                f"{type(self.operator).__name__} measures of {self.image_shape}; add the missing "
                "axes"
            )
        if is_adapted(self.operator):
            check_adjoint(self.operator, y)
        self._check_scale(y, limits[1])
        observed = self.operator.observed
        if observed is not None:
            y = y * observed.to(y)
        self.operator = self.operator.fitted(y)
        self.noise = None if noise is None else noise.fitted(y, self.operator.observed)
        if self.noise is not None:
            _make_usable(self.noise)
        self.metric_on = metric_on
        self.limits = float(limits[0]), float(limits[1])
        if ground_truth is not None:
            _check("ground_truth", ground_truth)
            if tuple(ground_truth.shape) != self.image_shape:
                raise ValueError(
                    f"ground_truth must be {self.image_shape} like the measured image, got "
                    f"{tuple(ground_truth.shape)}; use two files of the same scene"
                )
        self.register_buffer("y", y.detach().clone().float())
        truth = None if ground_truth is None else ground_truth.detach().clone().float()
        self.register_buffer("ground_truth", truth, persistent=False)
        self.register_buffer("held_out", None, persistent=False)
        self.register_buffer("_held_out_y", None, persistent=False)
        self._clip_to(*self._clipping(y))

    @torch.no_grad()
    def _check_scale(self, y: Tensor, brightest: float) -> None:
        """Refuse the measurement of an image whose white is 255 rather than 1."""
        if not self.operator.keeps_units or (mean := float(y.mean())) <= BRIGHTEST * brightest:
            return
        white = float(self.operator(torch.ones(self.image_shape, device=y.device)).mean())
        if mean > BRIGHTEST * brightest * white:  # which is more than 1 if the operator sums
            raise ValueError(
                f"y must be in [0, 1] up to noise, but its mean is {mean:.3g}; divide it by the "
                "value of white, which is 255 for 8 bits"
            )

    def _clip_to(self, low: float, high: float) -> None:
        self.clipped_to = low, high
        at = self.clipped().flatten().nonzero().squeeze(1)  # nonzero waits for a GPU
        self.register_buffer("_clipped_at", at, persistent=False)

    def _clipping(self, y: Tensor) -> tuple[float, float]:
        # A measurement within [0, 1] was clipped; counts and speckle are never negative anyway.
        if isinstance(self.operator, RealParts):
            return -math.inf, math.inf
        if self.noise is None:
            below = above = self.operator.overshoots
        else:
            below, above = bool((self.noise.variance(y.new_zeros(())) > 0).all()), True
        low = 0.0 if below and y.min() >= 0 else -math.inf
        return low, 1.0 if above and y.max() <= 1 else math.inf

    def clipped(self) -> Tensor:
        """Which values of y were clipped, of its shape; False for noise with outliers."""
        if self.noise is not None and self.noise.has_outliers:
            return torch.zeros_like(self.y, dtype=torch.bool)
        low, high = self.clipped_to
        return (self.y <= low) | (self.y >= high)

    @torch.no_grad()
    def completed(self, measured: Tensor) -> Tensor:
        """y with clipped values replaced by their mean before clipping at A x = `measured`.

        Noise near black and white is clipped at one side, so that the measurement's mean is not
        A x. With these values instead, the data term has the gradient of the clipped measurement's
        likelihood (Tobin 1958), as the score of incomplete data is the mean score of the complete
        data (Dempster et al. 1977). This is exact for Gaussian noise; other models are taken as
        normal with their variance, except those with outliers, for which y is returned.

        Without noise, A x itself may have been clipped: the filter of an operator that `overshoots`
        often leads to values below 0 or above 1 next to sharp edges, where files store 0 or 1.
        There `measured` replaces y where it lies beyond the same limit. Of rounded values it is the
        nearest that is rounded to y.

        Args:
            measured: A x, of y's shape.
        """
        at = self._clipped_at
        if len(at) == 0:
            return self.operator.nearest(self.y, measured)
        low, high = self.clipped_to
        y = self.y.flatten()  # (N,)
        clean = measured.flatten().index_select(0, at).float()  # (clipped,)
        bright = y.index_select(0, at) >= high
        if self.noise is None:
            mean = torch.where(bright, clean.clamp(min=high), clean.clamp(max=low))
        else:
            variance = self.noise.variance(clean)
            if variance.ndim > 1:  # (1, C, 1, 1), one for each channel
                channel = at // math.prod(self.y.shape[2:])
                variance = variance.flatten().index_select(0, channel)
            sigma = variance.clamp(min=LEAST_VARIANCE).sqrt()
            # Of Python's numbers torch makes the default type, which may be float64.
            sign = (2.0 * bright - 1).to(clean.dtype)
            beyond = sign * (clean - torch.where(bright, high, low).to(clean.dtype)) / sigma
            mean = clean + sign * sigma * _inverse_mills(beyond)
        return y.index_copy(0, at, mean).view_as(self.y)

    def data_term(self, out: Tensor) -> Tensor:
        """D(A out, y) in squared-error units, 0-dim; `out` is (1, C, H, W).

        Without noise, `residual`. A out is compared with `completed`, so that the gradient is that
        of the likelihood also where y was clipped.
        """
        if self.noise is None:
            return self.residual(out)
        measured = self.operator(out)
        mean_variance, observed = self.noise_variance(), self.operator.observed
        assert mean_variance is not None
        return self.noise.data_term(measured, self.completed(measured), mean_variance, observed)

    def residual(self, out: Tensor) -> Tensor:
        """mean((A out − y)²) over the observed values, 0-dim; σ² in expectation at the true x.

        Without noise, y is `completed`.
        """
        measured = self.operator(out)
        y = self.completed(measured) if self.noise is None else self.y
        return mean_over((measured - y).square(), self.operator.observed)

    def residual_ratio(self, out: Tensor) -> Tensor | None:
        """`residual` over its expectation, 0-dim: 1 if only noise is left; None without a model."""
        expected = self.expected_residual(out)
        return None if expected is None else self.residual(out) / expected

    def noise_variance(self) -> Tensor | None:
        """The noise's mean variance on the [0, 1] scale, 0-dim; None without a noise model."""
        if self.noise is None:
            return None
        return self.noise.mean_variance(self.y, self.operator.observed)

    def expected_residual(self, out: Tensor) -> Tensor | None:
        """The expectation of `residual` if `out` is the true x, 0-dim; None without a noise model.

        This is the noise's mean variance, except for measurements clipped to [0, 1]: clipping
        reduces the noise near black and white, computed here for normal distributions of the same
        variance (at σ = 25 by a tenth on an ordinary photograph).
        """
        if self.noise is None:
            return None
        sigma, a, b, within = self._clipped_moments(self.operator(out))
        clipped = torch.special.ndtr(a) * a.square() + torch.special.ndtr(-b) * b.square()
        return mean_over(sigma.square() * (within + clipped), self.operator.observed)

    def completed_variance(self, clean: Tensor) -> Tensor:
        """The variance of every value of `completed` at A x = `clean`, of its shape.

        It is that of the noise model times the share of its Fisher information that clipping to
        [0, 1] has left.

        Raises:
            ValueError: There is no noise model.
        """
        sigma, a, b, within = self._clipped_moments(clean)
        clipped = _density(a) * _inverse_mills(a) + _density(b) * _inverse_mills(-b)
        return sigma.square() * (within + clipped)

    def _clipped_moments(self, clean: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """σ, the limits a and b in units of it, and E[n² / σ²] of the values between them."""
        sigma = self.variance(clean).sqrt()
        low, high = self.clipped_to
        a = ((low - clean) / sigma).clamp(min=-20)  # where nothing is clipped
        b = ((high - clean) / sigma).clamp(max=20)
        # ∫ t² φ(t) dt over [a, b] is Φ(b) − Φ(a) − (b φ(b) − a φ(a)).
        beyond = torch.special.ndtr(a) + torch.special.ndtr(-b)
        return sigma, a, b, 1 - beyond - (b * _density(b) - a * _density(a))

    def variance(self, clean: Tensor) -> Tensor:
        """The variance of every value before clipping at A x = `clean`, of its shape.

        Raises:
            ValueError: There is no noise model.
        """
        if self.noise is None:
            raise ValueError("the variance of the measurement needs a noise model; set noise")
        return self.noise.variance(clean).clamp(min=LEAST_VARIANCE).expand_as(clean)

    @torch.no_grad()
    def first_guess(self) -> Tensor:
        """A first image, (1, C, H, W) within the limits."""
        return self.operator.first_guess(self.y).clamp(*self.limits)

    def as_image(self) -> Tensor:
        """The measurement if it is an image, else the first guess, (1, C, H, W)."""
        is_one = self.operator.keeps_units and tuple(self.y.shape) == self.image_shape
        return self._whole_y().clamp(*self.limits) if is_one else self.first_guess()

    def keep_known(self, image: Tensor) -> Tensor:
        """Put back the pixels of `image`, (1, C, H, W), that were measured without noise."""
        if self.noise is not None:
            return image
        return self._whole_operator().keep_known(image, self._whole_y())

    # Held-out values

    @default_settings()
    def hold_out(self, share: float, seed: int = 0) -> "InverseProblem":
        """The problem without a random share of the measured values, by which fits are judged.

        The returned problem treats them as not observed: nothing but `held_out_errors` and
        pictures depends on them (and the parameters of the noise model, if they were estimated).
        `release` makes them observed again.

        Args:
            share: Share of the observed values in (0, 0.5], drawn with all of their channels.
            seed: Seed of the draw.

        Raises:
            ValueError: share is out of range, or there are fewer than 64 values to hold out.
        """
        if not 0 < share <= 0.5:
            raise ValueError(f"the share of held-out values must be in (0, 0.5], got {share}")
        observed = self.operator.observed
        known = torch.ones(self.y.shape) if observed is None else observed.cpu().expand_as(self.y)
        if known.ndim >= 4:  # all channels of a pixel, and both parts of a complex value
            known = known.amax([dim for dim in range(known.ndim) if dim not in (2, 3)], True)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(known.shape, generator=generator, device="cpu")
        order = torch.where(known > 0, drawn, 2).flatten().argsort()
        held = torch.zeros(known.numel())
        held[order[: round(share * int(known.sum()))]] = 1
        held = held.view(known.shape).to(self.y.device)
        if observed is not None:
            held = held * observed  # which may be others in each channel
        values = int(held.expand_as(self.y).sum())
        if values < LEAST_HELD_OUT:
            raise ValueError(
                f"{share:.3g} of the measured values are {values}, too few to judge a fit by: "
                f"expected at least {LEAST_HELD_OUT}; hold out a larger share, or none"
            )
        partial = Observed(self.operator, 1 - held)
        truth = self.ground_truth
        rest = InverseProblem(self.y, partial, self.noise, truth, self.metric_on, self.limits)
        rest.y.copy_(self.y * (1 - held))  # also next to an unknown boundary
        rest._clip_to(*self.clipped_to)
        rest.held_out, rest._held_out_y = held, self.y * held
        return rest

    @torch.no_grad()
    def held_out_errors(self, image: Tensor) -> Tensor:
        """(A image − y)² at each held-out value, (n,), with A image clipped as y was.

        Its mean is the squared error of A image plus the noise's variance.

        Args:
            image: An estimate of x, (1, C, H, W).
        """
        assert self.held_out is not None and self._held_out_y is not None
        measured = self._whole_operator()(image).clamp(*self.clipped_to)
        at = self.held_out.bool().expand_as(self.y)
        return (measured - self._held_out_y)[at].square()

    def release(self) -> None:
        """Make the held-out values observed again."""
        if self.held_out is None:
            return
        assert isinstance(self.operator, Observed)
        self.operator.mask.fill_(1)
        self.y.copy_(self._whole_y())
        self.held_out = self._held_out_y = None
        self._clip_to(*self.clipped_to)

    def _whole_operator(self) -> Operator:
        if self.held_out is None:
            return self.operator
        assert isinstance(self.operator, Observed)
        return self.operator.operator

    def _whole_y(self) -> Tensor:
        return self.y if self._held_out_y is None else self.y + self._held_out_y

    def part(self, region: Region) -> "InverseProblem":
        """The problem of a region of the image, with the same noise.

        Values of the measurement next to a cut that depend on the image beyond it count as not
        observed.

        Raises:
            ValueError: The region is not within the image, the operator cannot be cut, or the
                region is black, so that signal-dependent noise has zero variance there.
        """
        (rows, columns), factor = self._reach(), self.operator.factor
        height, width = self.image_shape[-2:]
        region.check(height, width, factor)
        measured = region.measured(factor)
        top, left = rows * (region.top > 0), columns * (region.left > 0)
        bottom = measured.height - rows * (region.top + region.height < height)
        right = measured.width - columns * (region.left + region.width < width)
        if top >= bottom or left >= right:
            raise ValueError(
                f"a part of {region.height}×{region.width} pixels is smaller than what "
                f"{self.operator} mixes; use a larger one"
            )
        operator, y = self.operator.cropped(region), measured.of(self.y)
        observed = self.y.new_zeros(1, 1, measured.height, measured.width)
        observed[..., top:bottom, left:right] = 1
        if not observed.all():
            operator = Observed(operator, observed)
        if operator.observed is not None and not operator.observed.any():
            raise ValueError(
                f"no value was measured in the region {list(region)} [top, left, height, width] of "
                "the image; use larger tiles, or restore the image whole"
            )
        if self.noise is not None and not self.noise.mean_variance(y, operator.observed) > 0:
            raise ValueError(
                f"the region {list(region)} [top, left, height, width] of the image is black, so "
                f"{self.noise} has zero variance there; use larger tiles, or the whole image"
            )
        truth = None if self.ground_truth is None else region.of(self.ground_truth)
        part = InverseProblem(y, operator, self.noise, truth, self.metric_on, self.limits)
        part.y.copy_(y)  # also next to cuts: the data term leaves it out, the picture shows it
        part._clip_to(*self.clipped_to)
        return part

    def split(self, tile: int, overlap: int | None = None) -> tuple[Tiling, list["InverseProblem"]]:
        """Cut the image into tiles, each a problem of its own; `tiles.blend` joins the results.

        Args:
            tile: Side of a tile in pixels.
            overlap: Pixels that tiles share; None is an eighth of a tile, plus twice the margin
                that the operator mixes.

        Raises:
            ValueError: The operator cannot be cut, or has a kernel that is unknown, the overlap is
                too small, or one of the tiles is refused by `part`.
        """
        if unknown_blur(self.operator) is not None:
            raise ValueError(
                "the kernel of an unknown blur is found by one fit, not by each tile: restore the "
                "image whole, or find the kernel on a part of it, saved as an image of its own, "
                "and restore the image with that kernel"
            )
        (rows, columns), factor = self._reach(), self.operator.factor
        # The measurement in this margin depends on the image beyond the cut, and is left out.
        margin = rows * factor, columns * factor
        least = 2 * max(margin) + factor if max(margin) else 0
        if overlap is None:
            overlap = tile // 8 + 2 * max(margin)
            if overlap >= tile:
                raise ValueError(
                    f"tiles measured by {self.operator} must be larger than {overlap} pixels, got "
                    f"{tile}"
                )
        elif overlap < least:
            raise ValueError(
                f"tiles measured by {self.operator} must share at least {least} pixels, got "
                f"overlap={overlap}; leave it out"
            )
        height, width = self.image_shape[-2:]
        regions = cut(height, width, tile, overlap, factor)
        return Tiling(regions, overlap, margin), [self.part(region) for region in regions]

    def _reach(self) -> tuple[int, int]:
        reach = self.operator.reach()
        if reach is None:
            raise ValueError(
                f"{self.operator} mixes the whole image, which cannot be cut into parts; restore "
                "it whole, or if it is a blur, choose another boundary than 'circular'"
            )
        return reach

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # A fit resumed on another measurement would silently converge to a wrong image.
        saved = state_dict.get(prefix + "y")
        known = 1 if self.held_out is None else 1 - self.held_out
        if saved is not None and (
            saved.shape != self.y.shape
            or not torch.allclose((saved.to(self.y) - self.y) * known, self.y * 0, atol=1e-4)
        ):
            raise ValueError(
                f"the checkpoint's measurement, {tuple(saved.shape)}, is not this problem's, "
                f"{tuple(self.y.shape)}; resume with the same image, noise and data seed"
            )
        if saved is not None and self.held_out is not None:  # perhaps saved after `release`
            state_dict[prefix + "y"] = saved.to(self.y) * known
        super()._load_from_state_dict(state_dict, prefix, *args)


def _inverse_mills(t: Tensor) -> Tensor:
    """φ(t) / Φ(t): minus the mean of a standard normal variable known to be below t."""
    return math.sqrt(2 / math.pi) / torch.special.erfcx(-t / math.sqrt(2))


def _density(t: Tensor) -> Tensor:
    return torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi)


def check_noise_model(noise: object) -> None:
    """Raise ValueError unless it is a noise model or None."""
    if not (noise is None or isinstance(noise, NoiseModel)):
        raise ValueError(
            "noise must be one of deepred_pl.noise, derived from NoiseModel, or None, got "
            f"{noise!r}; for example GaussianNoise(sigma=25), in grey levels of 8 bits"
        )


def _make_usable(part: nn.Module) -> None:
    """Give a part of the problem values that a fit can use, whatever settings it was made in."""
    part.float()
    for module in part.modules():
        for name, value in module._buffers.items():
            if value is not None and value.is_complex():
                module._buffers[name] = value.to(torch.complex64)
            if value is not None and value.is_inference():
                module._buffers[name] = module._buffers[name].clone()  # type: ignore[union-attr]
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_inference():
                copy = parameter.detach().clone()
                module._parameters[name] = nn.Parameter(copy, parameter.requires_grad)


def _check(name: str, image: Tensor) -> None:
    if not isinstance(image, Tensor):
        raise ValueError(
            f"{name} must be a tensor (1, C, H, W), got {type(image).__name__}; "
            "deepred_pl.images.to_tensor(array)[0] converts an array (H, W) or (H, W, C)"
        )
    if image.ndim < 2 or image.shape[0] != 1 or image.numel() == 0:
        raise ValueError(f"{name} must be (1, C, H, W), one image, got {tuple(image.shape)}")
    if not (image.is_floating_point() or (image.is_complex() and name == "y")):
        remedy = "take its abs() or real" if image.is_complex() else "divide by 255"
        raise ValueError(f"{name} must be float in [0, 1], got {image.dtype}; {remedy}")
    if image.requires_grad:
        raise ValueError(
            f"{name} is stored without its gradient, so nothing could be learned through it: "
            "detach() it; what is to be learned, such as a gain, is a parameter of the operator"
        )
    if not image.isfinite().all():
        bad = int((~image.isfinite()).sum())
        raise ValueError(
            f"{name} must be finite, but {bad} of its {image.numel()} values are NaN or infinite; "
            "replace them first"
        )
