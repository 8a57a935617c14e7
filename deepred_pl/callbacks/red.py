"""The RED x-update and the u-update, with the denoiser in the background."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Literal

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor

from deepred_pl import admm
from deepred_pl.background import Background
from deepred_pl.denoisers import Denoiser
from deepred_pl.model import DeepImagePrior, DeepRED, check_averaging, find_restoration

ABANDONED = 1.0  # seconds that a job may still take when its fit fails or is told to stop
LAST_JOB = 60.0  # seconds that a job of a fit that has ended may still take


class REDUpdate(Callback):
    """Updates x, then u, every k θ-steps, while the denoiser works beside them.

    The paper's Figure 1 (arXiv:1903.10176). A round ends every `every_n_steps` θ-steps: the
    denoised image is collected, x and u are updated, and the new x is handed to the denoiser,
    which has the whole next round for it. So round r uses f(x_{r−1}), the paper's iteration.
    The schedule is fixed and waits for the denoiser, so the result does not depend on timing.

    With `wait_for_denoiser` off, a round whose denoiser is not ready goes on with the f(x) it has,
    and the next round looks again. A slow denoiser then holds up the end of the fit, which waits
    for the call that is running, and a roll-back of `CollapseGuard`, but nothing else. The result
    depends on the machine and its load, so no two runs are equal.

    With `rounds_per_denoising` > 1 the rounds in between reuse f(x), and a denoiser round hands
    over x before its update: every_n_steps=1, rounds_per_denoising=10 is the released schedule.

    With `inner_iterations` J > 1 the x-update is made J times: J − 1 times in the background,
    with v = T_θ(z) + u of the round's start and a denoiser call after each, and the last time
    at the round's end with the v of that moment, so that x never lags behind T_θ(z) by a whole
    round; J = 1 is the same rule, not another. With `rounds_per_denoising` > 1 x has moved on
    meanwhile: the inner x serves f(x) alone, and the update goes out from the current x.

    A fit that ends because its denoiser failed does so between two θ-steps, after the other
    callbacks have had their turn; a checkpoint that they save then goes on with the round that
    is due.

    On a plain `DeepImagePrior` the callback does nothing.

    Args:
        denoiser: f, a callable from (1, C, H, W) to (1, C, H, W) in [0, 1]; see
            `deepred_pl.denoisers`. It is called on a thread on which torch uses one core, one
            call at a time.
        every_n_steps: θ-steps per round of x- and u-update, at least 1.
        rounds_per_denoising: Rounds per denoiser call, at least 1.
        x_update: "fixed_point", "gradient" (steepest descent), "mixed": fixed point in the
            first half of the trainer's max_steps, then gradient (so a fit resumed with more
            steps is not the longer fit), or "pnp": Plug-and-Play, x ← f(v), with the
            v = T_θ(z) + u of the round's start, for the denoiser needs the round.
        step_size: Of the gradient step, in (0, 2), in units of 1 / (λ + μ).
        inner_iterations: J, x-updates and denoiser calls per round, at least 1.
        wait_for_denoiser: Wait at a round's end until the denoiser is ready, for reproducible
            results; or go on with the last denoised image.
        timeout: Seconds that the denoising of a round may take, > 0. One that takes longer is
            found where the fit waits for it, or at the next round, and ends the fit; None waits
            however long it takes.
        retries: How often a denoiser that raised, or returned NaN or another shape, is asked once
            more for the same image, at least 0.
        submodule: Dotted name of the `DeepRED` inside the trained module; "" is the module.

    Attributes:
        wait_seconds: Seconds the fit has waited for the denoiser.
        busy_seconds: Seconds the denoiser has worked.
        denoised_step: The step whose x (with "pnp" v) the latest f(x) was made of.
        waiting: Whether the fit waits for the denoiser at this moment; a round has then changed
            nothing yet.
        failed: Whether the fit is about to end, for the denoiser failed.

    Raises:
        ValueError: An argument out of range, or no DeepRED where `submodule` says.
        RuntimeError: The denoiser raised, or returned NaN or another shape, at the last of its
            retries too; the message names it and the step.
        TimeoutError: The denoiser took longer than `timeout`. The thread is abandoned, for none can
            be ended from outside; `deepred` ends with it.
    """

    def __init__(
        self,
        denoiser: Denoiser | Callable[[Tensor], Tensor],
        every_n_steps: int = 10,
        rounds_per_denoising: int = 1,
        x_update: Literal["fixed_point", "gradient", "mixed", "pnp"] = "fixed_point",
        step_size: float = 0.5,
        inner_iterations: int = 1,
        wait_for_denoiser: bool = True,
        timeout: float | None = 3600.0,
        retries: int = 1,
        submodule: str = "",
    ) -> None:
        counts = {
            "every_n_steps": every_n_steps,
            "rounds_per_denoising": rounds_per_denoising,
            "inner_iterations": inner_iterations,
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if retries < 0:
            raise ValueError(f"retries must be at least 0, got {retries}")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be > 0 seconds, got {timeout}; null sets none")
        if not 0 < step_size < 2:
            raise ValueError(f"step_size must be in (0, 2), got {step_size}; beyond it diverges")
        if x_update not in ("fixed_point", "gradient", "mixed", "pnp"):
            raise ValueError(
                f"x_update must be 'fixed_point', 'gradient', 'mixed' or 'pnp', got {x_update!r}"
            )
        if x_update == "pnp" and (rounds_per_denoising, inner_iterations) != (1, 1):
            raise ValueError(
                "x_update='pnp' is one denoiser call a round: expected rounds_per_denoising and "
                f"inner_iterations of 1, got {rounds_per_denoising} and {inner_iterations}"
            )
        if not callable(denoiser):
            raise ValueError(f"denoiser must be callable, image to image, got {denoiser!r}")
        self.denoiser = denoiser
        self.every_n_steps = every_n_steps
        self.rounds_per_denoising = rounds_per_denoising
        self.x_update = x_update
        self.step_size = step_size
        self.inner_iterations = inner_iterations
        self.wait_for_denoiser = wait_for_denoiser
        self.timeout = timeout
        self.retries = retries
        self.submodule = submodule
        self.denoised_step = 0
        self.waiting = False
        self._submitted_step: int | None = None  # not known yet
        self._overdue = False  # a round went on without its denoiser
        self._model: DeepRED | None = None
        self._background: Background | None = None
        self._rounds = 0  # rounds made
        self._round_failed = False  # in the part of this fit that ended
        self._failure: BaseException | None = None  # of this round, raised before the next step
        self._waited_before = self._busy_before = 0.0  # in the parts of this fit that ended

    @property
    def wait_seconds(self) -> float:
        running = 0.0 if self._background is None else self._background.wait_seconds
        return self._waited_before + running

    @property
    def busy_seconds(self) -> float:
        running = 0.0 if self._background is None else self._background.busy_seconds
        return self._busy_before + running

    @property
    def failed(self) -> bool:
        return self._failure is not None

    # Lightning's hooks

    @property
    def state_key(self) -> str:
        return self._generate_state_key(submodule=self.submodule)

    def state_dict(self) -> dict[str, Any]:
        return {
            "wait_seconds": self.wait_seconds,
            "busy_seconds": self.busy_seconds,
            "denoised_step": self.denoised_step,
            "submitted_step": self._submitted_step,
            "overdue": self._overdue,
            "round_failed": self._failure is not None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._waited_before = state_dict["wait_seconds"]
        self._busy_before = state_dict.get("busy_seconds", 0.0)
        self.denoised_step = state_dict["denoised_step"]
        self._submitted_step = state_dict["submitted_step"]
        self._overdue = state_dict["overdue"]
        self._round_failed = state_dict.get("round_failed", False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._waited_before = self._busy_before = 0.0
        self.denoised_step = 0
        self._submitted_step, self._overdue = None, False
        self._round_failed, self._failure = False, None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = find_restoration(pl_module, self.submodule)
        if not isinstance(model, DeepRED):
            return
        self.check(model, trainer)
        self._model = model
        self._model.driven = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._model is not None:
            self._background = Background(self._model.x.device)
            self._rounds = self._model.step // self.every_n_steps
            if self._submitted_step is None:
                period = self.every_n_steps * self.rounds_per_denoising
                self._submitted_step = self._model.step - self._model.step % period
                self.denoised_step = self._submitted_step  # f(x) is that of an earlier fit
            self._start_job(self._model, trainer)
            self._rounds -= self._round_failed

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *batch: Any
    ) -> None:
        if self._round_failed and self._model is not None:  # of the fit that goes on here
            self._round_failed = False
            self._round(self._model, trainer)
        if self._failure is not None:
            raise self._failure

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if self._model is not None and self._model.step // self.every_n_steps > self._rounds:
            try:
                self._round(self._model, trainer)
            except BaseException as error:
                if self._model.step // self.every_n_steps == self._rounds:
                    raise
                self._failure = error  # nothing has changed; other callbacks have their turn first

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._failure is not None:
            raise self._failure

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._close(timeout=ABANDONED)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # When the results are written. Torch aborts a process that ends while it computes.
        self._close(timeout=LAST_JOB)

    def check(self, model: DeepImagePrior, trainer: Trainer) -> None:
        """Refuse what cannot be fitted; called before the fit.

        Raises:
            ValueError: The denoiser cannot take the model's images, or a setting cannot be.
        """
        if not isinstance(model, DeepRED):
            return
        check_averaging(trainer)
        if self.x_update == "mixed" and trainer.max_steps < 1:
            raise ValueError(
                "x_update='mixed' changes at half of the trainer's max_steps, got max_steps="
                f"{trainer.max_steps}; give it max_steps"
            )
        if isinstance(self.denoiser, Denoiser):
            self.denoiser.check(model.x.to(trainer.strategy.root_device))

    # The updates

    def discard(self) -> None:
        """Forget the job, before the model goes back to an earlier state.

        The next denoiser round makes one of the snapshot that the model then has.
        """
        if self._background is not None and self._background.busy:
            with suppress(RuntimeError):  # nobody wants its result, or its error
                self._collect()
        self._overdue = False

    @torch.no_grad()
    def _round(self, model: DeepRED, trainer: Trainer) -> None:
        rounds = model.step // self.every_n_steps
        denoised = rounds // self.rounds_per_denoising > self._rounds // self.rounds_per_denoising
        reusing = self.rounds_per_denoising > 1
        x = model.x
        assert self._background is not None
        if denoised and not self._background.busy:  # it was discarded, or _submit took it for
            self._start_job(model, trainer)  # beyond max_steps, where a batch makes several steps
        moved_on = reusing or self._overdue  # x, since it was handed over
        if not self.wait_for_denoiser:
            due = denoised or self._overdue
            ready = self._background.done or self._background.overdue(self.timeout)
            denoised = due and ready
            self._overdue = due and not denoised
            if self.x_update == "pnp" and not denoised:
                self._rounds = rounds
                return  # x and u come from one v, and that of f(x) is past
        if denoised:
            denoised_x, model.f_x = self._collect()
            self._rounds = rounds
            self._overdue = False
            self.denoised_step = self._submitted_step or 0
            model.prior = admm.red_prior(denoised_x, model.f_x)
            if not moved_on:
                x = denoised_x  # the same x, or with J > 1 the last inner iterate
            if reusing:
                self._submit(model, trainer)
        self._rounds = rounds
        # Plug-and-Play takes the v that was denoised, for x and u must come from one v.
        v = model.v_pending if self.x_update == "pnp" else model.out + model.u
        model.x = self._update_at(model.step, trainer)(x, model.f_x, v, model.lam, model.mu)
        model.u = admm.dual_update(v, model.x)
        model.update_weighting()
        if denoised and not reusing:
            self._submit(model, trainer)

    def _collect(self) -> tuple[Tensor, Tensor]:
        """The job's last inner x and its f(x)."""
        assert self._background is not None
        self.waiting = True
        try:
            return self._background.result(self.timeout)
        finally:
            self.waiting = False

    def _update_at(self, step: int, trainer: Trainer) -> admm.XUpdate:
        second_half = 2 * step > _last_step(trainer)
        if self.x_update == "pnp":
            return admm.plug_and_play
        if self.x_update == "gradient" or (self.x_update == "mixed" and second_half):
            return partial(admm.gradient_step, step_size=self.step_size)
        return admm.fixed_point

    def _submit(self, model: DeepRED, trainer: Trainer) -> None:
        # Clones, as loading a checkpoint writes into buffers; contiguous, as loaded buffers are,
        # for the memory layout decides the last bits of a sum.
        model.x_pending = model.x.clone(memory_format=torch.contiguous_format)
        model.v_pending = (model.out + model.u).contiguous()
        model.lam_pending, model.mu_pending = model.lam.clone(), model.mu.clone()
        self._submitted_step = model.step
        period = self.every_n_steps * self.rounds_per_denoising
        collected_at = (model.step // period + 1) * period
        if trainer.max_steps < 1 or collected_at <= _last_step(trainer):
            self._start_job(model, trainer)  # else a resumed fit starts it

    def _start_job(self, model: DeepRED, trainer: Trainer) -> None:
        """Denoise the pending snapshot; a resumed fit starts the job it was saved with."""
        pnp, step = self.x_update == "pnp", self._submitted_step
        assert self._background is not None and step is not None
        self._background.submit(
            f"denoiser {name_of(self.denoiser)} on the {'v' if pnp else 'x'} of step {step}",
            admm.inner_iterations,
            partial(_denoise, self.denoiser, self.retries),
            self._update_at(step, trainer),
            model.v_pending if pnp else model.x_pending,
            model.v_pending,
            model.lam_pending,
            model.mu_pending,
            self.inner_iterations,
        )

    def _close(self, timeout: float | None) -> None:
        if self._background is not None:
            self._background.close(timeout)
            self._waited_before += self._background.wait_seconds
            self._busy_before += self._background.busy_seconds
            self._background = None
        if self._model is not None:
            self._model.driven = False
            self._model = None


def _last_step(trainer: Trainer) -> int:
    """The model's last step; of a parent's accumulated steps several make one of Lightning's."""
    return trainer.max_steps * trainer.accumulate_grad_batches


def staleness(trainer: Trainer, model: DeepRED, submodule: str = "") -> int | None:
    """θ-steps since the x of the latest f(x); None where the fit waits for its denoiser."""
    for callback in trainer.callbacks:
        if isinstance(callback, REDUpdate) and callback.submodule == submodule:
            return None if callback.wait_for_denoiser else model.step - callback.denoised_step
    return None


def denoiser_seconds(trainer: Trainer, submodule: str | None = None) -> tuple[float, float]:
    """Seconds the trainer's fit has waited for denoisers, and that they have worked; for one
    submodule's, or for all."""
    updates = [c for c in trainer.callbacks if isinstance(c, REDUpdate)]
    updates = [c for c in updates if submodule in (None, c.submodule)]
    return sum(c.wait_seconds for c in updates), sum(c.busy_seconds for c in updates)


def waits_for_denoiser(trainer: Trainer) -> bool:
    """Whether the trainer's fit is at a round's end, and waits there."""
    return any(c.waiting for c in trainer.callbacks if isinstance(c, REDUpdate))


def a_round_failed(trainer: Trainer) -> bool:
    """Whether the trainer's fit is about to end, for a denoiser failed."""
    return any(c.failed for c in trainer.callbacks if isinstance(c, REDUpdate))


def _denoise(denoiser: Callable[[Tensor], Tensor], retries: int, x: Tensor) -> Tensor:
    for _ in range(retries):
        try:
            return _denoise_once(denoiser, x)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())  # one line
            rank_zero_info(f"denoiser {name_of(denoiser)} failed, and is asked once more: {reason}")
    return _denoise_once(denoiser, x)


@torch.no_grad()
def _denoise_once(denoiser: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    f_x = denoiser(x.clone())  # it may write into its input
    if not isinstance(f_x, Tensor) or f_x.shape != x.shape:
        got = tuple(f_x.shape) if hasattr(f_x, "shape") else type(f_x).__name__
        raise ValueError(f"it must return a tensor of {tuple(x.shape)} like its input, got {got}")
    if not f_x.isfinite().all():
        raise ValueError("it must return finite values, got NaN or infinity")
    # A copy: the denoiser may use its memory again, or have made an inference tensor.
    return torch.empty_like(x, memory_format=torch.contiguous_format).copy_(f_x)


def name_of(part: object) -> str:
    """What a part is called: a function by its name, an object by its class."""
    return getattr(part, "__name__", type(part).__name__)
