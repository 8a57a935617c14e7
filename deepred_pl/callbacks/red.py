"""The x-update of RED and the u-update, with the denoiser running in the background."""

import math
from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from deepred_pl import admm
from deepred_pl.background import Background
from deepred_pl.callbacks.base import RestorationCallback, name_of
from deepred_pl.checks import RestorationWarning, as_plain, check_at_least, check_choice
from deepred_pl.denoisers import Denoiser
from deepred_pl.lightning import LightningModule, Trainer, rank_zero_info, rank_zero_warn
from deepred_pl.model import DeepImagePrior, DeepRED
from deepred_pl.operators import Identity
from deepred_pl.problem import InverseProblem
from deepred_pl.trainer import optimized

ABANDONED = 1.0  # seconds to wait for a running job after its fit failed or was stopped
MOST_BRIGHTER = 10  # times as bright as its input: a denoised image whose white is 255
LAST_JOB = 60.0  # seconds to wait for a running job after its fit has ended

XUpdate = Literal["fixed_point", "gradient", "mixed", "pnp"]

# One for each denoiser in use, by its id, because it may serve several restorations.
_locks: WeakValueDictionary[int, Lock] = WeakValueDictionary()
_locks_lock = Lock()


class REDUpdate(RestorationCallback):
    """Updates x, then u, every k θ-steps, while the denoiser runs in the background.

    The paper's Figure 1 (arXiv:1903.10176). A round ends every `every_n_steps` θ-steps: the
    denoised image is collected, x and u are updated, and the new x is submitted to the denoiser,
    which has the whole next round for it. Round r thus uses f(x_{r−1}), the paper's iteration. The
    fit waits for the denoiser at the end of a round, so that the result does not depend on timing;
    choose k large enough for a slow denoiser.

    With `rounds_per_denoising` > 1 the rounds in between reuse f(x), and a denoising round submits
    x before its update: every_n_steps=1, rounds_per_denoising=10 is the released schedule.

    With `inner_iterations` J > 1 there are J x-updates per round: J − 1 in the background, with
    v = T_θ(z) + u of the round's start and a denoiser call after each, and the last at the end of
    the round with the current v. With `rounds_per_denoising` > 1, x has changed meanwhile: the
    inner x is then only used for f(x), and the last update starts from the current x.

    A fit whose denoiser fails ends between two θ-steps, after the other callbacks of the step; a
    checkpoint that they save resumes with the round that failed.

    For a plain `DeepImagePrior` the callback does nothing.

    Args:
        denoiser: f, a callable from (1, C, H, W) to (1, C, H, W) in [0, 1]; see
            `deepred_pl.denoisers`. It is called on a thread on which torch uses one core, one call
            at a time, also if several `REDUpdate`s share it.
        every_n_steps: θ-steps per round of x- and u-update, at least 1.
        rounds_per_denoising: Rounds per denoiser call, at least 1.
        x_update: "fixed_point", "gradient" (steepest descent), "mixed": fixed point in the first
            half of the trainer's max_steps, then gradient (so that a fit resumed with more steps
            differs from the longer fit), or "pnp": Plug-and-Play, x ← f(v), with the v = T_θ(z) + u
            of the round's start, because the denoiser takes a round.
        step_size: Step of the gradient update, in (0, 2), in units of 1 / (λ + μ).
        inner_iterations: J, x-updates and denoiser calls per round, at least 1.
        timeout: Seconds for the denoising of a round, > 0, including those until a shared denoiser
            is free. If it takes longer, the fit ends; None waits indefinitely.
        retries: How often a denoiser that raised an exception, or returned NaN, another shape or
            another range, is called again for the same image, at least 0.
        submodule: Dotted name of the `DeepRED` inside the trained module; "" is the module.

    Attributes:
        wait_seconds: Seconds the fit has waited for the denoiser.
        busy_seconds: Seconds the denoiser has worked.

    Raises:
        ValueError: An argument is out of range, or there is no restoration at `submodule`.
        RuntimeError: The denoiser failed in all of its retries; the message names it and the step.
        TimeoutError: The denoiser took longer than `timeout`. Its thread cannot be ended from
            outside and is abandoned; `deepred` ends with it.
    """

    def __init__(
        self,
        denoiser: Denoiser | Callable[[Tensor], Tensor],
        every_n_steps: int = 10,
        rounds_per_denoising: int = 1,
        x_update: XUpdate = "fixed_point",
        step_size: float = 0.5,
        inner_iterations: int = 1,
        timeout: float | None = 3600.0,
        retries: int = 1,
        submodule: str = "",
    ) -> None:
        super().__init__(submodule)
        counts = (every_n_steps, rounds_per_denoising, inner_iterations)
        every_n_steps, rounds_per_denoising, inner_iterations = map(as_plain, counts)
        check_at_least(
            1,
            every_n_steps=every_n_steps,
            rounds_per_denoising=rounds_per_denoising,
            inner_iterations=inner_iterations,
        )
        check_at_least(0, retries=retries)
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be > 0 seconds, got {timeout}; null disables it")
        if not 0 < step_size < 2:
            raise ValueError(f"step_size must be in (0, 2), got {step_size}; beyond, it diverges")
        check_choice("x_update", x_update, XUpdate)
        if x_update == "pnp" and (rounds_per_denoising, inner_iterations) != (1, 1):
            raise ValueError(
                "x_update='pnp' has one denoiser call per round: expected rounds_per_denoising and "
                f"inner_iterations of 1, got {rounds_per_denoising} and {inner_iterations}"
            )
        check_denoiser(denoiser)
        self.denoiser = denoiser
        self.every_n_steps = every_n_steps
        self.rounds_per_denoising = rounds_per_denoising
        self.x_update = x_update
        self.step_size = step_size
        self.inner_iterations = inner_iterations
        self.timeout = timeout
        self.retries = retries
        self._red: DeepRED | None = None  # the restoration, unless it is a plain DeepImagePrior
        self._background: Background | None = None
        self._lock: Lock | None = None  # during a fit
        self._began = (0, 0)  # θ-step and Lightning's step as the fit started
        self._reset()

    def _reset(self) -> None:
        self._updated_step = 0  # the step of the latest round
        self._submitted_step: int | None = None  # of the snapshot being denoised; None: not known
        self._failure: BaseException | None = None  # of this round, raised before the next step
        self._repeats_round = False  # of a resumed fit that ended because its denoiser failed
        self._waited = self._worked = 0.0  # seconds in the earlier parts of this fit

    @property
    def period(self) -> int:
        return self.every_n_steps * self.rounds_per_denoising

    @property
    def failed(self) -> bool:
        return self._failure is not None

    @property
    def wait_seconds(self) -> float:
        return self._waited + (self._background.wait_seconds if self._background else 0.0)

    @property
    def busy_seconds(self) -> float:
        return self._worked + (self._background.busy_seconds if self._background else 0.0)

    def summary(self) -> dict[str, Any]:
        if self._red is None:
            return {}
        sigma = getattr(self.denoiser, "sigma", None)
        return {
            "denoiser": name_of(self.denoiser),
            "denoiser_sigma": sigma if isinstance(sigma, int | float) else None,
            "x_update": self.x_update,
            "k": self.period,
            **{name: round(seconds, 3) for name, seconds in self.curves().items()},
        }

    def curves(self) -> dict[str, float]:
        if self._red is None:
            return {}
        wait, busy = self.wait_seconds, self.busy_seconds
        return {"denoiser_wait_seconds": wait, "denoiser_busy_seconds": busy}

    # Lightning's hooks

    def state_dict(self) -> dict[str, Any]:
        return {
            "submitted_step": self._submitted_step,
            "round_failed": self.failed,
            "wait_seconds": self.wait_seconds,
            "busy_seconds": self.busy_seconds,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("overdue"):
            raise ValueError(
                "the checkpoint is of an earlier version that did not wait for its denoiser, which "
                "cannot be resumed; start without a checkpoint"
            )
        self._submitted_step = state_dict["submitted_step"]
        self._repeats_round = state_dict["round_failed"]
        self._waited, self._worked = state_dict["wait_seconds"], state_dict["busy_seconds"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close(LAST_JOB)  # that of a restoration which was replaced
        super().setup(trainer, pl_module, stage)
        self._reset()

    def start(self, model: DeepImagePrior, trainer: Trainer) -> None:
        self._began = model.step, trainer.global_step
        if not isinstance(model, DeepRED):
            return
        self._red, model.driven = model, True
        # A method is a new object at every access.
        shared = getattr(self.denoiser, "__self__", self.denoiser)
        with _locks_lock:
            self._lock = _locks.setdefault(id(shared), Lock())
        self._background = Background(model.x.device)
        if self._submitted_step is None:
            self._submitted_step = model.step - model.step % self.period
        self._updated_step = self._submitted_step if self._repeats_round else model.step
        self._start_job(model, trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *batch: Any
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, *batch)
        self._update(trainer)  # the round that had failed, in a resumed fit
        self._raise_failure()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        self._update(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._raise_failure()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._close(timeout=ABANDONED)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # After the results are written. Torch aborts a process that ends while it computes.
        self._close(timeout=LAST_JOB)
        super().teardown(trainer, pl_module, stage)

    def check(self, model: DeepImagePrior, trainer: Trainer) -> None:
        if not isinstance(model, DeepRED):
            return
        if isinstance(self.denoiser, nn.Module) and optimized(trainer) & {
            *self.denoiser.parameters()
        }:
            rank_zero_warn(
                "The denoiser is trained while it runs in the background, so that the result "
                "depends on timing; give REDUpdate a copy (copy.deepcopy), which you update "
                "between two epochs.",
                category=RestorationWarning,
            )
        if self.x_update == "mixed" and trainer.max_steps < 1:
            raise ValueError(
                "x_update='mixed' changes at half of the trainer's max_steps, got max_steps="
                f"{trainer.max_steps}; set it"
            )
        if isinstance(self.denoiser, Denoiser):
            self.denoiser.check(model.x.to(trainer.strategy.root_device))
        if self.x_update == "pnp" and model.problem is not None:
            self._compare_sigma(model.problem)

    def _compare_sigma(self, problem: InverseProblem) -> None:
        """Warn if Plug-and-Play denoises with another noise level than the measurement's."""
        variance, assumed = problem.noise_variance(), getattr(self.denoiser, "sigma", None)
        if variance is None or assumed is None or not isinstance(problem.operator, Identity):
            return
        sigma = 255 * math.sqrt(float(variance))
        if not 0.7 < assumed / sigma < 1.2:
            rank_zero_warn(
                f"The denoiser assumes a sigma of {assumed:.3g}, but that of the noise is "
                f"{sigma:.3g}. In Plug-and-Play both should be similar: set red.denoiser.sigma "
                "(red.denoiser.denoiser.sigma if it wraps another) or data.noise.sigma.",
                category=RestorationWarning,
            )

    def roll_back(self, state: dict[str, Any]) -> None:
        """Discard the running job; the next denoising starts from the restored snapshot."""
        if self._background is not None and self._background.busy:
            try:
                self._result()
            except RuntimeError:
                pass  # neither its result nor its error is needed
            except BaseException as error:  # a signal, or a timeout
                self._failure = error

    # The updates

    def _update(self, trainer: Trainer) -> None:
        """Make the round that is due, if any; keep the error of a denoiser that failed."""
        model, before = self._red, self._updated_step
        if model is None or self.failed or not _passed(self.every_n_steps, before, model.step):
            return
        denoises = _passed(self.period, before, model.step)
        try:
            x, f_x = self._collect(model, trainer) if denoises else (model.x, model.f_x)
        except BaseException as error:
            self._failure = error  # nothing has changed, and other callbacks finish the step first
        else:
            self._updated_step = model.step
            self._round(model, x, f_x, denoises, trainer)

    def _collect(self, model: DeepRED, trainer: Trainer) -> tuple[Tensor, Tensor]:
        """Wait for f(x); return the x that the update starts from, and f(x)."""
        assert self._background is not None
        if not self._background.busy:  # it was discarded, or a batch makes several steps
            self._start_job(model, trainer)
        x, f_x = self._result()
        model.prior = admm.red_prior(x, f_x)
        # With J = 1 the same x; otherwise the last inner one, unless x has been updated since.
        return (x if self.rounds_per_denoising == 1 else model.x), f_x

    @torch.no_grad()
    def _round(
        self, model: DeepRED, x: Tensor, f_x: Tensor, denoised: bool, trainer: Trainer
    ) -> None:
        """Update x, then u, and submit the next x to the denoiser."""
        model.f_x = f_x
        # For Plug-and-Play the v that was denoised, because x and u must come from the same v.
        v = model.v_pending if self.x_update == "pnp" else model.out + model.u
        if denoised and self.rounds_per_denoising > 1:  # the released order
            self._submit(model, trainer)
        model.x = self._x_update(model.step, trainer, model.limits)(x, f_x, v, model.lam, model.mu)
        model.u = admm.dual_update(v, model.x)
        model.update_weighting()
        if denoised and self.rounds_per_denoising == 1:
            self._submit(model, trainer)

    def _x_update(self, step: int, trainer: Trainer, limits: admm.Limits) -> admm.XUpdate:
        second_half = 2 * step > self._last_step(trainer)
        if self.x_update == "pnp":
            return partial(admm.plug_and_play, limits=limits)
        if self.x_update == "gradient" or (self.x_update == "mixed" and second_half):
            return partial(admm.gradient_step, limits=limits, step_size=self.step_size)
        return partial(admm.fixed_point, limits=limits)

    # The job in the background

    def _submit(self, model: DeepRED, trainer: Trainer) -> None:
        """Take a snapshot of x, v, λ and μ, and start to denoise it."""
        # Clones, because loading a checkpoint writes into buffers; contiguous like loaded buffers,
        # because the memory layout determines the last bits of a sum.
        model.x_pending = model.x.clone(memory_format=torch.contiguous_format)
        model.v_pending = (model.out + model.u).contiguous()
        model.lam_pending, model.mu_pending = model.lam.clone(), model.mu.clone()
        self._submitted_step = model.step
        collected_at = (model.step // self.period + 1) * self.period
        if trainer.max_steps < 1 or collected_at <= self._last_step(trainer):
            self._start_job(model, trainer)  # otherwise a resumed fit starts it

    def _start_job(self, model: DeepRED, trainer: Trainer) -> None:
        """Denoise the snapshot, which a resumed fit has from its checkpoint."""
        pnp, step = self.x_update == "pnp", self._submitted_step
        assert self._background is not None and self._lock is not None and step is not None
        self._background.submit(
            f"denoiser {name_of(self.denoiser)} on the {'v' if pnp else 'x'} of step {step}",
            admm.inner_iterations,
            partial(_denoise, self.denoiser, self.retries, self._lock),
            self._x_update(step, trainer, model.limits),
            model.v_pending if pnp else model.x_pending,
            model.v_pending,
            model.lam_pending,
            model.mu_pending,
            self.inner_iterations,
        )

    def _last_step(self, trainer: Trainer) -> float:
        """The last θ-step, of which a parent may make several, or less than one, per step.

        Lightning's steps are those of optimizers: fewer where a parent accumulates gradients, more
        where it has several optimizers of its own.
        """
        step, global_step = self._began
        passes: float = trainer.accumulate_grad_batches
        root = self._trained
        if root is not None and not root.automatic_optimization:
            made = trainer.global_step - global_step
            passes = (self.model.step - step) / made if made else 1
        return step + (trainer.max_steps - global_step) * passes

    def _result(self) -> tuple[Tensor, Tensor]:
        """Wait for the job's last inner x and its f(x)."""
        assert self._background is not None
        self.waiting = True
        try:
            return self._background.result(self.timeout)
        except TimeoutError as error:
            remedy = "if it is only slow, set a longer timeout (red.timeout)"
            raise TimeoutError(f"{error}; {remedy}") from error
        finally:
            self.waiting = False

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _close(self, timeout: float) -> None:
        if self._background is not None:
            self._background.close(timeout)
            self._waited += self._background.wait_seconds
            self._worked += self._background.busy_seconds
            self._background = self._lock = None
        if self._red is not None:
            self._red.driven = False
            self._red = None


def check_denoiser(denoiser: object) -> None:
    """Raise ValueError unless the denoiser can be called with an image."""
    if not callable(denoiser) or isinstance(denoiser, type):
        raise ValueError(
            "denoiser must be an object of deepred_pl.denoisers, such as NonLocalMeans(sigma=3), "
            f"or a function from image to image, got {denoiser!r}"
        )


def _passed(every: int, before: int, step: int) -> bool:
    """Whether a multiple of `every` lies in (before, step]."""
    return step // every > before // every


def _denoise(denoiser: Callable[[Tensor], Tensor], retries: int, lock: Lock, x: Tensor) -> Tensor:
    if not x.isfinite().all():
        raise ValueError("its input is NaN or infinite, because the fit diverged")
    with lock:
        for _ in range(retries):
            try:
                return _denoise_once(denoiser, x)
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())  # one line
                rank_zero_info(f"Denoiser {name_of(denoiser)} failed; retrying: {reason}")
        return _denoise_once(denoiser, x)


@torch.no_grad()
def _denoise_once(denoiser: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    f_x = denoiser(x.clone())  # it may write into its input
    if not isinstance(f_x, Tensor) or f_x.shape != x.shape:
        got = tuple(f_x.shape) if isinstance(f_x, Tensor) else type(f_x).__name__
        raise ValueError(f"it must return a tensor of {tuple(x.shape)} like its input, got {got}")
    if not f_x.isfinite().all():
        raise ValueError("it must return finite values, got NaN or infinity")
    if f_x.abs().mean() > MOST_BRIGHTER * x.abs().mean().clamp(min=0.1):
        raise ValueError(
            f"it must return an image in [0, 1], got values of up to {float(f_x.max()):.3g} for "
            f"up to {float(x.max()):.3g}; divide them by the value of white, such as 255"
        )
    # A copy: the denoiser may reuse its memory, or return an inference tensor.
    return torch.empty_like(x, memory_format=torch.contiguous_format).copy_(f_x)
