"""An entry of TensorBoard's HParams page."""

from collections.abc import Mapping
from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.loggers import TensorBoardLogger

from deepred_pl.callbacks.langevin import Langevin
from deepred_pl.callbacks.red import REDUpdate, name_of
from deepred_pl.model import DeepImagePrior, DeepRED
from deepred_pl.networks import ImageParameter


def log_hyperparameters(
    model: DeepImagePrior, trainer: Trainer, result: Mapping[str, Any], labels: Mapping[str, str]
) -> None:
    """Log what tells methods apart beside what they came to, to every TensorBoard logger.

    Args:
        model: The fitted module.
        trainer: Its trainer.
        result: The contents of `result.json`.
        labels: Further columns, or other values of these.
    """
    final = {name: result[name]["restored"] for name in ("psnr", "ssim")}
    final |= {name: result[name] for name in ("residual_to_sigma", "steps", "seconds")}
    known = {f"final/{name}": float(v) for name, v in final.items() if v is not None}
    columns = {**describe(model, trainer), **labels}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(columns, known, trainer.global_step)


def describe(model: DeepImagePrior, trainer: Trainer) -> dict[str, str | float]:
    """The settings that tell methods and problems apart, by short names, as plain values.

    Every fit has all of them, as TensorBoard shows those alone that its first run has; where one
    means nothing it is "none" or 0. It shows the first few by the alphabet: numbers come behind.
    """
    problem, network = model.problem, model.network
    assert problem is not None and network is not None
    updates = [c for c in trainer.callbacks if isinstance(c, REDUpdate) and not c.submodule]
    update = updates[0] if updates and isinstance(model, DeepRED) else None
    method = ["DeepRED" if isinstance(model, DeepRED) else "DIP"]
    if update is not None and update.x_update == "pnp":
        method = ["Plug-and-Play"]
    elif update is not None and isinstance(network, ImageParameter):
        method = ["RED"]
    method += (
        [] if model.regularizer is None else [name_of(model.regularizer).removesuffix("Penalty")]
    )
    method += [name_of(c) for c in trainer.callbacks if isinstance(c, Langevin)]
    sigma = getattr(update and update.denoiser, "sigma", None)
    group = trainer.optimizers[0].param_groups[0]
    return {
        "denoiser": "none" if update is None else name_of(update.denoiser),
        "image": getattr(trainer.datamodule, "name", None) or "unnamed",
        "method": " + ".join(method),
        "network": name_of(network),
        "noise": "none" if problem.noise is None else name_of(problem.noise),
        "operator": name_of(problem.operator),
        "set/denoiser_sigma": float(sigma) if isinstance(sigma, int | float) else 0,
        "set/input_noise_std": model.input_noise_std,
        "set/k": 0 if update is None else update.every_n_steps * update.rounds_per_denoising,
        "set/lam": model.initial_lam if isinstance(model, DeepRED) else 0,
        "set/lr": group.get("initial_lr", group["lr"]),
        "set/mu": model.initial_mu if isinstance(model, DeepRED) else 0,
        "set/seed": model.seed,
        "weighting": model.weighting if isinstance(model, DeepRED) else "none",
        "x_update": "none" if update is None else update.x_update,
    }
