"""Log the curves of a fit, and score checkpoints."""

from typing import Any

import torch
from torch import Tensor

from deepred_pl import admm
from deepred_pl.callbacks.base import (
    RestorationCallback,
    is_log_step,
    restoration_callbacks,
    tensorboard_writers,
)
from deepred_pl.lightning import LightningModule, Trainer
from deepred_pl.metrics import GREY_LEVELS, psnr, ssim
from deepred_pl.model import DeepImagePrior, DeepRED
from deepred_pl.report import pair


class Monitor(RestorationCallback):
    """Logs the curves of the paper's Figure 3 (arXiv:1903.10176), and a few more.

    Every `trainer.log_every_n_steps` θ-steps, and for callbacks that monitor a curve also at the
    end of the fit and of epochs that are not shorter, in the group "curves":
        objective           D(A T_θ(z), y) + λ · mean(x · (x − f(x))), Eq. 4, for matching x and
                            f(x), in squared grey levels of an 8-bit image, in which small values
                            remain readable; Plug-and-Play has v instead of x, and minimizes no
                            objective
        data_term           D(A T_θ(z), y), in squared grey levels: by the likelihood of Gaussian
                            noise, σ² once only the noise is left, or less where it was clipped
        gap                 ‖x − T_θ(z)‖₂
        psnr_…              PSNR of out, average and x in dB, if the ground truth is known, with
                            known pixels put back as in `restored`
        residual_to_sigma   root mean square of the residual over its expectation, if the noise is
                            known: at 1 only the noise is left, below, noise is fitted
        held_out_error      root mean square error of the average at held-out values, if there are
                            any, in grey levels
        lam, mu             λ and μ
        denoiser_wait_seconds, denoiser_busy_seconds
                            how long the fit has waited for the denoiser, and the denoiser worked
    A `DeepImagePrior` has data_term, psnr_… and residual_to_sigma. TensorBoard's page "Custom
    scalars" shows the figure's three curves together. `test` logs PSNR and SSIM of the restored
    image.

    Args:
        submodule: Dotted name of the restoration inside the trained module; "" is the module.
            Otherwise it is the name of the group.
    """

    def start(self, model: DeepImagePrior, trainer: Trainer) -> None:
        monitors = [c for c in trainer.callbacks if isinstance(c, Monitor)]
        if self is monitors[0] and not trainer.fast_dev_run:  # an event file has one layout
            layout: dict[str, Any] = {}
            for monitor in monitors:
                problem = monitor.model.problem
                known = problem is not None and problem.ground_truth is not None
                layout |= figure3(monitor.group, with_psnr=known)
            for writer in tensorboard_writers(trainer):
                writer.add_custom_scalars(layout)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        every = trainer.log_every_n_steps
        epoch_ends = trainer.is_last_batch and 0 < every <= trainer.num_training_batches
        fit_ends = every > 0 and trainer.global_step == trainer.max_steps
        if is_log_step(trainer) or epoch_ends or fit_ends:
            curves = measure(self.model)
            for callback in restoration_callbacks(trainer, self.submodule):
                curves |= {n: torch.tensor(value) for n, value in callback.curves().items()}
            self._log(pl_module, curves, group=self.group)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        model = self.restoration(pl_module)
        truth = None if model.problem is None else model.problem.ground_truth
        if truth is None:
            raise ValueError(
                "expected a ground truth to score against, got none; set data.ground_truth"
            )
        assert model.problem is not None
        on, compared = model.problem.metric_on, pair(model.problem, model.restored, truth)
        scores = {"psnr": psnr(*compared, on), "ssim": ssim(*compared, on)}
        self._log(pl_module, scores, group=self.submodule)

    def _log(self, pl_module: LightningModule, values: dict[str, Tensor], group: str) -> None:
        named = {f"{group}/{name}".lstrip("/"): value for name, value in values.items()}
        pl_module.log_dict(named, batch_size=1)


@torch.no_grad()
def measure(model: DeepImagePrior) -> dict[str, Tensor]:
    """The curves of `Monitor` at this step, 0-dim tensors on the model's device."""
    problem = model.problem
    assert problem is not None
    data_term = model.data_term(model.out)
    curves = {"data_term": data_term * GREY_LEVELS**2}
    images = {"out": model.out, "average": model.average}
    if isinstance(model, DeepRED):
        curves["objective"] = (data_term + model.lam * model.prior) * GREY_LEVELS**2
        curves["gap"] = admm.gap(model.out, model.x)
        curves["lam"], curves["mu"] = model.lam, model.mu
        images["x"] = model.x
    if problem.ground_truth is not None:
        for name, image in images.items():
            image = problem.keep_known(image)
            curves[f"psnr_{name}"] = psnr(image, problem.ground_truth, problem.metric_on)
    ratio = problem.residual_ratio(model.out)
    if ratio is not None:
        curves["residual_to_sigma"] = ratio.sqrt()
    if problem.held_out is not None:
        errors = problem.held_out_errors(model.average)
        curves["held_out_error"] = GREY_LEVELS * errors.mean().sqrt()
    return curves


def figure3(group: str = "curves", with_psnr: bool = True) -> dict[str, dict[str, list]]:
    """The paper's Figure 3 as a layout of TensorBoard's custom scalars: title → chart → tags.

    It is the same for all methods, because TensorBoard shows every chart that differs in any run.
    """
    charts = {
        "objective (Eq. 4), data term": ["objective", "data_term"],
        "gap ‖x − T_θ(z)‖": ["gap"],
    }
    if with_psnr:
        charts["PSNR in dB"] = ["psnr_out", "psnr_average", "psnr_x"]
    title = "Figure 3" if group == "curves" else f"Figure 3: {group}"
    named = {name: [f"{group}/{tag}" for tag in tags] for name, tags in charts.items()}
    return {title: {name: ["Multiline", tags] for name, tags in named.items()}}
