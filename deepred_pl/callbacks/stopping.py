"""Stop fits without a ground truth."""

import math
from collections import deque
from typing import Any, Literal

from torch import Tensor

from deepred_pl.callbacks.base import RestorationCallback, restoration_callbacks
from deepred_pl.checks import as_plain, check_at_least, check_choice
from deepred_pl.lightning import LightningModule, Trainer, rank_zero_warn
from deepred_pl.metrics import GREY_LEVELS
from deepred_pl.model import DeepImagePrior
from deepred_pl.moments import RunningMoments, together

BLOCKS = 5  # in a window, which slides by one of them
RELEASED_AT = 0.5  # of the steps: the rest uses the held-out values too
SURELY = 3.0  # standard errors by which the held-out error has risen

Rule = Literal["variance", "discrepancy", "holdout"]


class AutoStop(RestorationCallback):
    """Stops a fit that begins to learn the noise, and returns the average of its best window.

    A window holds the outputs of the latest `window` θ-steps, and is evaluated every fifth of it:

        variance      The variance of its outputs, which falls while the image forms and rises when
                      noise appears (Wang et al. 2021, arXiv:2112.06074; here the window slides by a
                      fifth, with running means and variances instead of 100 images). The smallest
                      is the best; the fit stops after `patience` θ-steps without a smaller one. A
                      falling learning rate also reduces it, so keep the rate constant.
        discrepancy   Whether the residual of its average has fallen to what the noise explains
                      (Morozov's principle; `InverseProblem.expected_residual`). The first such
                      window is the best, and the fit stops there. Needs a noise model.
        holdout       The error of its average at measured values that the fit does not use, which
                      falls while the image forms and rises when noise is learned (cross-validation;
                      `InverseProblem.hold_out`). The smallest is the best; the fit stops once the
                      error exceeds it by three standard errors of their difference. If it has not
                      after half of the steps, the fit makes the others with all values, and its
                      `result` is returned. Needs held-out values.

    The best window's average becomes the module's `chosen`, which `restored` returns instead of
    `result`, also if the fit ran to its end. Where one trainer has several, for several
    restorations, it stops once all of them have; until then, the image of each is kept.

    Args:
        rule: "variance", "discrepancy" or "holdout".
        window: θ-steps in a window, a multiple of 5, at least 10. A window longer than the run
            disables the callback, with a warning.
        patience: θ-steps without a better window by the rule "variance", at least 1.
        submodule: Dotted name of the restoration inside the trained module; "" is the module.

    Attributes:
        best_step: Last step of the best window, or None.
        stopped: Whether it has found its image, and wants to end the fit.
        released: Whether the held-out values have been released to the fit.

    Raises:
        ValueError: An argument is out of range, or a noise model or held-out values are needed and
            missing.
    """

    chooses = True

    def __init__(
        self,
        rule: Rule = "variance",
        window: int = 100,
        patience: int = 1000,
        submodule: str = "",
    ) -> None:
        super().__init__(submodule)
        window, patience = as_plain(window), as_plain(patience)
        check_choice("rule", rule, Rule)
        if window < 2 * BLOCKS or window % BLOCKS:
            raise ValueError(
                f"window must be a multiple of {BLOCKS}, at least {2 * BLOCKS}, got {window}"
            )
        check_at_least(1, patience=patience)
        self.rule = rule
        self.window = window
        self.patience = patience
        self._reset()

    def _reset(self) -> None:
        self.best_step: int | None = None
        self.stopped = self.released = False
        self._waits = True  # for others to stop, once it has
        self._best = math.inf
        self._errors: Tensor | None = None  # at each held-out value, of the best window
        self._blocks = deque([RunningMoments()], maxlen=BLOCKS)  # of the window; the last grows
        self._on = True

    def check(self, model: DeepImagePrior, trainer: Trainer) -> None:
        super().check(model, trainer)
        if self.rule == "discrepancy" and model.problem is not None and model.problem.noise is None:
            raise ValueError(
                "AutoStop(rule='discrepancy') needs a noise model, but this problem has none; set "
                "noise, or rule='variance'"
            )
        problem = model.problem
        if self.rule == "holdout" and problem is not None and problem.held_out is None:
            raise ValueError(
                "AutoStop(rule='holdout') needs held-out values, but this problem has none; set "
                "data.hold_out to a share such as 0.02, or create the problem by its hold_out()"
            )

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self.rule == "holdout" and math.isfinite(self._best):  # of the first half if released
            found = {"held_out_error": GREY_LEVELS * math.sqrt(self._best)}
        if not self.stopped:
            return found
        return {**found, "stop_reason": f"auto_stop: {self.rule}, best at step {self.best_step}"}

    # Lightning's hooks

    def state_dict(self) -> dict[str, Any]:
        blocks = [block.state_dict() for block in self._blocks]
        settings = {"rule": self.rule, "window": self.window}
        # One that ended the fit looks on if the fit is resumed, perhaps with more patience.
        stopped = self.stopped and self._waits
        found: dict[str, Any] = {"best_step": self.best_step, "best": self._best}
        found |= {"stopped": stopped, "errors": self._errors, "released": self.released}
        return {**found, "blocks": blocks, **settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        before, now = (state_dict["rule"], state_dict["window"]), (self.rule, self.window)
        if before != now:
            raise ValueError(
                f"the checkpoint's AutoStop has rule and window {before}, got {now}; resume with "
                "the same"
            )
        self.best_step, self._best = state_dict["best_step"], state_dict["best"]
        self.stopped = state_dict.get("stopped", False)
        self._errors = state_dict.get("errors")
        # After a roll-back the values are still released.
        self.released = self.released or state_dict.get("released", False)
        self._blocks.clear()
        for state in state_dict["blocks"]:
            self._blocks.append(RunningMoments())
            self._blocks[-1].load_state_dict(state)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._reset()

    def start(self, model: DeepImagePrior, trainer: Trainer) -> None:
        if 0 < trainer.max_steps < self.window:
            self._on = False
            rank_zero_warn(
                f"AutoStop is off: its window of {self.window} θ-steps is longer than the run of "
                f"{trainer.max_steps}; use a shorter window, or more steps"
            )
        if self.released or (self.rule == "holdout" and not self._on):
            self._release(model)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if not self._on or self.stopped or self.released:
            return
        self._blocks[-1].add(self.model.out)
        if self._blocks[-1].count == self.window // BLOCKS:
            if len(self._blocks) == BLOCKS:
                self._evaluate(self.model, trainer)
            self._blocks.append(RunningMoments())  # and drop the oldest

    # The rules

    def _evaluate(self, model: DeepImagePrior, trainer: Trainer) -> None:
        mean, variance = together(self._blocks)
        found, errors = False, None
        if self.rule == "variance":
            value = float(variance.mean())  # waits for the device, five times per window
        elif self.rule == "discrepancy":
            assert model.problem is not None
            ratio = model.problem.residual_ratio(mean)
            assert ratio is not None
            value = float(ratio)
            found = value <= 1
        else:
            assert model.problem is not None
            errors = model.problem.held_out_errors(mean)
            value = float(errors.mean())
            found = self._errors is not None and _has_risen(errors, self._errors)
        if value < self._best:
            self.best_step, self._best = model.step, value
            self._errors = errors
            model.chosen = mean
        waited = model.step - (self.best_step or 0)
        if found or (self.rule == "variance" and waited >= self.patience):
            self.stopped = True
            others = [c for c in restoration_callbacks(trainer) if isinstance(c, AutoStop)]
            if all(other.stopped or not other._on for other in others):
                trainer.should_stop = True
                for other in others:
                    other._waits = False
        elif self.rule == "holdout" and 0 < RELEASED_AT * trainer.max_steps <= model.step:
            self._release(model)

    def roll_back(self, state: dict[str, Any]) -> None:
        super().roll_back(state)
        if self.released:  # which cannot be undone
            self.model.chosen = None

    def _release(self, model: DeepImagePrior) -> None:
        assert model.problem is not None
        self.released = True
        model.problem.release()
        model.chosen = None


def _has_risen(errors: Tensor, best: Tensor) -> bool:
    """Whether the mean of `errors` surely exceeds that of `best`, value by value."""
    rise = errors - best.to(errors.device)
    return bool(rise.mean() > SURELY * rise.std() / math.sqrt(rise.numel()))
