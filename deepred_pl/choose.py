"""Choose the settings of a fit from its image, its operator and an effort."""

import json
import math
import re
import time
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from deepred_pl.callbacks import CollapseGuard, REDUpdate
from deepred_pl.checks import RestorationWarning
from deepred_pl.cli import RestorationCLI
from deepred_pl.data import RestorationDataModule, read_source
from deepred_pl.estimate import local_level, unclipped
from deepred_pl.lightning import Callback, LightningModule, Trainer, quiet
from deepred_pl.metrics import GREY_LEVELS
from deepred_pl.operators import Blur, Downsample, Identity, Mask, Operator, Radon
from deepred_pl.problem import InverseProblem
from deepred_pl.tiles import Region

USUAL, WIDE = 32, 64  # channels of the network
# θ-steps for images of SIDE × SIDE pixels, and fewer for smaller ones; and the network's channels.
EFFORTS = {"fast": (600, USUAL), "default": (1200, USUAL), "best": (1200, WIDE)}
LEAST_STEPS, MOST_STEPS = 150, 2400  # with more time, the network is wide
SIDE, LEAST_SHARE = 256, 0.5
WARMUP_STEPS = 30
HOLD_OUT = 0.02  # of the measured values
FINISHING = 2.0  # seconds to write the results and end the process
UNTIMED, TIMED = 10, 20  # steps that measure the time of one; whole rounds of the denoiser
FASTER = 0.9  # ratio of times, below which bfloat16 is used

# Configurations by operator.
TASKS: dict[type[Operator], str] = {
    Identity: "denoising",
    Blur: "deblurring_uniform",
    Downsample: "super_resolution",
    Mask: "inpainting",
    Radon: "tomography",
}
EXACT = ("super_resolution", "inpainting")  # configurations without a noise model
# They get one, and its weights, if there is that much noise in grey levels; less may be texture.
LEAST_NOISE = 5.0
NOISY = {"model.weighting": "discrepancy", "model.lam": 0.5, "model.mu": 0.5}
# In denoising, the least λ and μ and the noise on z for that much noise in grey levels or more.
# With less noise they would keep the network from learning detail: they fall like its variance.
STRONG_NOISE = 25.0
IN_STRONG_NOISE = {"model.lam": 0.5, "model.mu": 0.5, "model.input_noise_std": 0.1}
# In deblurring, of JPEGs, whose noise is not white (`methods/likelihood`).
NOT_WHITE = {
    **{"model.fidelity": "likelihood", "model.weighting": "fixed"},
    **{"model.lam": 0.02, "model.mu": 0.04, "red.denoiser.sigma": 3},
}

MEANS = 1.5  # largest value of a sinogram of means along rays; others are sums
BRIGHTER = 1.5  # than its smoothed back-projection may be an object
IN_CORNERS = 0.1  # of the energy of an object that is beyond the square within its circle

Assemble = Callable[[Sequence[str]], RestorationCLI]


@dataclass(frozen=True)
class Choice:
    """Chosen settings, and what they assume.

    Attributes:
        settings: Settings by their names on the command line.
        assumed: One sentence for each assumption, with the setting that changes it.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    assumed: list[str] = field(default_factory=list)


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


def defaults_of(task: str) -> list[str]:
    """Options of a configuration's fits before anything is chosen: the noise is estimated."""
    return [] if task in EXACT else ["--data.noise.sigma=null"]


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
    _choose_geometry(assemble([]).datamodule, given, choice)
    problem = _choose_noise(assemble, given, choice)
    _choose_weights(problem, given, choice)
    steps, width = EFFORTS.get(effort, (MOST_STEPS, USUAL))
    share = math.sqrt(math.prod(problem.image_shape[-2:])) / SIDE
    steps = round(steps * min(1.0, max(LEAST_SHARE, share)))
    fixed = any(name.startswith("model.network") for name in given)
    choice.settings.update({} if fixed else _network(width))
    each = _choose_precision(assemble, problem, given, choice)
    if seconds is not None:
        end = began + seconds - FINISHING
        many, steps = steps, int((end - time.monotonic()) / each)
        if steps > many and not fixed:
            wide = {**choice.settings, **_network(WIDE)}
            each_wide = step_seconds(assemble, problem, wide)
            left = end - time.monotonic()
            steps = int(left / each)
            if left / each_wide > many / 2:
                choice.settings.update(wide)
                steps = int(left / each_wide)
        if steps < LEAST_STEPS:
            needed = time.monotonic() - began + FINISHING + LEAST_STEPS * each
            raise ValueError(
                f"an effort of {effort} is too short: a step on {problem.image_shape[-2]}×"
                f"{problem.image_shape[-1]} pixels takes {each:.2g} s here, and a fit at least "
                f"{LEAST_STEPS} steps; allow {math.ceil(1.1 * needed)}s or more"
            )
    if "trainer.max_steps" not in given:
        choice.settings["trainer.max_steps"] = steps
        if not any(name.startswith("model.lr_scheduler") for name in given):
            choice.settings["model.lr_scheduler"] = {
                "class_path": "WarmupCosine",
                "init_args": {"total_steps": steps, "warmup_steps": WARMUP_STEPS},
            }
    _choose_held_out(problem, given, choice)
    return choice


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


def step_seconds(assemble: Assemble, problem: InverseProblem, settings: Mapping[str, Any]) -> float:
    """Seconds per θ-step with the denoiser working in the background, measured by a few steps."""
    bare = {"trainer.logger": False, "trainer.enable_progress_bar": False}
    cli = assemble(as_options({**settings, **bare, "trainer.enable_checkpointing": False}))
    stopwatch = _Stopwatch()
    kept = [c for c in cli.trainer.callbacks if isinstance(c, REDUpdate | CollapseGuard)]
    cli.trainer.callbacks = [*kept, stopwatch]
    cli.datamodule.problem = problem
    with quiet():
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
        return (timed[-1] - timed[0]) / max(1, len(timed) - 1)


def _network(width: int) -> dict[str, Any]:
    return {"model.network": {"class_path": "SkipNet", "init_args": {"width": width}}}


def _choose_geometry(data: RestorationDataModule, given: Collection[str], choice: Choice) -> None:
    """Choose the circle and the range of a sinogram from its filtered back-projection."""
    if not isinstance(data.operator, Radon) or data.measurement is None:
        return
    sums, _ = read_source(data.measurement, [0, 1], data.page, missing=True)
    sums = torch.nan_to_num(sums)
    detectors, angles = sums.shape[-2:]
    if angles != data.operator.angles.numel():
        return  # which the operator reports
    guess = Radon(data.operator.angles, circle=True).first_guess(sums / detectors)
    side = math.floor(detectors / math.sqrt(2))
    middle = Region.middle(detectors, detectors, side).of(guess)
    circle = data.operator.circle
    if "data.operator.circle" not in given:
        corners = 1 - float(middle.square().sum() / guess.square().sum())
        circle = corners > IN_CORNERS or math.ceil(math.sqrt(2) * side) != detectors
        choice.settings["data.operator.circle"] = circle
        size = detectors if circle else side
        choice.assumed.append(
            f"an object of {size}×{size} pixels, {'within a circle' if circle else 'with corners'} "
            "(otherwise set data.operator.circle)"
        )
    if "data.intensity_range" not in given and float(sums.max()) > MEANS:
        smooth = F.avg_pool2d(guess if circle else middle, 3)  # without noise and streaks
        white = float(f"{BRIGHTER * float(smooth.quantile(0.999)):.2g}")
        choice.settings["data.intensity_range"] = [0, white * detectors]
        choice.assumed.append(
            f"sums along rays; the restored image is in units of {white:g} per pixel (otherwise "
            "set data.intensity_range)"
        )


def _choose_noise(assemble: Assemble, given: Collection[str], choice: Choice) -> InverseProblem:
    """Choose the noise model and what depends on it; return the problem."""
    settings, assumed = choice.settings, choice.assumed
    stated = any(name.startswith("data.noise") for name in given)
    data = assemble(as_options(settings)).datamodule
    problem = set_up(data)
    if not stated and problem.noise is None:
        valid, observed = unclipped(problem.y), problem.operator.observed
        valid = valid if observed is None else valid & observed.bool()
        level = GREY_LEVELS * local_level(problem.y, valid)
        if level >= LEAST_NOISE:
            noise = {"class_path": "GaussianNoise", "init_args": {"sigma": round(level, 1)}}
            settings.update({**NOISY, "data.noise": noise})
            problem = set_up(assemble(as_options(settings)).datamodule)
        else:
            assumed.append("no noise (otherwise set data.noise)")
    if not stated and problem.noise is not None:
        assumed.append(f"white noise, estimated: {problem.noise} (otherwise set data.noise.sigma)")
    is_jpeg = str(data.measurement).lower().endswith((".jpg", ".jpeg"))
    if isinstance(data.operator, Blur) and is_jpeg and "model.fidelity" not in given:
        settings.update(NOT_WHITE)
        assumed.append("noise that is not white, as in a JPEG (otherwise set model.fidelity)")
    return problem


def _choose_weights(problem: InverseProblem, given: Collection[str], choice: Choice) -> None:
    """Choose the least λ and μ and the noise on z of denoising by the noise's variance."""
    variance = problem.noise_variance()
    if variance is None or not isinstance(problem.operator, Identity):
        return
    scale = min(1.0, float(variance) * (GREY_LEVELS / STRONG_NOISE) ** 2)
    weights = {name: scale * value for name, value in IN_STRONG_NOISE.items()}
    choice.settings.update({k: v for k, v in weights.items() if k not in given})


def _choose_precision(
    assemble: Assemble, problem: InverseProblem, given: Collection[str], choice: Choice
) -> float:
    """Choose bfloat16 where it is faster; return the seconds per step."""
    each = step_seconds(assemble, problem, choice.settings)
    if "trainer.precision" in given:
        return each
    mixed = {"trainer.precision": "bf16-mixed"}
    halved = step_seconds(assemble, problem, {**choice.settings, **mixed})
    if halved > FASTER * each:
        return each
    choice.settings.update(mixed)
    return halved


def _choose_held_out(problem: InverseProblem, given: Collection[str], choice: Choice) -> None:
    """Hold values out, by which the fit is stopped, where no noise model keeps it from overfitting.

    With a noise model, λ and μ do that, and the values are worth more to the fit.
    """
    if problem.noise is not None or any(
        name.startswith(("data.hold_out", "trainer.callbacks")) for name in given
    ):
        return
    try:
        problem.hold_out(HOLD_OUT)
    except ValueError:
        choice.assumed.append(f"too few values to hold out {HOLD_OUT:.0%} of them")
        return
    stop = {"class_path": "deepred_pl.callbacks.AutoStop", "init_args": {"rule": "holdout"}}
    choice.settings.update({"data.hold_out": HOLD_OUT, "trainer.callbacks+": [stop]})
