"""Roll back fits that collapse."""

import math
from typing import Any

import torch
from torch import Tensor

from deepred_pl.callbacks.base import RestorationCallback, stability
from deepred_pl.checks import as_plain, check_at_least
from deepred_pl.lightning import LightningModule, Trainer, rank_zero_info
from deepred_pl.model import DeepImagePrior
from deepred_pl.operators import unknown_blur

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

    A check is judged at the next one, when its PSNR has long arrived from a GPU, before
    `LastCheckpoint` saves, or at the end of the fit. Two copies of network, optimizer and images
    are kept: the last good state, and that of the latest check.

    It must precede `REDUpdate` among the callbacks: the round of the step that rolls back starts
    from the state that was restored.

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
        self._every_n_steps = DIP_PERIOD
        self._checks = 0
        self._reset()

    def _reset(self) -> None:
        self.rollbacks = 0
        self._usual = math.nan  # PSNR(out, average) at the recent checks, in dB
        self._failures = 0  # checks in a row that found NaN
        self._level: _OnHost | float | None = None  # PSNR of the latest check, not judged yet
        self._fresh = True  # whether `average` still remembered its start at that check
        self._good, self._candidate = _State(), _State()

    def check(self, model: DeepImagePrior, trainer: Trainer) -> None:
        super().check(model, trainer)
        position = trainer.callbacks.index
        if any(c.period and position(c) < position(self) for c in self.siblings(trainer)):
            raise ValueError(
                "expected CollapseGuard before REDUpdate among the trainer's callbacks, got it "
                "after; after a roll-back x would be computed from the collapsed output: change "
                "their order"
            )

    def summary(self) -> dict[str, Any]:
        return {"rollbacks": self.rollbacks}

    # Lightning's hooks

    def state_dict(self) -> dict[str, Any]:
        level = None if self._level is None else float(self._level)
        counts = {"rollbacks": self.rollbacks, "failures": self._failures}
        return {**counts, "usual": self._usual, "level": level, "fresh": self._fresh}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rollbacks, self._usual = state_dict["rollbacks"], state_dict["usual"]
        self._failures, self._level = state_dict["failures"], state_dict.get("level")
        self._fresh = state_dict.get("fresh", False)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._reset()

    def start(self, model: DeepImagePrior, trainer: Trainer) -> None:
        periods = [c.period for c in self.siblings(trainer) if c.period]
        self._every_n_steps = min(periods, default=DIP_PERIOD)
        self._checks = model.step // self._every_n_steps
        if not math.isfinite(stability(model)):
            raise RuntimeError(
                f"expected a finite state to continue from, got NaN at step {model.step}; "
                "resume from an earlier checkpoint, or start without one"
            )
        self._good.take(self, trainer)
        if self._level is not None:  # of a check before a resumed fit's checkpoint
            self._candidate.take(self, trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if self.model.step // self._every_n_steps > self._checks:
            self._checks = self.model.step // self._every_n_steps
            self._look(self.model, trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = self.model  # before anything is written
        if self._judge(model) and model.step % self._every_n_steps:
            usual = self._usual
            self._look(model, trainer)
            if self._judge(model):
                self._usual = usual  # so that a resumed fit, without this check, is the same

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._level, self._good, self._candidate = None, _State(), _State()
        super().teardown(trainer, pl_module, stage)

    # The guard

    def settle(self) -> None:
        self._judge(self.model)

    def _look(self, model: DeepImagePrior, trainer: Trainer) -> None:
        """Judge the latest check; unless that rolls the fit back, make another one."""
        if self._judge(model):
            self._level = _OnHost(stability(model))
            self._fresh = model.step * (1 - model.average_decay) < FORGOTTEN
            self._candidate.take(self, trainer)

    def _judge(self, model: DeepImagePrior) -> bool:
        """Judge the latest check: keep its state as the last good one, or roll the fit back."""
        if self._level is None:
            return True
        level, self._level = float(self._level), None
        if not math.isfinite(level):
            self._failures += 1
            if self._failures > self.patience:
                raise RuntimeError(
                    f"the fit produced NaN in {self._failures} checks in a row, the last before "
                    f"step {model.step}, although it was rolled back each time; use a lower "
                    "learning rate, or trainer.precision 32"
                )
            self._roll_back_all(model, "produced NaN")
            return False
        self._failures = 0
        lost = 0.0 if self._fresh or math.isnan(self._usual) else self._usual - level
        self._usual = level if lost == 0 else self._usual - RECENT * lost
        if lost > self.drop and level < HARMLESS:
            self._roll_back_all(model, f"lost {lost:.1f} dB against its recent output")
            return False
        self._good, self._candidate = self._candidate, self._good
        return True

    def _roll_back_all(self, model: DeepImagePrior, why: str) -> None:
        self.rollbacks += 1
        self._good.restore()
        rank_zero_info(f"Step {model.step}: the fit {why}; rolled back to its last good state.")


class _OnHost:
    """A number on its way from a device, for which nothing waits until it is read."""

    def __init__(self, number: Tensor) -> None:
        self._number = number.to("cpu", non_blocking=True)
        self._arrived = torch.cuda.Event(blocking=True) if number.is_cuda else None
        if self._arrived is not None:
            self._arrived.record(torch.cuda.current_stream(number.device))

    def __float__(self) -> float:
        if self._arrived is not None:
            self._arrived.synchronize()
        return float(self._number)


class _State:
    """A copy of what changes in a fit, except for the step, in memory that it uses again."""

    def __init__(self) -> None:
        self._copies: dict[Any, Tensor] = {}

    @torch.no_grad()
    def take(self, guard: CollapseGuard, trainer: Trainer) -> None:
        """Copy the present state, in few calls."""
        self._model = model = guard.model
        assert model.network is not None
        parameters = set(model.network.parameters())
        optimized = [
            (optimizer, p, optimizer.state.get(p, {}))
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
            if p in parameters
        ]
        tensors: dict[Any, Tensor] = _changing(model)
        for i, (_, _, state) in enumerate(optimized):
            tensors |= {(i, key): v for key, v in state.items() if isinstance(v, Tensor)}
        self._copy(tensors)
        self._optimized = [
            (optimizer, p, {key: self._copies.get((i, key), v) for key, v in state.items()})
            for i, (optimizer, p, state) in enumerate(optimized)
        ]
        # Not copied: whoever sets `chosen`, or keeps tensors of its own, never writes into them.
        self._chosen = model.chosen
        self._siblings = [(c, c.state_dict()) for c in guard.siblings(trainer)]

    def _copy(self, tensors: dict[Any, Tensor]) -> None:
        # One call copies all if they have one device and one type, as with the default optimizer.
        if _strides(tensors) == _strides(self._copies):
            torch._foreach_copy_([self._copies[key] for key in tensors], [*tensors.values()])
        else:  # the optimizer's state is new, or x has another layout
            self._copies = {key: tensor.clone() for key, tensor in tensors.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Restore it; it can be restored again."""
        for key, tensor in _changing(self._model).items():
            tensor.copy_(self._copies[key])
        self._model.chosen = self._chosen
        for optimizer, parameter, state in self._optimized:
            optimizer.state[parameter] = {
                k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()
            }
        for callback, plain in self._siblings:
            callback.roll_back(plain)


def _changing(model: DeepImagePrior) -> dict[Any, Tensor]:
    """The parameters and buffers that change in a fit, by their names."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    changing = {name: tensor for name, tensor in tensors if not name.startswith(CONSTANT)}
    blur = None if model.problem is None else unknown_blur(model.problem.operator)
    return changing if blur is None else {**changing, "kernel": blur.kernel}


def _strides(tensors: dict[Any, Tensor]) -> dict[Any, tuple[int, ...]]:
    return {key: tensor.stride() for key, tensor in tensors.items()}
