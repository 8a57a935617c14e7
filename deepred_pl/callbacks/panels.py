"""Pictures of a fit for TensorBoard."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from deepred_pl.model import DeepImagePrior, DeepRED, find_restoration

LOOKS = 10  # TensorBoard shows 10 pictures of a panel, evenly chosen, unless it is told otherwise
MOST_LOOKS = 100  # in a run; more would make the pictures too small
MOST_BYTES = 15_000_000  # of a run's pictures, before compression
PICTURES = 5  # of a look
TIMED = 6000  # θ-steps expected of a fit that a time limit ends
ERROR_GAIN = 5  # an error of a fifth is white


class Panels(Callback):
    """Shows the images of a fit on TensorBoard's page.

    The measurement at the start, and every n θ-steps and at the end `out`, `average` and, of a
    `DeepRED`, x and u (grey where u is 0, full range at its largest); where the ground truth is
    known also the error of the restored image, |restored − truth| × 5. Of an image with other
    than 1 or 3 channels the first three, or the first, are shown. Large images are made smaller,
    so that the pictures of a run take less than 15 MB. Without a TensorBoard logger it does
    nothing.

    Args:
        every_n_steps: θ-steps between two looks, at least a hundredth of the trainer's max_steps;
            None is a tenth, 0 is none at all. A fit without max_steps counts as one of 6000.
        submodule: Dotted name of the restoration inside the trained module; "" is the module.
            Otherwise it begins the panels' names.

    Raises:
        ValueError: every_n_steps below 0.
    """

    def __init__(self, every_n_steps: int | None = None, submodule: str = "") -> None:
        if every_n_steps is not None and every_n_steps < 0:
            raise ValueError(f"panels' every_n_steps must be at least 0, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.submodule = submodule
        self._every = 0  # 0: there is nothing to do
        self._largest = 0  # picture, in values
        self._left = 0  # looks
        self._shown = 0  # step of the latest look

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._every = 0
        if self.every_n_steps == 0 or trainer.fast_dev_run or not writers(trainer):
            return
        steps = trainer.max_steps if trainer.max_steps > 0 else TIMED
        wanted = math.ceil(steps / LOOKS) if self.every_n_steps is None else self.every_n_steps
        self._every = max(wanted, math.ceil(steps / MOST_LOOKS))
        self._left, self._shown = max(LOOKS, steps // self._every), 0
        sharing = sum(isinstance(callback, Panels) for callback in trainer.callbacks)
        self._largest = MOST_BYTES // (sharing * PICTURES * (self._left + 1))  # one for the end
        problem = find_restoration(pl_module, self.submodule).problem
        assert problem is not None
        self._show(trainer, {"measurement": problem.as_image()})

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        due = self._every and trainer.global_step and trainer.global_step % self._every == 0
        if due and self._left:  # a fit without max_steps may be longer than expected
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._every:
            self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self._shown:
            self._shown = trainer.global_step
            self._left -= 1
            self._show(trainer, panels(find_restoration(pl_module, self.submodule)))

    def _show(self, trainer: Trainer, images: dict[str, Tensor]) -> None:
        for name, image in images.items():
            small = _within(image, self._largest)
            pixels = small[0].mul(255).round().to(torch.uint8).cpu()  # (1 or 3, H, W)
            for writer in writers(trainer):
                tag = f"{self.submodule or 'panels'}/{name}"
                writer.add_image(tag, pixels, trainer.global_step)


@torch.no_grad()
def panels(model: DeepImagePrior) -> dict[str, Tensor]:
    """The images of a fit at this step as pictures, (1, C, H, W) in [0, 1], by their names."""
    shown = {"out": model.out, "average": model.average}
    if isinstance(model, DeepRED):
        shown["x"] = model.x
        shown["u, rescaled"] = 0.5 + 0.5 * model.u / model.u.abs().max().clamp(min=1e-12)
    truth = None if model.problem is None else model.problem.ground_truth
    if truth is not None:
        shown[f"error × {ERROR_GAIN}"] = ERROR_GAIN * (model.restored - truth).abs()
    return {name: image.clamp(0, 1) for name, image in shown.items()}


def writers(trainer: Trainer) -> list[SummaryWriter]:
    """The event files of the trainer's TensorBoard loggers."""
    return [
        logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)
    ]


def _within(image: Tensor, size: int) -> Tensor:
    """The picture, (1, 1 or 3, H, W), made smaller until it has at most `size` values."""
    image = image[:, :3] if image.shape[1] >= 3 else image[:, :1]
    scale = math.sqrt(size / image.numel())
    if scale >= 1:
        return image
    height, width = (max(1, int(side * scale)) for side in image.shape[-2:])
    return F.interpolate(image, (height, width), mode="area")
