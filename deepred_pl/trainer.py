"""The Trainer of a fit: its epochs, and the settings that a restoration cannot use."""

import os
from collections.abc import Iterator
from functools import cache
from itertools import repeat
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from deepred_pl.checks import RestorationWarning
from deepred_pl.lightning import (
    LightningModule,
    Trainer,
    callbacks,
    rank_zero_info,
    rank_zero_warn,
)
from deepred_pl.operators import is_adapted

if TYPE_CHECKING:
    from deepred_pl.model import DeepImagePrior

# Lightning's callbacks that average weights; older versions have only some of them.
AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")
EPOCH = 50  # θ-steps, Lightning's default of log_every_n_steps


class Epoch:
    """An epoch of θ-steps: zeros, because y is already on the device.

    It has no state, but says so, because Lightning warns when it resumes an epoch without one.
    """

    def __init__(self, trainer: Trainer | None) -> None:
        """Make as many steps as the trainer logs once, so that callbacks see every logged value."""
        self._length = (trainer.log_every_n_steps if trainer else None) or EPOCH

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        return repeat(0, self._length)

    def state_dict(self) -> dict[str, Any]:
        """Nothing: all steps are alike."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing."""


def check_trainer(model: LightningModule, trainer: Trainer) -> None:
    """Refuse Trainer settings that the fit of one image, trained directly, cannot use.

    Raises:
        ValueError: Several devices, accumulated gradients, no end, a compiled module, or callbacks
            that average weights.
    """
    check_shared(trainer)
    accumulated: Any = trainer.accumulate_grad_batches
    for callback in trainer.callbacks:
        if isinstance(callback, callbacks.GradientAccumulationScheduler):
            accumulated = callback.scheduling
    if accumulated != 1:
        raise ValueError(
            "a θ-step is one pass over the one image: expected accumulate_grad_batches=1, got "
            f"{accumulated}; average_decay smooths over steps"
        )
    if trainer.max_steps == -1 and not _has_timer(trainer):
        raise ValueError(
            "a fit is measured in steps: expected max_steps or max_time, got neither; set "
            "max_steps, for example Trainer(max_steps=3000)"
        )
    if model._compiler_ctx is not None:  # set by Lightning for torch.compile; checked with 2.6
        raise ValueError(
            f"expected a {type(model).__name__} that is not compiled, got torch.compile's, which "
            "recompiles at every step; compile=True compiles only the network"
        )


def check_shared(trainer: Trainer) -> None:
    """Refuse Trainer settings that no restoration can use, neither alone nor inside a parent.

    Raises:
        ValueError: Several devices, or callbacks that average weights.
    """
    devices = trainer.num_devices * trainer.num_nodes
    if devices > 1:
        raise ValueError(
            f"a fit of one image uses one device: expected devices=1, got {devices}; set "
            "trainer.devices to 1, and restore many images with `deepred restore`"
        )
    kinds = tuple(getattr(callbacks, name, ()) for name in AVERAGING)
    for callback in trainer.callbacks:
        if isinstance(callback, kinds):
            raise ValueError(
                f"{type(callback).__name__} averages weights, but the result is made of images "
                "that the network gave during the fit: leave it out; `average` is the exponential "
                "average of these images (average_decay)"
            )


def check_fit(model: "DeepImagePrior", trainer: Trainer) -> None:
    """Check the fit of a restoration, alone or inside a parent, before it starts.

    Raises:
        RuntimeError: It has no problem.
        ValueError: The trainer, or an optimizer of its parameters, has settings that it cannot use.
    """
    network = model.trainable_network()
    check_shared(trainer)
    trained = {*network.parameters()}
    for optimizer in trainer.optimizers:
        if any(trained & {*group["params"]} for group in optimizer.param_groups):
            check_optimizer(optimizer, trainer)
    assert model.problem is not None
    learned = optimized(trainer)
    if trained and not trained & learned and trainer.optimizers:
        rank_zero_warn(
            "No optimizer has the parameters of the restoration's network, which will stay as it "
            "is: give them to one in configure_optimizers, and set the optimizers up again "
            "(trainer.strategy.setup_optimizers) after a restoration is replaced.",
            category=RestorationWarning,
        )
    adapted = is_adapted(model.problem.operator)
    fixed = [
        f"problem.{name}"
        for name, parameter in model.problem.named_parameters()
        if parameter.requires_grad and (adapted or parameter not in learned)
    ]
    if fixed:
        why = (
            "no gradient reaches the parameters of an operator with A and A_adjoint; derive it "
            "from Operator"
            if adapted
            else "no optimizer has them; a parent module's configure_optimizers can"
        )
        rank_zero_warn(
            f"{', '.join(fixed)} will stay as they are: {why}.", category=RestorationWarning
        )
    if os.environ.get("PL_GLOBAL_SEED"):
        _say_that_seeds_are_settings()


@cache
def _say_that_seeds_are_settings() -> None:
    rank_zero_info(
        "seed_everything does not change θ₀, z and the input noise, which model.seed determines, "
        "nor a simulated degradation (data.seed)."
    )


def check_end(trainer: Trainer) -> None:
    """Raise ValueError if max_epochs never ends a fit that it should end; called as it starts."""
    endless = trainer.num_training_batches == float("inf") and trainer.max_steps == -1
    if endless and trainer.max_epochs != -1 and not _has_timer(trainer):
        raise ValueError(
            f"max_epochs={trainer.max_epochs} never ends a fit whose training dataloader has no "
            "end; set max_steps, or return the restoration's train_dataloader(), which has epochs "
            "of log_every_n_steps steps"
        )


def check_epochs(trainer: Trainer) -> None:
    """Raise ValueError if max_epochs ends the fit of one image before max_steps or max_time."""
    chosen = trainer.limit_train_batches != 1.0 or trainer.overfit_batches or trainer.fast_dev_run
    if chosen or not isinstance(trainer.train_dataloader, Epoch):
        return
    steps = max(0, trainer.max_epochs or 0) * trainer.num_training_batches
    if 0 < steps < trainer.max_steps or (steps and trainer.max_steps == -1):
        raise ValueError(
            f"max_epochs={trainer.max_epochs} would end the fit after {steps} θ-steps, because an "
            f"epoch has log_every_n_steps={trainer.num_training_batches}; leave max_epochs out"
        )


def _has_timer(trainer: Trainer) -> bool:
    return any(isinstance(callback, callbacks.Timer) for callback in trainer.callbacks)


def optimized(trainer: Trainer) -> set[Tensor]:
    """The parameters of the trainer's optimizers, during a fit."""
    groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
    return {parameter for group in groups for parameter in group["params"]}


def check_optimizer(optimizer: Optimizer, trainer: Trainer) -> None:
    """Refuse an optimizer that a restoration cannot use with this trainer.

    Raises:
        ValueError: L-BFGS, or a fused optimizer with gradient clipping in mixed precision.
    """
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            "LBFGS evaluates the loss many times per step, but every evaluation is a θ-step with "
            "other input noise, and counts as one: use another optimizer, such as Adam"
        )
    fused = any(group.get("fused") for group in optimizer.param_groups)
    if fused and trainer.gradient_clip_val and "mixed" in str(trainer.precision):
        raise ValueError(
            f"gradients in {trainer.precision} precision cannot be clipped with a fused optimizer; "
            "set the optimizer's fused to false, or leave gradient_clip_val out"
        )
