"""Langevin dynamics: the mean and the spread of many networks instead of one."""

import math
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from deepred_pl.model import DeepImagePrior, find_restoration
from deepred_pl.moments import RunningMoments


class Langevin(Callback):
    """Stochastic gradient Langevin dynamics (Welling & Teh 2011; Cheng et al. 2019 for DIP).

    After each θ-step every convolution weight gets Gaussian noise of std `noise` · learning rate,
    so that the fit does not end at one θ but wanders among those that explain the measurement
    (arXiv:1904.07457, whose code has 2 · 0.01). The outputs behind the burn-in are the samples:
    their mean becomes the module's `chosen`, which `restored` returns, and their standard
    deviation per value says where the fit is unsure; `Writer` writes it. With Adam as the
    optimizer they are not exactly samples of the posterior. The learning rate should be constant.

    Args:
        noise: Std of the noise on the weights in units of the learning rate, > 0.
        burn_in: Fraction of the trainer's max_steps before the first sample, in [0, 1) (so a fit
            resumed with more steps is not the longer fit).
        submodule: Dotted name of the restoration inside the trained module; "" is the module.

    Raises:
        ValueError: An argument out of range, or a trainer without max_steps.
    """

    def __init__(self, noise: float = 2.0, burn_in: float = 0.35, submodule: str = "") -> None:
        if not 0 < noise < math.inf:
            raise ValueError(f"noise must be > 0, got {noise}; without it use methods/dip")
        if not 0 <= burn_in < 1:
            raise ValueError(
                f"burn_in must be a fraction of the run in [0, 1), got {burn_in}; 0.35 keeps the "
                "last 65 % of the steps"
            )
        self.noise = noise
        self.burn_in = burn_in
        self.submodule = submodule
        self._samples = RunningMoments()
        self._model: DeepImagePrior | None = None

    @property
    def std(self) -> Tensor | None:
        """Standard deviation of the samples per value, (1, C, H, W); None before the first."""
        return self._samples.variance.sqrt() if self._samples.count else None

    @property
    def state_key(self) -> str:
        return self._generate_state_key(submodule=self.submodule)

    def state_dict(self) -> dict[str, Any]:
        return self._samples.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._samples.load_state_dict(state_dict)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._model = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._samples = RunningMoments()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._model = find_restoration(pl_module, self.submodule)
        self.check(self._model, trainer)

    def check(self, model: DeepImagePrior, trainer: Trainer) -> None:
        """Refuse a run without an end; called before the fit.

        Raises:
            ValueError: A trainer without max_steps.
        """
        if trainer.max_steps < 1:
            raise ValueError(
                "Langevin's burn_in is a fraction of the trainer's max_steps, got max_steps="
                f"{trainer.max_steps}; give it max_steps"
            )

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        model = self._model
        assert model is not None and model.network is not None
        if trainer.global_step > self.burn_in * trainer.max_steps:
            self._samples.add(model.out)
            model.chosen = self._samples.mean
        rates = {
            p: g["lr"] for o in trainer.optimizers for g in o.param_groups for p in g["params"]
        }
        generator = model.generator("Langevin")
        for weight in model.network.parameters():
            if weight.ndim == 4 and weight in rates:
                noise = torch.randn(weight.shape, generator=generator, device=weight.device)
                weight.add_(noise, alpha=self.noise * rates[weight])
