"""Roll back fits that collapse."""

import math
from typing import Any

from torch import Tensor

from deepred_pl.callbacks.base import RestorationCallback, stability
from deepred_pl.checks import as_plain, check_at_least
from deepred_pl.lightning import LightningModule, Trainer, rank_zero_info
from deepred_pl.model import DeepImagePrior

RECENT = 0.2  # weight of the latest check in the usual PSNR
FORGOTTEN = 2.0  # spans of `average`, 1 / (1 − decay) θ-steps each, until its start is forgotten
HARMLESS = 30.0  # dB; above, a loss of PSNR(out, average) is not a collapse
CONSTANT = ("problem.", "chosen", "z")  # buffers that no θ-step writes into
DIP_PERIOD = 10  # θ-steps between two checks without a denoiser


class CollapseGuard(RestorationCallback):
    """Rolls a collapsing fit back to its last good state: network, optimizer, x, u and job.

    At each denoising of the trainer's `REDUpdate`, or every 10 θ-steps without one, it compares
    `out` with `average`, the recent output (with average_decay=0 that is `out`, and only NaN is
    detected). Between two checks their PSNR falls by less than 2 dB in ordinary fits of
    photographs. A loss of more than `drop` is a collapse, once `average` has forgotten its start
    (after 2 / (1 − its decay) θ-steps, 200); NaN counts as one at any time. The fit then continues
    from its last good state, with the input noise and the learning rate of the present step. A loss
    that persists is not a collapse: the usual PSNR follows it.

    It must precede `REDUpdate` among the callbacks, so that no x is computed from a bad `out`. Each
    check waits for the device once, and copies network and optimizer.

    Args:
        drop: Loss of PSNR(out, average) that counts as a collapse, in dB, > 0.
        patience: Consecutive checks that may find NaN before the fit ends, at least 1.
        submodule: Dotted name of the restoration inside the trained module; "" is the module.

    Attributes:
        rollbacks: Number of roll-backs.

    Raises:
        ValueError: An argument is out of range, or there is no restoration at `submodule`.
        RuntimeError: NaN in more than `patience` checks in a row, or at the start.
    """

    def __init__(self, drop: float = 6.0, patience: int = 3, submodule: str = "") -> None:
        super().__init__(submodule)
        drop, patience = as_plain(drop), as_plain(patience)
        check_at_least(1, patience=patience)
        if not drop > 0:
            raise ValueError(f"drop must be > 0 dB, got {drop}; with .inf only NaN is a collapse")
        self.drop = drop
        self.patience = patience
        self.rollbacks = 0
        self._usual = math.nan  # PSNR(out, average) at the recent checks, in dB
        self._failures = 0  # checks in a row that found NaN
        self._every_n_steps = DIP_PERIOD
        self._checks = 0
        self._good: _State | None = None

    def check(self, model: DeepImagePrior, trainer: Trainer) -> None:
        super().check(model, trainer)
        position = trainer.callbacks.index
        if any(c.period and position(c) < position(self) for c in self.siblings(trainer)):
            raise ValueError(
                "expected CollapseGuard before REDUpdate among the trainer's callbacks, got it "
                "after; x would be computed from a collapsed output: change their order"
            )

    def summary(self) -> dict[str, Any]:
        return {"rollbacks": self.rollbacks}

    # Lightning's hooks

    def state_dict(self) -> dict[str, Any]:
        return {"rollbacks": self.rollbacks, "usual": self._usual, "failures": self._failures}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rollbacks, self._usual = state_dict["rollbacks"], state_dict["usual"]
        self._failures = state_dict["failures"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.rollbacks, self._usual, self._failures = 0, math.nan, 0

    def start(self, model: DeepImagePrior, trainer: Trainer) -> None:
        periods = [c.period for c in self.siblings(trainer) if c.period]
        self._every_n_steps = min(periods, default=DIP_PERIOD)
        self._checks = model.step // self._every_n_steps
        if not math.isfinite(stability(model)):
            raise RuntimeError(
                f"expected a finite state to continue from, got NaN at step {model.step}; "
                "resume from an earlier checkpoint, or start without one"
            )
        self._good = _State(self, trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if self.model.step // self._every_n_steps > self._checks:
            self._checks = self.model.step // self._every_n_steps
            self._look(self.model, trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.model.step % self._every_n_steps:  # before anything is written
            self._look(self.model, trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._good = None
        super().teardown(trainer, pl_module, stage)

    # The guard

    def _look(self, model: DeepImagePrior, trainer: Trainer) -> None:
        level = float(stability(model))  # the only wait for the device
        if not math.isfinite(level):
            self._failures += 1
            if self._failures > self.patience:
                raise RuntimeError(
                    f"the fit produced NaN in {self._failures} checks in a row, the last at step "
                    f"{model.step}, although it was rolled back each time; use a lower learning "
                    "rate, or trainer.precision 32"
                )
            self._roll_back_all(model, "produced NaN")
            return
        self._failures = 0
        fresh = model.step * (1 - model.average_decay) < FORGOTTEN
        lost = 0.0 if fresh or math.isnan(self._usual) else self._usual - level
        self._usual = level if lost == 0 else self._usual - RECENT * lost
        if lost > self.drop and level < HARMLESS:
            self._roll_back_all(model, f"lost {lost:.1f} dB against its recent output")
        else:
            self._good = _State(self, trainer)

    def _roll_back_all(self, model: DeepImagePrior, why: str) -> None:
        assert self._good is not None
        self.rollbacks += 1
        self._good.restore()
        rank_zero_info(f"Step {model.step}: the fit {why}; rolled back to its last good state.")


class _State:
    """A copy of what changes in a fit, except for the step."""

    def __init__(self, guard: CollapseGuard, trainer: Trainer) -> None:
        self._model = model = guard.model
        assert model.network is not None
        self._tensors = {
            name: value.clone()
            for name, value in model.state_dict().items()
            if isinstance(value, Tensor) and not name.startswith(CONSTANT)
        }
        parameters = set(model.network.parameters())
        self._optimized = [
            (optimizer, p, _cloned(optimizer.state.get(p, {})))
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
            if p in parameters
        ]
        # Not copied: whoever sets `chosen`, or keeps tensors of its own, never writes into them.
        self._chosen = model.chosen
        self._siblings = [(c, c.state_dict()) for c in guard.siblings(trainer)]

    def restore(self) -> None:
        """Restore it; it can be restored again."""
        self._model.load_state_dict(self._tensors, strict=False)  # but not the step
        self._model.chosen = self._chosen
        for optimizer, parameter, state in self._optimized:
            optimizer.state[parameter] = _cloned(state)
        for callback, state in self._siblings:
            callback.roll_back(state)


def _cloned(state: dict) -> dict:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
