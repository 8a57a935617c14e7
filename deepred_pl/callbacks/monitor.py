"""Curves and a progress bar for DIP and DeepRED."""

import math
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from deepred_pl import admm
from deepred_pl.callbacks.panels import writers
from deepred_pl.callbacks.red import denoiser_seconds, staleness
from deepred_pl.metrics import psnr, ssim
from deepred_pl.model import DeepImagePrior, DeepRED, find_restoration

GREY_LEVELS = 255  # in the unit of the images


class Monitor(Callback):
    """Logs the curves of the paper's Figure 3 (arXiv:1903.10176), and a few more.

    Every `trainer.log_every_n_steps` θ-steps, in the group "curves":
        objective           D(A T_θ(z), y) + λ · mean(x · (x − f(x))), Eq. 4, on an x and its f(x),
                            in squared grey levels of an 8-bit image, where small values are not
                            all 0.0001; Plug-and-Play has v in place of x, and minimises none
        data_term           D(A T_θ(z), y), in squared grey levels: σ² where all but the noise
                            is explained
        gap                 ‖x − T_θ(z)‖₂
        psnr_…              PSNR of out, average and x in dB, where the ground truth is known
        residual_to_sigma   the residual's root mean square over what the noise makes of it,
                            where the noise is known: at 1 the network explains all but the
                            noise, below it the noise
        lam, mu             λ and μ
        denoiser_wait_seconds, denoiser_busy_seconds
                            how long the fit has waited for the denoiser, and that has worked
        staleness           θ-steps since the x of the latest f(x), where the fit does not wait
    A `DeepImagePrior` has data_term, psnr_… and residual_to_sigma. TensorBoard's page "Custom
    scalars" has the figure's three curves in one place. `test` logs PSNR and SSIM of the restored
    image.

    Args:
        submodule: Dotted name of the restoration inside the trained module; "" is the module.
            Otherwise it names the group.
    """

    def __init__(self, submodule: str = "") -> None:
        self.submodule = submodule

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        monitors = [c for c in trainer.callbacks if isinstance(c, Monitor)]
        if self is monitors[0] and not trainer.fast_dev_run:  # an event file has one layout
            layout: dict[str, Any] = {}
            for monitor in monitors:
                problem = find_restoration(pl_module, monitor.submodule).problem
                known = problem is not None and problem.ground_truth is not None
                layout |= figure3(monitor._group, with_psnr=known)
            for writer in writers(trainer):
                writer.add_custom_scalars(layout)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if logs_now(trainer):
            model = find_restoration(pl_module, self.submodule)
            curves = measure(model)
            if isinstance(model, DeepRED):
                wait, busy = denoiser_seconds(trainer, self.submodule)
                curves["denoiser_wait_seconds"] = torch.tensor(wait)
                curves["denoiser_busy_seconds"] = torch.tensor(busy)
                age = staleness(trainer, model, self.submodule)
                if age is not None:
                    curves["staleness"] = torch.tensor(float(age))
            self._log(pl_module, curves, group=self._group)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        model = find_restoration(pl_module, self.submodule)
        truth = None if model.problem is None else model.problem.ground_truth
        if truth is None:
            raise ValueError(
                "expected a ground truth to score against, got none; give --data.ground_truth"
            )
        assert model.problem is not None
        restored, on = model.restored, model.problem.metric_on
        scores = {"psnr": psnr(restored, truth, on), "ssim": ssim(restored, truth, on)}
        self._log(pl_module, scores, group=self.submodule)

    @property
    def _group(self) -> str:
        return self.submodule or "curves"

    def _log(self, pl_module: LightningModule, values: dict[str, Tensor], group: str) -> None:
        named = {f"{group}/{name}".lstrip("/"): value for name, value in values.items()}
        pl_module.log_dict(named, batch_size=1)


@torch.no_grad()
def measure(model: DeepImagePrior) -> dict[str, Tensor]:
    """The curves of `Monitor` at this step, 0-dim tensors on the model's device."""
    problem = model.problem
    assert problem is not None
    data_term = problem.data_term(model.out)
    curves = {"data_term": data_term * GREY_LEVELS**2}
    images = {"out": model.out, "average": model.average}
    if isinstance(model, DeepRED):
        curves["objective"] = (data_term + model.lam * model.prior) * GREY_LEVELS**2
        curves["gap"] = admm.gap(model.out, model.x)
        curves["lam"], curves["mu"] = model.lam, model.mu
        images["x"] = model.x
    if problem.ground_truth is not None:
        for name, image in images.items():
            curves[f"psnr_{name}"] = psnr(image, problem.ground_truth, problem.metric_on)
    expected = problem.expected_residual(model.out)
    if expected is not None:
        curves["residual_to_sigma"] = (problem.residual(model.out) / expected).sqrt()
    return curves


def figure3(group: str = "curves", with_psnr: bool = True) -> dict[str, dict[str, list]]:
    """The paper's Figure 3 as a layout of TensorBoard's custom scalars: title → chart → tags.

    It is the same for all methods, as TensorBoard shows every chart that differs in any run.
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


def logs_now(trainer: Trainer) -> bool:
    """Whether this step is one of `trainer.log_every_n_steps`; 0 logs none."""
    every = trainer.log_every_n_steps
    return bool(every) and trainer.global_step % every == 0


class RestorationBar(ProgressBar):
    """A progress bar over θ-steps with PSNR, gap and the time left.

    It shows what `Monitor` logged last: the PSNR of the average where the true image is known,
    and the gap. Where the output is no terminal, it prints a line in every tenth of the fit.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._progress: Progress | None = None
        self._told = -1  # the tenth of the fit of the latest line

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._enabled:
            return
        self._told = -1
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not console.is_terminal,
        )
        total = trainer.max_steps if trainer.max_steps > 0 else None
        self._task = self._progress.add_task("restoring", total=total, numbers="")
        self._progress.update(self._task, completed=trainer.global_step)
        self._progress.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *batch: Any) -> None:
        if self._progress is None:
            return
        step, total = trainer.global_step, trainer.max_steps
        self._progress.update(self._task, completed=step)
        if logs_now(trainer):
            self._progress.update(self._task, numbers=_numbers(trainer.callback_metrics))
        numbers = self._progress.tasks[0].fields["numbers"]
        tenths = 10 * step // total if total > 0 else step
        due = logs_now(trainer) and tenths > self._told
        if due and numbers and not self._progress.console.is_terminal:
            self._told = tenths
            of = f" of {total}" if total > 0 else ""
            self._progress.console.print(f"step {step}{of}: {numbers}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _numbers(logged: dict[str, Tensor]) -> str:
    shown = {
        "PSNR average": ("curves/psnr_average", ".2f", " dB"),
        "gap": ("curves/gap", ".3g", ""),
    }
    values = {label: float(logged.get(name, math.nan)) for label, (name, _, _) in shown.items()}
    return "  ".join(
        f"{label} {value:{shown[label][1]}}{shown[label][2]}"
        for label, value in values.items()
        if math.isfinite(value)
    )
