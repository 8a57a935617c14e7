"""A way back for a fit that collapses."""

import math
from typing import Any, TypeVar

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor

from deepred_pl.callbacks.langevin import Langevin
from deepred_pl.callbacks.red import REDUpdate
from deepred_pl.callbacks.stopping import AutoStop
from deepred_pl.model import DeepImagePrior, find_restoration

C = TypeVar("C", REDUpdate, AutoStop, Langevin)

RECENT = 0.2  # weight of the latest look in the usual PSNR
FORGOTTEN = 2.0  # spans of `average`, 1 / (1 − decay) θ-steps each, until its start is forgotten
HARMLESS = 30.0  # dB; out and average this near each other are no collapse, whatever was usual
DIP_ROUND = 10  # θ-steps between two looks where no REDUpdate has rounds


class CollapseGuard(Callback):
    """Takes a fit that collapses back to its last good state: network, optimizer, x, u and job.

    At each denoiser round of the `REDUpdate`, or every 10 θ-steps without one, it compares `out`
    with `average`, what the fit gave recently (with average_decay=0 that is `out`, and NaN alone
    is seen). From one look to the next their PSNR falls by less than 2 dB in ordinary fits of
    photographs; small spikes are left alone. A loss of more than `drop` is a collapse, once
    `average` has forgotten its start (after 2 / (1 − its decay) θ-steps, 200); NaN is one at any
    time. The fit then goes on from its last good state, with the input noise and the learning rate
    of the present step. A loss that stays is no collapse: what is usual follows it.

    It must stand before `REDUpdate` among the callbacks, so that no x is made of a bad `out`. Each
    look waits for the device once, and copies network and optimizer.

    Args:
        drop: Loss of PSNR(out, average) that is a collapse, in dB, > 0.
        patience: How many looks in a row may find NaN, at least 1.
        submodule: Dotted name of the restoration inside the trained module; "" is the module.

    Attributes:
        rollbacks: How often the fit was taken back.

    Raises:
        ValueError: An argument out of range, or no restoration where `submodule` says.
        RuntimeError: NaN at more than `patience` looks in a row, or at the start.
    """

    def __init__(self, drop: float = 6.0, patience: int = 3, submodule: str = "") -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        if not drop > 0:
            raise ValueError(f"drop must be > 0 dB, got {drop}; .inf leaves all but NaN alone")
        self.drop = drop
        self.patience = patience
        self.submodule = submodule
        self.rollbacks = 0
        self._usual = math.nan  # PSNR(out, average) at the recent looks, in dB
        self._failures = 0  # looks in a row that found NaN
        self._every_n_steps = DIP_ROUND
        self._looks = 0
        self._model: DeepImagePrior | None = None
        self._good: _State | None = None

    # Lightning's hooks

    @property
    def state_key(self) -> str:
        return self._generate_state_key(submodule=self.submodule)

    def state_dict(self) -> dict[str, Any]:
        return {"rollbacks": self.rollbacks, "usual": self._usual, "failures": self._failures}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rollbacks, self._usual = state_dict["rollbacks"], state_dict["usual"]
        self._failures = state_dict["failures"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.rollbacks, self._usual, self._failures = 0, math.nan, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._model = model = find_restoration(pl_module, self.submodule)
        updates = _of(REDUpdate, self.submodule, trainer)
        if any(trainer.callbacks.index(u) < trainer.callbacks.index(self) for u in updates):
            raise ValueError(
                "expected CollapseGuard before REDUpdate among the trainer's callbacks, got it "
                "behind; x would be made of a collapsed output: change their order"
            )
        rounds = [u.every_n_steps * u.rounds_per_denoising for u in updates]
        self._every_n_steps = min(rounds, default=DIP_ROUND)
        self._looks = model.step // self._every_n_steps
        if not is_finite(model):
            raise RuntimeError(
                f"expected a finite state to go on from, got NaN at step {model.step}; give an "
                "earlier checkpoint, or start without"
            )
        self._good = _State(model, self.submodule, trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        assert self._model is not None
        if self._model.step // self._every_n_steps > self._looks:
            self._looks = self._model.step // self._every_n_steps
            self._look(self._model, trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self._model is not None
        if self._model.step % self._every_n_steps:  # before anything is written
            self._look(self._model, trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._model = self._good = None

    # The guard

    def _look(self, model: DeepImagePrior, trainer: Trainer) -> None:
        level = float(_level(model))  # the one wait for the device
        if not math.isfinite(level):
            self._failures += 1
            if self._failures > self.patience:
                raise RuntimeError(
                    f"the fit gave NaN at {self._failures} looks in a row, the last at step "
                    f"{model.step}, and each time went on from its last good state; take a lower "
                    "learning rate, or --trainer.precision 32"
                )
            self._go_back(model, trainer, "gave NaN")
            return
        self._failures = 0
        fresh = model.step * (1 - model.average_decay) < FORGOTTEN
        lost = 0.0 if fresh or math.isnan(self._usual) else self._usual - level
        self._usual = level if lost == 0 else self._usual - RECENT * lost
        if lost > self.drop and level < HARMLESS:
            self._go_back(model, trainer, f"lost {lost:.1f} dB against its recent output")
        else:
            self._good = _State(model, self.submodule, trainer)

    def _go_back(self, model: DeepImagePrior, trainer: Trainer, why: str) -> None:
        self.rollbacks += 1
        assert self._good is not None
        self._good.restore()  # first: what comes next may be interrupted
        for update in _of(REDUpdate, self.submodule, trainer):
            update.discard()
        rank_zero_info(f"step {model.step}: the fit {why}; it goes on from its last good state")


def rollbacks(trainer: Trainer) -> int:
    """How often the trainer's fits were taken back."""
    return sum(c.rollbacks for c in trainer.callbacks if isinstance(c, CollapseGuard))


def is_finite(model: DeepImagePrior) -> bool:
    """Whether a fit can go on from a model's state; waits for the device once."""
    return math.isfinite(_level(model))


@torch.no_grad()
def _level(model: DeepImagePrior) -> Tensor:
    """PSNR(out, average) in dB, 0-dim; NaN where they or the network are not finite."""
    assert model.network is not None
    norms = torch._foreach_norm([p.detach() for p in model.network.parameters()])
    distance = (model.out - model.average).square().mean().clamp(min=1e-12)
    return -10 * torch.log10(distance) + 0 * torch.stack(norms).sum()  # 0 · NaN is NaN


class _State:
    """A copy of everything a fit goes on from but the problem and the step."""

    def __init__(self, model: DeepImagePrior, submodule: str, trainer: Trainer) -> None:
        assert model.network is not None
        self._model = model
        self._tensors = {
            name: value.clone()
            for name, value in model.state_dict().items()
            if isinstance(value, Tensor) and not name.startswith(("problem.", "chosen"))
        }
        parameters = set(model.network.parameters())
        self._optimized = [
            (optimizer, p, _cloned(optimizer.state.get(p, {})))
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
            for p in group["params"]
            if p in parameters
        ]
        # What chooses an image goes back with the fit; these never write into a tensor.
        self._chosen = model.chosen
        choosing = [*_of(AutoStop, submodule, trainer), *_of(Langevin, submodule, trainer)]
        self._callbacks = [(callback, callback.state_dict()) for callback in choosing]

    def restore(self) -> None:
        """Put it back, as often as need be."""
        self._model.load_state_dict(self._tensors, strict=False)  # the step goes on
        self._model.chosen = self._chosen
        for optimizer, parameter, state in self._optimized:
            optimizer.state[parameter] = _cloned(state)
        for callback, state in self._callbacks:
            callback.load_state_dict(state)


def _of(kind: type[C], submodule: str, trainer: Trainer) -> list[C]:
    """The trainer's callbacks of a kind that act on the submodule."""
    return [c for c in trainer.callbacks if isinstance(c, kind) and c.submodule == submodule]


def _cloned(state: dict) -> dict:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
