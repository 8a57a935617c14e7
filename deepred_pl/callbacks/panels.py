"""Show the images of a fit in TensorBoard."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deepred_pl.callbacks.base import RestorationCallback, tensorboard_writers
from deepred_pl.checks import check_at_least
from deepred_pl.images import displayed
from deepred_pl.lightning import LightningModule, Trainer
from deepred_pl.model import DeepImagePrior, DeepRED
from deepred_pl.operators import unknown_blur

DISPLAYS = 10  # TensorBoard shows 10 images of a panel by default, evenly chosen
MOST_DISPLAYS = 100  # per run; with more, the images would be too small
MOST_BYTES = 15_000_000  # of a run's images, before compression
PANELS = 6  # per display
TIMED = 6000  # θ-steps assumed for a fit that a time limit ends
ERROR_GAIN = 5  # an error of a fifth of the range is white


class Panels(RestorationCallback):
    """Shows the images of a fit on TensorBoard's page "Images".

    The measurement at the start; every n θ-steps and at the end `out`, `average` and, of a
    `DeepRED`, x and u (grey where u is 0, full range at its largest absolute value); if the ground
    truth is known also the error of the restored image, |restored − truth| × 5, and if the blur is
    unknown its kernel, with its largest value white. Of an image with
    neither 1 nor 3 channels a part is shown (`images.displayed`). Large images are reduced so that
    the images of a run take less than 15 MB. Without a TensorBoard logger it does nothing.

    Args:
        every_n_steps: θ-steps between two displays, at least a hundredth of the trainer's
            max_steps; None is a tenth, 0 disables the panels. A fit without max_steps counts as one
            of 6000.
        submodule: Dotted name of the restoration inside the trained module; "" is the module.
            Otherwise the panels' names begin with it.

    Raises:
        ValueError: every_n_steps is below 0.
    """

    def __init__(self, every_n_steps: int | None = None, submodule: str = "") -> None:
        super().__init__(submodule)
        check_at_least(0, every_n_steps=every_n_steps or 0)
        self.every_n_steps = every_n_steps
        self._every = 0  # 0 disables it
        self._largest = 0  # values of an image
        self._left = 0  # displays
        self._shown = 0  # step of the latest display

    def start(self, model: DeepImagePrior, trainer: Trainer) -> None:
        self._every = 0
        if self.every_n_steps == 0 or trainer.fast_dev_run or not tensorboard_writers(trainer):
            return
        steps = trainer.max_steps if trainer.max_steps > 0 else TIMED
        wanted = math.ceil(steps / DISPLAYS) if self.every_n_steps is None else self.every_n_steps
        self._every = max(wanted, math.ceil(steps / MOST_DISPLAYS))
        self._left, self._shown = max(DISPLAYS, steps // self._every), 0
        sharing = sum(isinstance(callback, Panels) for callback in trainer.callbacks)
        self._largest = MOST_BYTES // (sharing * PANELS * (self._left + 1))  # one for the end
        assert model.problem is not None
        self._show(trainer, {"measurement": model.problem.as_image()})

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        due = self._every and trainer.global_step and trainer.global_step % self._every == 0
        if due and self._left:  # a fit without max_steps may be longer than expected
            self._show_all(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._every:
            self._show_all(trainer)

    def _show_all(self, trainer: Trainer) -> None:
        if trainer.global_step != self._shown:
            self._shown = trainer.global_step
            self._left -= 1
            self._show(trainer, panels(self.model))

    def _show(self, trainer: Trainer, images: dict[str, Tensor]) -> None:
        for name, image in images.items():
            small = _within(image, self._largest)
            pixels = small[0].mul(255).round().to(torch.uint8).cpu()  # (1 or 3, H, W)
            for writer in tensorboard_writers(trainer):
                tag = f"{self.submodule or 'panels'}/{name}"
                writer.add_image(tag, pixels, trainer.global_step)


@torch.no_grad()
def panels(model: DeepImagePrior) -> dict[str, Tensor]:
    """The images of a fit at this step by name, (1, C, H, W) in [0, 1]."""
    shown = {"out": model.out, "average": model.average}
    if isinstance(model, DeepRED):
        shown["x"] = model.x
        shown["u, rescaled"] = 0.5 + 0.5 * model.u / model.u.abs().max().clamp(min=1e-12)
    blur = None if model.problem is None else unknown_blur(model.problem.operator)
    if blur is not None:
        shown["kernel, rescaled"] = _enlarged(blur.kernel / blur.kernel.max(), model.out.shape[-1])
    truth = None if model.problem is None else model.problem.ground_truth
    if truth is not None:
        shown[f"error × {ERROR_GAIN}"] = ERROR_GAIN * (model.restored - truth).abs()
    return {name: image.clamp(0, 1) for name, image in shown.items()}


def _enlarged(kernel: Tensor, width: int) -> Tensor:
    """A kernel as an image (1, 1, H, W), enlarged by a whole factor to about a width."""
    factor = max(1, width // kernel.shape[-1])
    return F.interpolate(kernel[None, None], scale_factor=factor, mode="nearest")


def _within(image: Tensor, size: int) -> Tensor:
    """The image with 1 or 3 channels, (1, 1 or 3, H, W), reduced to at most `size` values."""
    image = displayed(image)
    scale = math.sqrt(size / image.numel())
    if scale >= 1:
        return image
    height, width = (max(1, int(side * scale)) for side in image.shape[-2:])
    return F.interpolate(image, (height, width), mode="area")
