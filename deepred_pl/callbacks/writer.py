"""What a run leaves behind: the restored image, a comparison, and the figures."""

import io
import math
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor

from deepred_pl.callbacks.guard import rollbacks
from deepred_pl.callbacks.hparams import log_hyperparameters
from deepred_pl.callbacks.langevin import Langevin
from deepred_pl.callbacks.red import denoiser_seconds
from deepred_pl.callbacks.stopping import AutoStop
from deepred_pl.directory import check_writable, run_directory, why, write_json
from deepred_pl.images import ImageFormat, write_bytes, write_image
from deepred_pl.metrics import psnr, scored_on, ssim
from deepred_pl.model import DeepImagePrior, DeepRED
from deepred_pl.problem import InverseProblem

# The residual's square is the noise's and that of what is missing. Beyond this, what is missing is
# more than the noise that was taken away.
TOO_FAR = math.sqrt(2)


class Writer(Callback):
    """Writes into the run directory when a fit ends.

    `restored.png` (at the input's depth; `.tif` for float input), `comparison.png` and
    `result.json`; with `Langevin` also the samples' standard deviation, `uncertainty.npy`,
    (H, W, C) on the [0, 1] scale, and `uncertainty.png`, its mean over the channels, white at the
    largest. `predict` writes the first alone. That the directory can be written is found out
    before the fit. A TensorBoard logger made with default_hp_metric=False gets an entry of the page
    "HParams": the settings that tell methods apart, and what they came to.

    Attributes:
        labels: Names for that page in place of its own, as {"image": "house"}.

    Raises:
        OSError: The run directory cannot be written.
    """

    def __init__(self) -> None:
        self.labels: dict[str, str] = {}
        self._seconds_before = 0.0
        self._start = math.nan  # while nothing is fitted

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before = state_dict["seconds"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._seconds_before, self._start = 0.0, math.nan
        if not trainer.fast_dev_run:
            check_writable(run_directory(trainer))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run or not isinstance(pl_module, DeepImagePrior):
            return
        directory = run_directory(trainer)
        path = self._write_restored(pl_module, trainer)  # first, for it is what counts
        self._seconds_before, self._start = self._seconds(), math.nan
        result = summarise(pl_module, trainer, self._seconds_before)
        try:
            assert pl_module.problem is not None
            picture = compare(pl_module.problem, pl_module.restored)
            write_image(directory / "comparison.png", picture)
            for callback in trainer.callbacks:
                if isinstance(callback, Langevin) and callback.std is not None:
                    write_uncertainty(directory, callback.std)
            log_hyperparameters(pl_module, trainer, result, self.labels)
            write_json(directory / "result.json", result)  # last: where it is, the run is complete
        except OSError as error:
            raise OSError(
                f"expected to write the run directory {directory}: {why(error)}; the restored "
                f"image is complete: {path}"
            ) from error
        scores = [result["psnr"][name] for name in ("measurement", "restored")]
        gain = "" if None in scores else " (PSNR {:.2f} -> {:.2f} dB)".format(*scores)
        rank_zero_info(f"restored image{gain}: {path}")
        if hint(result):
            rank_zero_info(hint(result))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, DeepImagePrior):
            rank_zero_info(f"restored image: {self._write_restored(pl_module, trainer)}")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        begun = trainer.training and not math.isnan(self._start) and not trainer.fast_dev_run
        if not begun or not isinstance(pl_module, DeepImagePrior):
            return
        with suppress(Exception):  # what ended the fit is what is to be told
            if not pl_module.restored.isfinite().all():
                return
            try:
                where: object = self._write_restored(pl_module, trainer)
            except OSError as error:
                where = error
            rank_zero_info(f"stopped at step {pl_module.step}; the image as it is then: {where}")

    def _write_restored(self, model: DeepImagePrior, trainer: Trainer) -> Path:
        image_format = getattr(trainer.datamodule, "image_format", ImageFormat())
        restored = model.restored
        path = run_directory(trainer) / f"restored{image_format.suffix(restored.shape[1])}"
        try:
            write_image(path, restored, image_format)
        except OSError as error:  # after hours, perhaps: anywhere is better than nowhere
            elsewhere = Path(tempfile.mkdtemp(prefix="deepred_")) / path.name
            write_image(elsewhere, restored, image_format)
            raise OSError(
                f"expected to write {path}: {why(error)}; the restored image is at {elsewhere}"
            ) from error
        return path

    def _seconds(self) -> float:
        running = 0.0 if math.isnan(self._start) else time.perf_counter() - self._start
        return self._seconds_before + running


def summarise(model: DeepImagePrior, trainer: Trainer, seconds: float) -> dict[str, Any]:
    """The contents of `result.json`; metrics are None without a ground truth."""
    assert model.problem is not None
    x = model.x if isinstance(model, DeepRED) else None
    return {
        **score(model.problem, model.restored, out=model.out, average=model.average, x=x),
        "steps": model.step,
        "seconds": round(seconds, 3),
        "denoiser_wait_seconds": round(denoiser_seconds(trainer)[0], 3),
        "rollbacks": rollbacks(trainer),
        "stop_reason": _stop_reason(trainer),
        "seed": model.seed,
    }


def score(problem: InverseProblem, restored: Tensor, **others: Tensor | None) -> dict[str, Any]:
    """What `result.json` says of the problem and of images restored from it, as plain data."""
    truth = problem.ground_truth
    images = {"measurement": problem.as_image(), "restored": restored, **others}

    def scores(metric: Any) -> dict[str, float | None]:
        known = {
            k: None if truth is None or v is None else metric(v, truth, problem.metric_on)
            for k, v in images.items()
        }
        return {k: None if v is None or not v.isfinite() else float(v) for k, v in known.items()}

    variance = problem.noise_variance()
    return {
        "psnr": scores(psnr),
        "ssim": scores(ssim),
        "metric_on": scored_on(problem.image_shape[1], problem.metric_on),
        "noise_sigma": None if variance is None else 255 * math.sqrt(float(variance)),
        "residual_to_sigma": residual_to_sigma(problem, restored),
    }


@torch.no_grad()
def residual_to_sigma(problem: InverseProblem, restored: Tensor) -> float | None:
    """How far a restored image is from the measurement, in units of what the noise makes of it.

    At 1 it explains all but the noise. Far above, it lacks what is in the measurement, as after too
    few steps, and may be worse than it. None without a noise model.
    """
    restored = restored.to(problem.y.device)
    expected = problem.expected_residual(restored)
    return None if expected is None else float((problem.residual(restored) / expected).sqrt())


def hint(result: dict[str, Any]) -> str:
    """What to do where `result.json` shows that a fit was too short; "" where it does not."""
    ratio = result["residual_to_sigma"]
    if ratio is None or ratio <= TOO_FAR:
        return ""
    return (
        f"its residual is {ratio:.1f} times the noise: details are missing, for the fit was too "
        "short (--trainer.max_steps and, if it is set, --model.lr_scheduler.total_steps), or the "
        "noise is stronger than was said"
    )


def _stop_reason(trainer: Trainer) -> str:
    for callback in trainer.callbacks:
        if isinstance(callback, AutoStop) and callback.stopped:
            return f"auto_stop: {callback.rule}, best at step {callback.best_step}"
    stopped = trainer.global_step < trainer.max_steps or trainer.max_steps < 0
    return "stopped early" if stopped else "max_steps"


def write_uncertainty(directory: Path, std: Tensor) -> None:
    """Write a standard deviation per value, (1, C, H, W): `uncertainty.npy` as it is, (H, W, C),
    and `uncertainty.png`, its mean over the channels, white at the largest."""
    buffer = io.BytesIO()
    np.save(buffer, std[0].movedim(0, -1).cpu().numpy())  # (H, W, C)
    write_bytes(directory / "uncertainty.npy", buffer.getvalue())
    grey = std.mean(dim=1, keepdim=True)
    write_image(directory / "uncertainty.png", grey / grey.max().clamp(min=1e-12))


def compare(problem: InverseProblem, restored: Tensor) -> Tensor:
    """Measurement, restored and (where known) true image side by side, (1, 3, H', W').

    Small images are enlarged by whole factors; each panel says what it is, and its PSNR.
    """
    truth = problem.ground_truth
    panels = {"measurement": problem.as_image(), "restored": restored}
    if truth is not None:
        on = problem.metric_on
        panels = {f"{name}, {psnr(v, truth, on):.2f} dB": v for name, v in panels.items()}
        panels["ground truth"] = truth
    scale = max(1, 256 // min(problem.image_shape[-2:]))
    return torch.cat([_panel(name, image.cpu(), scale) for name, image in panels.items()], dim=-1)


def _panel(caption: str, image: Tensor, scale: int) -> Tensor:
    channels = image.shape[1]
    colour = image[:, :3] if channels >= 3 else image[:, :1].expand(-1, 3, -1, -1)
    colour = F.interpolate(colour, scale_factor=scale, mode="nearest")
    margin, header = 4, 24  # pixels
    framed = F.pad(colour, (margin, margin, header, margin), value=1.0)
    strip = Image.new("L", (framed.shape[-1], header), 255)
    font = ImageFont.load_default(14)
    ImageDraw.Draw(strip).text((margin, 4), caption, fill=0, font=font)
    framed[..., :header, :] = torch.from_numpy(np.asarray(strip) / 255)
    return framed
