"""Write the results of a run into its directory."""

import math
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepred_pl.callbacks.base import check_untaken, restoration_callbacks, run_directory
from deepred_pl.callbacks.hparams import log_hyperparameters
from deepred_pl.checks import RestorationWarning
from deepred_pl.files import check_writable, describe, write_json
from deepred_pl.image_format import ImageFormat
from deepred_pl.images import write_image
from deepred_pl.lightning import (
    Callback,
    LightningModule,
    Trainer,
    callbacks,
    rank_zero_info,
    rank_zero_warn,
)
from deepred_pl.model import DeepImagePrior, DeepRED
from deepred_pl.operators import unknown_blur
from deepred_pl.report import compare, diagnosis, score, write_kernel, write_uncertainty


class Writer(Callback):
    """Writes the results of a fit into the run directory.

    `restored.png` (at the input's depth; `.tif` for float input), `comparison.png` and
    `result.json`; with a callback that has a `std`, such as `Langevin`, also `uncertainty.npy`,
    (H, W, C) on the [0, 1] scale, and `uncertainty.png`, its mean over the channels, scaled so that
    the largest value is white. `predict` writes only the first. Whether the directory can be
    written is checked before the fit. A TensorBoard logger with default_hp_metric=False gets an
    entry on the page "HParams" with the settings that distinguish methods, and the scores.

    Attributes:
        labels: Values for that page that replace its own, such as {"image": "house"}.

    Raises:
        ValueError: The run directory, which a logger was given, has the result of another run.
        OSError: The run directory cannot be written.
    """

    def __init__(self) -> None:
        self.labels: dict[str, str] = {}
        self._timer = callbacks.Timer()
        self._at_half: Tensor | None = None  # residual ratio after half of the steps
        self._done: Path | None = None  # the result of the fit before

    def state_dict(self) -> dict[str, Any]:
        return {**self._timer.state_dict(), "at_half": self._at_half}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._timer.load_state_dict(state_dict)
        self._at_half = state_dict.get("at_half")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._timer, self._at_half = callbacks.Timer(), None
        if not isinstance(pl_module, DeepImagePrior):
            rank_zero_warn(
                "Writer writes the results of a restoration that is trained directly, and nothing "
                f"for one inside {type(pl_module).__name__}: write its `restored` there, with "
                "deepred_pl.images.write_image",
                category=RestorationWarning,
            )
        elif not trainer.fast_dev_run:
            check_writable(run_directory(trainer))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        writes = isinstance(pl_module, DeepImagePrior) and not trainer.fast_dev_run
        if not writes or trainer.ckpt_path is not None:
            return
        done = run_directory(trainer) / "result.json"
        if done != self._done:
            check_untaken(done)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._timer.on_train_start(trainer, pl_module)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if trainer.global_step == trainer.max_steps // 2 and isinstance(pl_module, DeepImagePrior):
            assert pl_module.problem is not None
            self._at_half = pl_module.problem.residual_ratio(pl_module.restored)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run or not isinstance(pl_module, DeepImagePrior):
            return
        directory = run_directory(trainer)
        path = self._write_restored(pl_module, trainer)  # first, because it matters most
        self._timer.on_train_end(trainer, pl_module)
        result = summarise(pl_module, trainer, self._timer.time_elapsed())
        half = self._at_half
        result["residual_to_sigma_at_half"] = None if half is None else math.sqrt(float(half))
        try:
            assert pl_module.problem is not None
            picture = compare(pl_module.problem, pl_module.restored)
            write_image(directory / "comparison.png", picture)
            if (blur := unknown_blur(pl_module.problem.operator)) is not None:
                write_kernel(directory, blur.kernel)
            for callback in restoration_callbacks(trainer, ""):
                if callback.std is not None:
                    write_uncertainty(directory, callback.std)
            log_hyperparameters(pl_module, trainer, result, self.labels)
            self._done = directory / "result.json"
            write_json(self._done, result)  # last: it marks a complete run
        except OSError as error:
            raise OSError(
                f"expected to write the run directory {directory}: {describe(error)}; the restored "
                f"image is complete: {path}"
            ) from error
        scores = [result["psnr"][name] for name in ("measurement", "restored")]
        gain = "" if None in scores else " (PSNR {:.2f} -> {:.2f} dB)".format(*scores)
        rank_zero_info(f"Restored image{gain}: {path}")
        if text := diagnosis(result):
            rank_zero_info(text)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, DeepImagePrior):
            rank_zero_info(f"Restored image: {self._write_restored(pl_module, trainer)}")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        fitting = self._timer.start_time() is not None and self._timer.end_time() is None
        if not fitting or trainer.fast_dev_run or not isinstance(pl_module, DeepImagePrior):
            return
        with suppress(Exception):  # the exception that ended the fit is reported
            if pl_module.step == 0 or not pl_module.restored.isfinite().all():
                return
            try:
                where: object = self._write_restored(pl_module, trainer)
            except OSError as error:
                where = error
            rank_zero_info(f"Stopped at step {pl_module.step}; the image so far: {where}")

    def _write_restored(self, model: DeepImagePrior, trainer: Trainer) -> Path:
        image_format = getattr(trainer.datamodule, "image_format", ImageFormat())
        restored = model.restored
        path = run_directory(trainer) / f"restored{image_format.suffix(restored.shape[1])}"
        try:
            write_image(path, restored, image_format)
        except OSError as error:  # after hours of computation, save it anywhere
            elsewhere = Path(tempfile.mkdtemp(prefix="deepred_")) / path.name
            write_image(elsewhere, restored, image_format)
            raise OSError(
                f"expected to write {path}: {describe(error)}; the restored image is at {elsewhere}"
            ) from error
        return path


def summarise(model: DeepImagePrior, trainer: Trainer, seconds: float) -> dict[str, Any]:
    """The contents of `result.json`; metrics are None without a ground truth."""
    assert model.problem is not None
    x = model.x if isinstance(model, DeepRED) else None
    stopped = trainer.global_step < trainer.max_steps or trainer.max_steps < 0
    result = {
        **score(model.problem, model.restored, out=model.out, average=model.average, x=x),
        "steps": model.step,
        "seconds": round(seconds, 3),
        "seed": model.seed,
        "fidelity": model.fidelity,
        "epsilon": model.epsilon if model.fidelity == "backprojection" else None,
        "stop_reason": "stopped early" if stopped else "max_steps",
        "denoiser_wait_seconds": 0.0,
        "rollbacks": 0,
        "read": getattr(trainer.datamodule, "reading", None),
    }
    for callback in restoration_callbacks(trainer, ""):
        result |= callback.summary()
    return result
