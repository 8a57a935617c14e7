"""The update of an unknown blur's kernel."""

from typing import Any

import numpy as np
import torch

from deepred_pl.blind import gain, kernel_between, most_detailed, with_few_edges
from deepred_pl.callbacks.base import RestorationCallback
from deepred_pl.checks import as_plain, check_at_least, check_positive
from deepred_pl.lightning import LightningModule, Trainer
from deepred_pl.model import DeepImagePrior
from deepred_pl.operators import unknown_blur

FIRST, LAST = 1 / 6, 5 / 6  # updates, as shares of the fit
FAINT = 0.1  # of the measurement's contrast: with less, no edges are left that show the kernel


class KernelUpdate(RestorationCallback):
    """Improves the kernel of an `UnknownBlur` during a fit.

    An update replaces the problem's kernel by the one that best explains the measurement by the
    average of the outputs (`blind.kernel_between`). Weak edges of the average are removed first;
    otherwise a kernel that is too small, with an image that is still blurred, would explain the
    measurement, too. There are no updates in the first and in the last sixth of the fit. ε of the
    back-projection remains that of the first kernel.

    Args:
        updates: Number of updates, at least 1, evenly spaced.
        strength: Weight by which weak edges are removed, > 0 (`blind.with_few_edges`).
        submodule: Dotted name of the restoration inside the trained module; "" is the module.

    Raises:
        ValueError: An argument is out of range, the trainer has no max_steps, or the operator is no
            `UnknownBlur`.
    """

    def __init__(self, updates: int = 8, strength: float = 0.005, submodule: str = "") -> None:
        super().__init__(submodule)
        self.updates, self.strength = as_plain(updates), as_plain(strength)
        check_at_least(1, updates=self.updates)
        check_positive("strength", self.strength)
        self._due, self._seen = np.empty(0, int), 0

    def start(self, model: DeepImagePrior, trainer: Trainer) -> None:
        first, last = (share * trainer.max_steps for share in (FIRST, LAST))
        self._due, self._seen = np.linspace(first, last, self.updates).astype(int), model.step

    def check(self, model: DeepImagePrior, trainer: Trainer) -> None:
        super().check(model, trainer)
        if trainer.max_steps < 1:
            raise ValueError(
                "KernelUpdate divides the trainer's max_steps, got max_steps="
                f"{trainer.max_steps}; set it"
            )
        if model.problem is not None and unknown_blur(model.problem.operator) is None:
            raise ValueError(
                "KernelUpdate is for an UnknownBlur, and the kernel of "
                f"{model.problem.operator} is known; leave the callback out"
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        before, self._seen = self._seen, self.model.step
        if ((before < self._due) & (self._due <= self._seen)).any():
            self._update(self.model)

    @torch.no_grad()
    def _update(self, model: DeepImagePrior) -> None:
        assert model.problem is not None
        blur = unknown_blur(model.problem.operator)
        assert blur is not None
        y, observed = model.problem.y, model.problem.operator.observed
        if observed is not None:  # elsewhere, as if the kernel were right
            y = torch.where(observed.bool(), y, blur(model.average))
        # Without the first guess, with which the average began: that is as blurred as y.
        forgotten = 1 - model.average_decay**model.step
        average = model.problem.first_guess().lerp(model.average, 1 / forgotten)
        sharp, blurred = (image[0].mean(dim=0).cpu().double().numpy() for image in (average, y))
        if not np.isfinite(sharp).all():
            return  # a collapse, of which CollapseGuard takes care
        part = most_detailed(blurred)
        scale = gain(blurred[part])
        sharp, blurred = scale * sharp[part], scale * blurred[part]
        sharp = with_few_edges(sharp, self.strength)
        if sharp.std() > FAINT * blurred.std():
            blur.kernel.copy_(torch.from_numpy(kernel_between(sharp, blurred, blur.size)))
