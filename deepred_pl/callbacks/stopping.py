"""Stop fits without a ground truth."""

import math
from collections import deque
from typing import Any, Literal

from deepred_pl.callbacks.base import RestorationCallback, restoration_callbacks
from deepred_pl.checks import as_plain, check_at_least, check_choice
from deepred_pl.lightning import LightningModule, Trainer, rank_zero_warn
from deepred_pl.model import DeepImagePrior
from deepred_pl.moments import RunningMoments, together

BLOCKS = 5  # in a window, which slides by one of them

Rule = Literal["variance", "discrepancy"]


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

    The best window's average becomes the module's `chosen`, which `restored` returns instead of
    `result`, also if the fit ran to its end. Where one trainer has several, for several
    restorations, it stops once all of them have; until then, the image of each is kept.

    Args:
        rule: "variance" or "discrepancy".
        window: θ-steps in a window, a multiple of 5, at least 10. A window longer than the run
            disables the callback, with a warning.
        patience: θ-steps without a better window, at least 1.
        submodule: Dotted name of the restoration inside the trained module; "" is the module.

    Attributes:
        best_step: Last step of the best window, or None.
        stopped: Whether it has found its image, and wants to end the fit.

    Raises:
        ValueError: An argument is out of range, or a noise model is needed and missing.
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
        self.stopped = False
        self._waits = True  # for others to stop, once it has
        self._best = math.inf
        self._blocks = deque([RunningMoments()], maxlen=BLOCKS)  # of the window; the last grows
        self._on = True

    def check(self, model: DeepImagePrior, trainer: Trainer) -> None:
        super().check(model, trainer)
        if self.rule == "discrepancy" and model.problem is not None and model.problem.noise is None:
            raise ValueError(
                "AutoStop(rule='discrepancy') needs a noise model, but this problem has none; set "
                "noise, or rule='variance'"
            )

    def summary(self) -> dict[str, Any]:
        if not self.stopped:
            return {}
        return {"stop_reason": f"auto_stop: {self.rule}, best at step {self.best_step}"}

    # Lightning's hooks

    def state_dict(self) -> dict[str, Any]:
        blocks = [block.state_dict() for block in self._blocks]
        settings = {"rule": self.rule, "window": self.window}
        # One that ended the fit looks on if the fit is resumed, perhaps with more patience.
        stopped = self.stopped and self._waits
        found = {"best_step": self.best_step, "best": self._best, "stopped": stopped}
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

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if not self._on or self.stopped:
            return
        self._blocks[-1].add(self.model.out)
        if self._blocks[-1].count == self.window // BLOCKS:
            if len(self._blocks) == BLOCKS:
                self._evaluate(self.model, trainer)
            self._blocks.append(RunningMoments())  # and drop the oldest

    # The rules

    def _evaluate(self, model: DeepImagePrior, trainer: Trainer) -> None:
        mean, variance = together(self._blocks)
        if self.rule == "variance":
            value = float(variance.mean())  # waits for the device, five times per window
            found = False
        else:
            assert model.problem is not None
            ratio = model.problem.residual_ratio(mean)
            assert ratio is not None
            value = float(ratio)
            found = value <= 1
        if value < self._best:
            self.best_step, self._best = model.step, value
            model.chosen = mean
        waited = model.step - (self.best_step or 0)
        if found or (self.rule == "variance" and waited >= self.patience):
            self.stopped = True
            others = [c for c in restoration_callbacks(trainer) if isinstance(c, AutoStop)]
            if all(other.stopped or not other._on for other in others):
                trainer.should_stop = True
                for other in others:
                    other._waits = False
