"""Refuse Trainer settings that the fit of one image cannot use."""

from typing import Any

from pytorch_lightning import LightningModule, Trainer, callbacks
from torch.optim import Optimizer

# Lightning's callbacks that average weights; older versions have only some of them.
AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


def check_trainer(model: LightningModule, trainer: Trainer) -> None:
    """Refuse Trainer settings that a restoration cannot use; called before the fit.

    Raises:
        ValueError: Several devices, accumulated gradients, no end, a compiled module, or callbacks
            that average weights.
    """
    devices = trainer.num_devices * trainer.num_nodes
    if devices > 1:
        raise ValueError(
            f"a fit of one image uses one device: expected devices=1, got {devices}; set "
            "trainer.devices to 1, and restore many images with deepred-batch"
        )
    accumulated: Any = trainer.accumulate_grad_batches
    for callback in trainer.callbacks:
        if isinstance(callback, callbacks.GradientAccumulationScheduler):
            accumulated = callback.scheduling
    if accumulated != 1:
        raise ValueError(
            "a θ-step is one pass over the one image: expected accumulate_grad_batches=1, got "
            f"{accumulated}; average_decay smooths over steps"
        )
    if trainer.max_steps == -1 and not any(
        isinstance(callback, callbacks.Timer) for callback in trainer.callbacks
    ):
        raise ValueError(
            "a fit is one endless epoch: expected max_steps or max_time, got neither; set "
            "max_steps, for example Trainer(max_steps=3000)"
        )
    if model._compiler_ctx is not None:  # set by Lightning for torch.compile; checked with 2.6
        raise ValueError(
            f"expected a {type(model).__name__} that is not compiled, got torch.compile's, which "
            "recompiles at every step; compile=True compiles only the network"
        )
    check_averaging(trainer)


def check_averaging(trainer: Trainer) -> None:
    """Raise ValueError if a callback of the trainer averages weights."""
    kinds = tuple(getattr(callbacks, name, ()) for name in AVERAGING)
    for callback in trainer.callbacks:
        if isinstance(callback, kinds):
            raise ValueError(
                f"{type(callback).__name__} averages weights, but the result is made of images "
                "that the network gave during the fit: leave it out; `average` is the exponential "
                "average of these images (average_decay)"
            )


def check_clipping(optimizer: Optimizer, trainer: Trainer) -> None:
    """Refuse gradient clipping that the optimizer cannot do in mixed precision.

    Raises:
        ValueError: A fused optimizer with gradient clipping in mixed precision.
    """
    fused = any(group.get("fused") for group in optimizer.param_groups)
    if fused and trainer.gradient_clip_val and "mixed" in str(trainer.precision):
        raise ValueError(
            f"gradients in {trainer.precision} precision cannot be clipped with a fused optimizer; "
            "set the optimizer's fused to false, or leave gradient_clip_val out"
        )
