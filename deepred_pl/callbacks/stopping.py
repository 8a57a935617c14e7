"""Stopping without a ground truth."""

import math
from collections import deque
from typing import Any, Literal

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from deepred_pl.callbacks.langevin import Langevin
from deepred_pl.model import DeepImagePrior, find_restoration
from deepred_pl.moments import RunningMoments, together

BLOCKS = 5  # in a window, which slides by one of them


class AutoStop(Callback):
    """Stops a fit that begins to learn the noise, and returns its best window's average.

    A window holds the outputs of the latest `window` θ-steps. Every fifth of it, it is judged:

        variance      The variance of its outputs. It falls while the image forms and rises when
                      the noise comes (Wang et al. 2021, arXiv:2112.06074; here the window slides
                      by a fifth, whose running means and variances take the place of 100 images).
                      The least one is the best; the fit stops when none was better for `patience`
                      θ-steps. A learning rate that falls makes it fall too, so it wants a
                      constant one.
        discrepancy   Whether the residual of its average is down to what the noise makes of it
                      (Morozov's principle; `InverseProblem.expected_residual`). The first such
                      window is the best, and the fit stops there. It needs a noise model.

    The best window's average becomes the module's `chosen`, which `restored` returns instead of
    what `result` says, also where the fit ran to its end.

    Args:
        rule: "variance" or "discrepancy".
        window: θ-steps in a window, a multiple of 5, at least 10. A window longer than the run
            switches the callback off, with a warning.
        patience: θ-steps without a better window, at least 1.
        submodule: Dotted name of the restoration inside the trained module; "" is the module.

    Attributes:
        best_step: Last step of the best window, or None.
        stopped: Whether it ended the fit.

    Raises:
        ValueError: An argument out of range, or no noise model where one is needed.
    """

    def __init__(
        self,
        rule: Literal["variance", "discrepancy"] = "variance",
        window: int = 100,
        patience: int = 1000,
        submodule: str = "",
    ) -> None:
        if rule not in ("variance", "discrepancy"):
            raise ValueError(f"rule must be 'variance' or 'discrepancy', got {rule!r}")
        if window < 2 * BLOCKS or window % BLOCKS:
            raise ValueError(
                f"window must be a multiple of {BLOCKS}, at least {2 * BLOCKS}, got {window}"
            )
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        self.rule = rule
        self.window = window
        self.patience = patience
        self.submodule = submodule
        self._reset()

    def _reset(self) -> None:
        self.best_step: int | None = None
        self.stopped = False
        self._best = math.inf
        self._blocks = deque([RunningMoments()], maxlen=BLOCKS)  # of the window; the last grows
        self._on = True
        self._model: DeepImagePrior | None = None

    # Lightning's hooks

    @property
    def state_key(self) -> str:
        return self._generate_state_key(submodule=self.submodule)

    def state_dict(self) -> dict[str, Any]:
        blocks = [block.state_dict() for block in self._blocks]
        settings = {"rule": self.rule, "window": self.window}
        return {"best_step": self.best_step, "best": self._best, "blocks": blocks, **settings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        before, now = (state_dict["rule"], state_dict["window"]), (self.rule, self.window)
        if before != now:
            raise ValueError(
                f"the checkpoint's AutoStop has rule and window {before}, got {now}; a fit that "
                "goes on keeps them"
            )
        self.best_step, self._best = state_dict["best_step"], state_dict["best"]
        self._blocks.clear()
        for state in state_dict["blocks"]:
            self._blocks.append(RunningMoments())
            self._blocks[-1].load_state_dict(state)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._reset()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._model = find_restoration(pl_module, self.submodule)
        self.check(self._model, trainer)
        if 0 < trainer.max_steps < self.window:
            self._on = False
            rank_zero_warn(
                f"AutoStop is off: its window of {self.window} θ-steps is longer than the run of "
                f"{trainer.max_steps}; take a shorter window, or more steps"
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if not self._on:
            return
        assert self._model is not None
        self._blocks[-1].add(self._model.out)
        if self._blocks[-1].count == self.window // BLOCKS:
            if len(self._blocks) == BLOCKS:
                self._judge(self._model, trainer)
            self._blocks.append(RunningMoments())  # and drop the oldest

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._model = None

    def check(self, model: DeepImagePrior, trainer: Trainer) -> None:
        """Refuse what it cannot judge; called before the fit.

        Raises:
            ValueError: The discrepancy rule without a noise model, or a `Langevin` beside it.
        """
        if self.rule == "discrepancy" and model.problem is not None and model.problem.noise is None:
            raise ValueError(
                "AutoStop(rule='discrepancy') needs a noise model, and this problem has none; "
                "give noise, or rule='variance'"
            )
        others = [c for c in trainer.callbacks if isinstance(c, Langevin)]
        if any(c.submodule == self.submodule for c in others):
            raise ValueError(
                "expected AutoStop or Langevin, got both, and each chooses the image that is "
                "returned: leave one out"
            )

    # The rules

    def _judge(self, model: DeepImagePrior, trainer: Trainer) -> None:
        mean, variance = together(self._blocks)
        if self.rule == "variance":
            value = float(variance.mean())  # waits for the device, five times in a window
            found = False
        else:
            assert model.problem is not None
            expected = model.problem.expected_residual(mean)
            assert expected is not None
            value = float(model.problem.residual(mean) / expected)
            found = value <= 1
        if value < self._best:
            self.best_step, self._best = model.step, value
            model.chosen = mean
        waited = model.step - (self.best_step or 0)
        if found or (self.rule == "variance" and waited >= self.patience):
            self.stopped = trainer.should_stop = True
