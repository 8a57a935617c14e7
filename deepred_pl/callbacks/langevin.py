"""Stochastic gradient Langevin dynamics."""

from typing import Any

import torch
from torch import Tensor

from deepred_pl.callbacks.base import RestorationCallback
from deepred_pl.checks import as_plain, check_positive
from deepred_pl.lightning import LightningModule, Trainer
from deepred_pl.model import DeepImagePrior
from deepred_pl.moments import RunningMoments


class Langevin(RestorationCallback):
    """Stochastic gradient Langevin dynamics (Welling & Teh 2011; Cheng et al. 2019 for DIP).

    After each θ-step, Gaussian noise of standard deviation `noise` · learning rate is added to
    every convolution weight, so that the fit does not end at a single θ but explores those that
    explain the measurement (arXiv:1904.07457, whose code has 2 · 0.01). The outputs after the
    burn-in are the samples, with known pixels put back as in `restored`: their mean becomes the
    module's `chosen`, which `restored` returns, and their standard deviation per value, which
    `Writer` writes, shows the uncertainty. With Adam as the optimizer these are not exactly samples
    of the posterior. The learning rate should be constant.

    Args:
        noise: Standard deviation of the noise on the weights in units of the learning rate, > 0.
        burn_in: Fraction of the trainer's max_steps before the first sample, in [0, 1) (so that a
            fit resumed with more steps differs from the longer fit).
        submodule: Dotted name of the restoration inside the trained module; "" is the module.

    Raises:
        ValueError: An argument is out of range, or the trainer has no max_steps.
    """

    chooses = True

    def __init__(self, noise: float = 2.0, burn_in: float = 0.35, submodule: str = "") -> None:
        super().__init__(submodule)
        noise, burn_in = as_plain(noise), as_plain(burn_in)
        check_positive("noise", noise, "without it use methods/dip")
        if not 0 <= burn_in < 1:
            raise ValueError(
                f"burn_in must be a fraction of the run in [0, 1), got {burn_in}; 0.35 keeps the "
                "last 65 % of the steps"
            )
        self.noise = noise
        self.burn_in = burn_in
        self._samples = RunningMoments()

    @property
    def std(self) -> Tensor | None:
        return self._samples.variance.sqrt() if self._samples.count else None

    def summary(self) -> dict[str, Any]:
        return {"samples": self._samples.count}

    def state_dict(self) -> dict[str, Any]:
        return self._samples.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._samples.load_state_dict(state_dict)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._samples = RunningMoments()

    def check(self, model: DeepImagePrior, trainer: Trainer) -> None:
        super().check(model, trainer)
        if trainer.max_steps < 1:
            raise ValueError(
                "Langevin's burn_in is a fraction of the trainer's max_steps, got max_steps="
                f"{trainer.max_steps}; set it"
            )

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        model = self.model
        assert model.network is not None and model.problem is not None
        if trainer.global_step > self.burn_in * trainer.max_steps:
            self._samples.add(model.problem.keep_known(model.out))
            model.chosen = self._samples.mean
        rates = {
            p: g["lr"] for o in trainer.optimizers for g in o.param_groups for p in g["params"]
        }
        generator = model.generator("Langevin")
        for weight in model.network.parameters():
            if weight.ndim == 4 and weight in rates:
                noise = torch.randn(
                    weight.shape, generator=generator, dtype=weight.dtype, device=weight.device
                )
                # Reading a rate that is a tensor would wait for a GPU.
                weight.add_(noise.mul_(self.noise * rates[weight]))
