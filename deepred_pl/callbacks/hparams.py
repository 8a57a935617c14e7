"""Log a fit to TensorBoard's HParams page."""

from collections.abc import Mapping
from typing import Any

from deepred_pl.callbacks.base import name_of
from deepred_pl.lightning import Trainer, loggers
from deepred_pl.model import DeepImagePrior, DeepRED
from deepred_pl.networks import ImageParameter


def log_hyperparameters(
    model: DeepImagePrior, trainer: Trainer, result: Mapping[str, Any], labels: Mapping[str, str]
) -> None:
    """Log the settings that distinguish methods, and the final scores, to TensorBoard loggers.

    Args:
        model: The fitted module.
        trainer: Its trainer.
        result: The contents of `result.json`.
        labels: Additional columns, or other values of the columns.
    """
    final = {name: result[name]["restored"] for name in ("psnr", "ssim")}
    final |= {name: result[name] for name in ("residual_to_sigma", "steps", "seconds")}
    known = {f"final/{name}": float(v) for name, v in final.items() if v is not None}
    columns = {**describe(model, trainer, result), **labels}
    for logger in trainer.loggers:
        if isinstance(logger, loggers.TensorBoardLogger):
            logger.log_hyperparams(columns, known, trainer.global_step)


def describe(
    model: DeepImagePrior, trainer: Trainer, result: Mapping[str, Any]
) -> dict[str, str | float]:
    """The settings that distinguish methods and problems, by short names, as plain values.

    Every fit has all of them, because TensorBoard only shows the columns of its first run; those
    that do not apply are "none" or 0. It shows the alphabetically first ones, so that numbers are
    named to come last.
    """
    problem, network = model.problem, model.network
    assert problem is not None and network is not None
    red = isinstance(model, DeepRED)
    group = trainer.optimizers[0].param_groups[0]
    return {
        "denoiser": result.get("denoiser", "none"),
        "fidelity": model.fidelity,
        "image": getattr(trainer.datamodule, "name", None) or "unnamed",
        "method": _method(model, result),
        "network": name_of(network),
        "noise": "none" if problem.noise is None else name_of(problem.noise),
        "operator": name_of(problem.operator),
        "set/denoiser_sigma": float(result.get("denoiser_sigma") or 0),
        "set/input_noise_std": model.input_noise_std,
        "set/k": result.get("k", 0),
        "set/lam": model.initial_lam if red else 0,
        "set/lr": group.get("initial_lr", group["lr"]),
        "set/mu": model.initial_mu if red else 0,
        "set/seed": model.seed,
        "weighting": model.weighting if red else "none",
        "x_update": result.get("x_update", "none"),
    }


def _method(model: DeepImagePrior, result: Mapping[str, Any]) -> str:
    if result.get("x_update") == "pnp":
        name = "Plug-and-Play"
    elif isinstance(model, DeepRED):
        name = "RED" if isinstance(model.network, ImageParameter) else "DeepRED"
    else:
        name = "DIP"
    terms = [] if model.regularizer is None else [name_of(model.regularizer)]
    samplers = ["Langevin"] if "samples" in result else []
    return " + ".join([name, *(t.removesuffix("Penalty") for t in terms), *samplers])
