"""Choose the settings of a fit from its image, its operator and an effort."""

import json
import math
import re
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deepred_pl.callbacks import CollapseGuard, CudaGraph, KernelUpdate, Preflight, REDUpdate
from deepred_pl.checks import RestorationWarning
from deepred_pl.cli import RestorationCLI
from deepred_pl.data import RestorationDataModule
from deepred_pl.estimate import level_of_removed, local_level, noise_level, unclipped
from deepred_pl.image_format import WHITE
from deepred_pl.images import rounded_up
from deepred_pl.jpeg import JPEG
from deepred_pl.lightning import Callback, LightningModule, Trainer, quiet
from deepred_pl.metrics import GREY_LEVELS
from deepred_pl.noise import LEAST_ESTIMATE, GaussianNoise, sigma_of
from deepred_pl.operators import (
    Blur,
    Downsample,
    Identity,
    Mask,
    Observed,
    Operator,
    Radon,
    UnknownBlur,
)
from deepred_pl.problem import InverseProblem
from deepred_pl.tiles import Region

USUAL, WIDE = 32, 64  # channels of the network
# θ-steps for images of SIDE × SIDE pixels, and fewer for smaller ones; and the network's channels.
EFFORTS = {"fast": (600, USUAL), "default": (1200, USUAL), "best": (1200, WIDE)}
LEAST_STEPS, WIDE_FROM = 150, 2400  # θ-steps; if there is time for more, the network is wide
SIDE, LEAST_SHARE = 256, 0.5
WARMUP_STEPS = 30
HOLD_OUT = 0.02  # of the measured values
FINISHING = 2.0  # seconds to write the results and end the process
UPDATE_SECONDS = 1.2  # of a kernel, on 256×256 pixels or more
UNTIMED, TIMED = 10, 20  # steps that measure the time of one; whole rounds of the denoiser
FASTER = 0.9  # ratio of times, below which bfloat16 is used

# Configurations by operator.
TASKS: dict[type[Operator], str] = {
    Identity: "denoising",
    UnknownBlur: "deblurring_blind",
    Blur: "deblurring_uniform",
    Downsample: "super_resolution",
    Mask: "inpainting",
    Radon: "tomography",
    JPEG: "jpeg",
}
EXACT = ("super_resolution", "inpainting", "jpeg")  # configurations without a noise model
# They get one, and its weights, if there is that much noise in grey levels; less may be texture.
LEAST_NOISE = 7.0
NOISY = {"model.weighting": "discrepancy", "model.lam": 0.5, "model.mu": 0.5}
# The quantile of blocks of which the noise is estimated, and its ratio to the noise.
QUIETEST, BIAS = 0.1, 0.865
# The standard error of the noise behind a blur, times the root of the number of values. It is
# added: a σ that is 5 % too small may cost 2 dB, but one that is as much too large 0.2 dB.
STANDARD_ERROR = 2.6
OVERSTATED = 1.15  # ratio of stated to estimated noise, beyond which the report says so
MOST_CLIPPED = 0.01  # share of values beyond which frequencies do not show the noise
# In denoising, the least λ and μ and the noise on z for that much noise in grey levels or more.
# With less noise they would keep the network from learning detail: they fall like its variance.
STRONG_NOISE = 25.0
IN_STRONG_NOISE = {"model.lam": 0.5, "model.mu": 0.5, "model.input_noise_std": 0.1}
# In tomography, whose noise is estimated 10 to 30 % too large, and the fit gets too smooth.
OVERESTIMATED = {"model.lam": 0.7, "model.mu": 0.7}
# In deblurring, of JPEGs, whose noise is not white (`methods/likelihood`).
NOT_WHITE = {
    **{"model.fidelity": "likelihood", "model.weighting": "fixed"},
    **{"model.lam": 0.02, "model.mu": 0.04, "red.denoiser.sigma": 3},
}

# The denoiser's σ_f for a JPEG is this times the root of its `step`. Chosen at qualities 10 and 40
# on astronaut and camera, 128×128, where 8 to 12 and 4 to 8 were best.
JPEG_SIGMA = 0.9

MEANS = 1.5  # largest value of floats in [0, 1] with noise, and of means along rays
HALF = 0.5  # of 16 bits: if no value is larger, there are fewer bits
BRIGHTER = 1.5  # ratio of white to the brightest value of the smoothed back-projection
IN_CORNERS = 0.1  # of the energy of an object that is beyond the square within its circle

Assemble = Callable[[Sequence[str]], RestorationCLI]


@dataclass(frozen=True)
class Choice:
    """Chosen settings, and what they assume.

    Attributes:
        settings: Settings by their names on the command line.
        assumed: What is assumed, by the name of the setting that changes it.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    assumed: dict[str, str] = field(default_factory=dict)


def task_of(operator: Operator | None) -> str:
    """The name of the configuration for an operator; None is the identity.

    Raises:
        ValueError: There is none.
    """
    for kind, name in TASKS.items():
        if isinstance(operator, kind) or (operator is None and kind is Identity):
            return name
    raise ValueError(
        f"no configuration is known for {type(operator).__name__}; name one that is similar as "
        'task, such as ["deblurring_uniform", "methods/likelihood"]'
    )


def before_choice(task: str, given: Collection[str], effort: str) -> list[str]:
    """Options with which a configuration is set up before its settings are chosen.

    They estimate the noise, which would contradict most measurements otherwise, and have the
    largest network, by which the memory is judged.
    """
    options = []
    if not (task in EXACT or _is_given("data.noise", given)):
        options.append("--data.noise.sigma=null")
    if not _is_given("model.network", given):
        _, width = EFFORTS.get(effort, (0, WIDE))
        options += as_options(_network(width))
    return options


def seconds_of(effort: str) -> float | None:
    """The time that an effort stands for; None if it is one of `EFFORTS`.

    Raises:
        ValueError: It is neither an effort nor a time.
    """
    if effort in EFFORTS:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)", effort)
    if found is None or not float(found[1]) > 0:
        raise ValueError(
            f"effort must be {', '.join(EFFORTS)} or a time such as 90s, 5m or 1h, got {effort}"
        )
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]


def steps_and_width(effort: str, shape: Sequence[int]) -> tuple[int, int]:
    """The most θ-steps, and the network's channels, for an image of this shape, (1, C, H, W).

    If the effort is a time, the steps above which a wide network is used instead.
    """
    steps, width = EFFORTS.get(effort, (WIDE_FROM, USUAL))
    return round(steps * _share(shape)), width


def _share(shape: Sequence[int]) -> float:
    """The side of an image in units of SIDE, from LEAST_SHARE to 1."""
    return min(1.0, max(LEAST_SHARE, math.sqrt(math.prod(shape[-2:])) / SIDE))


@quiet()
def choose(
    assemble: Assemble, given: Collection[str], effort: str, seconds: float | None = None
) -> Choice:
    """Choose noise model, weights, steps, width and precision of one fit.

    Args:
        assemble: Builds the fit with additional command-line options.
        given: Names of the settings that were set explicitly, which are not chosen.
        effort: One of `EFFORTS`, or a time.
        seconds: The time for this fit; None is that of `effort`.

    Raises:
        ValueError: The measurement is impossible, or the time too short.
    """
    began = time.monotonic()
    seconds = seconds_of(effort) if seconds is None else seconds
    choice = Choice()
    cli = assemble([])
    updates = sum(c.updates for c in cli.trainer.callbacks if isinstance(c, KernelUpdate))
    finishing = FINISHING + updates * UPDATE_SECONDS
    _choose_range(cli.datamodule, given, choice)
    problem = _choose_noise(assemble, given, choice)
    steps, width = steps_and_width(effort, problem.image_shape)
    if not _is_given("model.network", given):
        choice.settings.update(_network(width))
    each = _choose_precision(assemble, problem, given, choice)
    if seconds is not None:
        end = began + seconds - finishing
        steps = _steps_until(end, steps, each, assemble, problem, given, choice)
        if steps < LEAST_STEPS and not _is_given("trainer.max_steps", given):
            needed = time.monotonic() - began + finishing + LEAST_STEPS * each
            left = max(0.0, seconds)
            raise ValueError(
                f"an effort of {effort} is too short: it leaves {left:.0f} s for this fit, "
                f"which needs {needed:.0f} s, because a step on {problem.image_shape[-2]}×"
                f"{problem.image_shape[-1]} pixels takes {each:.2g} s here, and a fit at least "
                f"{LEAST_STEPS} steps; allow more time"
            )
    if _is_given("trainer.max_steps", given):
        steps = cli.trainer.max_steps
    choice.settings["trainer.max_steps"] = steps
    choice.settings["model.lr_scheduler"] = {
        "class_path": "WarmupCosine",
        "init_args": {"total_steps": steps, "warmup_steps": min(WARMUP_STEPS, steps // 10)},
    }
    _choose_held_out(problem, given, choice)
    return _left_open(choice, given)


def _left_open(choice: Choice, given: Collection[str]) -> Choice:
    """A choice without the settings that were set explicitly."""
    settings = {k: v for k, v in choice.settings.items() if not _is_given(k, given)}
    return Choice(settings, choice.assumed)


def _steps_until(
    end: float,
    many: int,
    each: float,
    assemble: Assemble,
    problem: InverseProblem,
    given: Collection[str],
    choice: Choice,
) -> int:
    """How many steps there is time for, of a wide network if these would be more than `many`."""
    steps = int((end - time.monotonic()) / each)
    if steps <= many or _is_given("model.network", given):
        return steps
    try:
        each_wide = seconds_per_step(assemble, problem, {**choice.settings, **_network(WIDE)})
    except ValueError:  # the memory is too small
        each_wide = math.inf
    left = end - time.monotonic()
    if left / each_wide <= many / 2:
        return int(left / each)
    choice.settings.update(_network(WIDE))
    return int(left / each_wide)


def _is_given(name: str, given: Collection[str]) -> bool:
    """Whether a setting, a part of it or what it is a part of was set explicitly."""
    return any(f"{one}.".startswith(f"{name}.") or name.startswith(f"{one}.") for one in given)


def as_options(settings: Mapping[str, Any]) -> list[str]:
    """Command-line options of settings."""
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in settings.items()}
    return [f"--{name}={text}" for name, text in texts.items()]


def set_up(data: RestorationDataModule) -> InverseProblem:
    """Set up data without warnings, which its fit gives."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RestorationWarning)
        data.setup()
    assert data.problem is not None
    return data.problem


def is_denoising(data: RestorationDataModule) -> bool:
    """Whether the image is only noisy, and perhaps has missing values."""
    return data.operator is None or isinstance(data.operator, Identity)


def seconds_per_step(
    assemble: Assemble, problem: InverseProblem, settings: Mapping[str, Any]
) -> float:
    """Seconds per θ-step with the denoiser working in the background, measured by a few steps.

    Raises:
        ValueError: The memory is too small for it.
    """
    cli = assemble(as_options(settings))
    stopwatch = _Stopwatch()
    needed = CudaGraph | Preflight | REDUpdate | CollapseGuard
    kept = [c for c in cli.trainer.callbacks if isinstance(c, needed)]
    cli.trainer.callbacks, cli.trainer.loggers = [*kept, stopwatch], []
    cli.datamodule.problem = problem
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return stopwatch.step_seconds


class _Stopwatch(Callback):
    """Times the first steps, and ends the fit."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.monotonic())
        trainer.should_stop = len(self.times) > UNTIMED + TIMED

    @property
    def step_seconds(self) -> float:
        """The mean of the last steps; the first ones prepare memory."""
        timed = self.times[-TIMED - 1 :]
        return max(1e-6, (timed[-1] - timed[0]) / max(1, len(timed) - 1))


def _network(width: int) -> dict[str, Any]:
    return {"model.network": {"class_path": "SkipNet", "init_args": {"width": width}}}


def choose_for_stack(data: RestorationDataModule, given: Collection[str]) -> Choice:
    """Choose what must be the same for all pages of a file: by the one that `data` has."""
    choice = Choice()
    _choose_range(data, given, choice)
    return _left_open(choice, given)


def _choose_range(data: RestorationDataModule, given: Collection[str], choice: Choice) -> None:
    """Choose which stored values are black and white, and the geometry of a sinogram."""
    if data.measurement is None:
        return
    image, stored = data.read([0, 1], missing=True)
    image = torch.nan_to_num(image)
    largest = float(image.max())
    unbounded = largest > MEANS and stored.dtype not in ("uint8", "uint16")
    few_bits = stored.dtype == "uint16" and largest < HALF * WHITE["uint16"]
    if isinstance(data.operator, Radon):
        white = _choose_circle(data.operator, image, given, choice)
        high = float(f"{white * image.shape[-2]:.4g}") if largest > MEANS else None
        text = f"sums along rays; the restored image times {white:g} has their unit per pixel"
    else:
        is_signed = float(image.min()) < -0.1 * largest
        high = rounded_up(largest) if (unbounded or few_bits) and not is_signed else None
        text = f"black and white at 0 and {high}"
    states_white = data.noise is not None and data.noise.from_zero  # the peak of counts
    if high is not None and not states_white and not _is_given("data.intensity_range", given):
        choice.settings["data.intensity_range"] = [0, high]
        choice.assumed["data.intensity_range"] = text


def _choose_circle(
    operator: Radon, sinogram: Tensor, given: Collection[str], choice: Choice
) -> float:
    """Choose whether the object is within a circle; return its value of white.

    Args:
        operator: The operator, of which only the angles count.
        sinogram: Sums along rays, (1, C, detectors, angles).
        given: As in `choose`.
        choice: Gets the choice.
    """
    detectors = sinogram.shape[-2]
    within = Radon(operator.angles, circle=True)
    within.image_shape(tuple(sinogram.shape))  # refuses another number of angles
    guess = within.first_guess(sinogram / detectors)
    side = math.floor(detectors / math.sqrt(2))
    middle = Region.middle(detectors, detectors, side).of(guess)
    circle = operator.circle
    if not _is_given("data.operator.circle", given):
        corners = 1 - float(middle.square().sum() / guess.square().sum())
        circle = corners > IN_CORNERS or math.ceil(math.sqrt(2) * side) != detectors
        choice.settings["data.operator.circle"] = circle
        size = detectors if circle else side
        where = "within a circle" if circle else "with corners"
        choice.assumed["data.operator.circle"] = f"an object of {size}×{size} pixels, {where}"
    smooth = F.avg_pool2d(guess if circle else middle, 3)  # without noise and streaks
    return float(f"{BRIGHTER * float(smooth.quantile(0.999)):.2g}")


def _choose_noise(assemble: Assemble, given: Collection[str], choice: Choice) -> InverseProblem:
    """Choose the noise model and what depends on it; return the problem."""
    settings, assumed = choice.settings, choice.assumed
    data = assemble(as_options(settings)).datamodule
    if isinstance(data.operator, JPEG):
        problem = set_up(data)
        assert isinstance(problem.operator, JPEG)
        level = {"sigma": round(JPEG_SIGMA * math.sqrt(problem.operator.step), 1)}
        settings["red.denoiser"] = {"class_path": "NonLocalMeans", "init_args": level}
        return problem
    exact = isinstance(data.operator, Downsample | Mask)
    if not _is_given("data.noise", given):
        data.region = data.noise = None  # it is estimated here, of the whole image
        problem = set_up(data)
        try:
            sigma = _estimated_sigma(problem)
        except ValueError:  # too few neighbours are known
            if not exact:
                raise
            sigma = 0.0
        if np.mean(sigma) < LEAST_NOISE and exact:
            assumed["data.noise"] = "no noise"
        else:
            settings["data.noise"] = {"class_path": "GaussianNoise", "init_args": {"sigma": sigma}}
            assumed["data.noise"] = f"white noise of {sigma} grey levels, estimated"
            if isinstance(data.operator, Radon):
                settings.update(OVERESTIMATED)
    problem = _choose_weights(assemble, given, choice)
    if _is_given("data.noise", given) and isinstance(problem.noise, GaussianNoise) and not exact:
        _compare_with_image(problem, choice)
    return problem


def _choose_weights(assemble: Assemble, given: Collection[str], choice: Choice) -> InverseProblem:
    """Choose λ, μ, the noise on z and the data term for the noise; return the problem."""
    settings = choice.settings
    cli = assemble(as_options(settings))
    data = cli.datamodule
    problem = set_up(data)
    if isinstance(data.operator, Downsample | Mask) and problem.noise is not None:
        settings.update(NOISY)
    variance = problem.noise_variance()
    if is_denoising(data) and variance is not None:
        scale = min(1.0, float(variance) * (GREY_LEVELS / STRONG_NOISE) ** 2)
        settings.update({name: scale * value for name, value in IN_STRONG_NOISE.items()})
    if isinstance(data.operator, Mask):
        usual = cli.model.input_noise_std
        settings["model.input_noise_std"] = round(usual / _share(problem.image_shape), 3)
    if isinstance(data.operator, Blur):
        is_jpeg = str(data.measurement).lower().endswith((".jpg", ".jpeg"))
        if is_jpeg and not _is_given("model.fidelity", given):
            choice.assumed["model.fidelity"] = "noise that is not white, as in a JPEG"
            settings.update(NOT_WHITE)
        elif cli.model.fidelity == "likelihood":
            settings.update(NOT_WHITE)
    return problem


def _compare_with_image(problem: InverseProblem, choice: Choice) -> None:
    """Say if the image seems to have much less noise than was stated."""
    variance = problem.noise_variance()
    assert variance is not None
    stated = GREY_LEVELS * math.sqrt(float(variance))
    with suppress(ValueError):  # it cannot be estimated
        found = np.mean(_estimated_sigma(problem))
        if stated > OVERSTATED * found:
            choice.assumed["data.noise"] = (
                f"white noise of {stated:.3g} grey levels, though that of the image seems to be "
                f"{found:.3g}"
            )


def _estimated_sigma(problem: InverseProblem) -> float | list[float]:
    """σ of white noise in grey levels, for each channel if they differ.

    Texture looks like noise: what a blur has removed is used if there is one, or quiet blocks.

    Raises:
        ValueError: It cannot be estimated.
    """
    operator, observed, valid = problem.operator, problem.operator.observed, unclipped(problem.y)
    least = 1.01 * LEAST_ESTIMATE / GREY_LEVELS
    inner = operator.operator if isinstance(operator, Observed) else None
    if isinstance(inner, Blur) and inner.boundary == "unknown":  # only the border is not observed
        operator = inner
    sees_removed = not isinstance(operator, UnknownBlur) and valid.float().mean() > 1 - MOST_CLIPPED
    if isinstance(operator, Blur) and sees_removed:
        levels = level_of_removed(problem.y, operator.transfer(*problem.y.shape[-2:]))
        levels = levels * (1 + STANDARD_ERROR / math.sqrt(problem.y.numel()))
    else:
        valid = valid if observed is None else valid & observed.bool()
        levels = noise_level(problem.y, valid)
        seen = levels > least  # but in a constant channel
        if seen.any():
            every = valid.expand_as(problem.y)
            quiet = local_level(problem.y[:, seen], every[:, seen], QUIETEST) / BIAS
            if quiet < levels[seen].mean():
                levels = levels * (quiet / levels[seen].mean())
    if levels.nan_to_num(math.inf).max() < least:  # no noise counts as that
        levels = levels.clamp(min=least)
    sigma = sigma_of(levels)
    return [round(one, 2) for one in sigma] if isinstance(sigma, list) else round(sigma, 2)


def _choose_precision(
    assemble: Assemble, problem: InverseProblem, given: Collection[str], choice: Choice
) -> float:
    """Choose bfloat16 where it is faster; return the seconds per step."""
    each = seconds_per_step(assemble, problem, choice.settings)
    if _is_given("trainer.precision", given):
        return each
    mixed = {"trainer.precision": "bf16-mixed"}
    halved = seconds_per_step(assemble, problem, {**choice.settings, **mixed})
    if halved > FASTER * each:
        return each
    choice.settings.update(mixed)
    return halved


def _choose_held_out(problem: InverseProblem, given: Collection[str], choice: Choice) -> None:
    """Hold values out, by which the fit is stopped, where no noise model keeps it from overfitting.

    With a noise model, λ and μ do that, and the values are worth more to the fit.
    """
    stated = _is_given("data.hold_out", given) or _is_given("trainer.callbacks", given)
    # A unit of a JPEG's coefficients would leave a hole.
    if stated or problem.noise is not None or isinstance(problem.operator, JPEG):
        return
    try:
        problem.hold_out(HOLD_OUT)
    except ValueError:
        choice.assumed["data.hold_out"] = "too few values to hold some out"
        return
    stop = {"class_path": "deepred_pl.callbacks.AutoStop", "init_args": {"rule": "holdout"}}
    choice.settings.update({"data.hold_out": HOLD_OUT, "trainer.callbacks+": [stop]})
