"""Restore an image in memory with one call."""

import json
import os
import tempfile
import time
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deepred_pl.callbacks import LastCheckpoint, REDUpdate, Writer
from deepred_pl.callbacks.red import check_denoiser
from deepred_pl.callbacks.writer import summarise
from deepred_pl.checks import RestorationWarning, check_factory
from deepred_pl.choose import Choice, as_options, before_choice, choose, set_up, task_of
from deepred_pl.cli import RestorationCLI, reason
from deepred_pl.denoisers import Denoiser
from deepred_pl.image_format import ImageFormat
from deepred_pl.images import stored_page, to_array, with_alpha
from deepred_pl.lightning import Callback, SaveConfigCallback, rank_zero_warn
from deepred_pl.model import DeepRED
from deepred_pl.noise import NoiseModel
from deepred_pl.operators import Operator, Physics, as_operator, unknown_blur
from deepred_pl.problem import InverseProblem, check_noise_model
from deepred_pl.report import combine, diagnosis
from deepred_pl.tiles import Region, blend
from deepred_pl.torch_state import default_settings


@default_settings()
def restore(
    image: np.ndarray | Tensor | str | os.PathLike,
    task: str | Sequence[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    operator: Operator | Physics | None = None,
    noise: NoiseModel | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    denoiser: Denoiser | Callable[[Tensor], Tensor] | None = None,
    network: Callable[[int], nn.Module] | None = None,
    callbacks: Sequence[Callback] = (),
    effort: str | None = None,
    report: bool = False,
) -> Any:
    """Restore one image in memory, with chosen settings or those of a configuration.

    It may be called anywhere, also in a hook of another fit: torch's settings of the calling
    program, such as inference mode or autocast, do not apply.

    Args:
        image: The measurement: an array (H, W) or (H, W, C), or with the axes that the override
            "data.axes" names, such as "CYX"; or a tensor (H, W), (C, H, W) or (1, C, H, W); uint8,
            uint16, or floats in [0, 1]. NaN and masked values are missing, and filled. An opaque
            last channel of two or four is kept. Or a file, which the artefacts of a JPEG need
            (task "jpeg", or operator=JPEG() of `deepred_pl.jpeg`).
        task: Name of a shipped configuration, such as "denoising", or a YAML file; or several, of
            which later ones override earlier ones, such as ["denoising", "methods/quick"]. None is
            the one for the operator, whose settings and noise are chosen for this image.
        overrides: Settings by their names on the command line, such as
            {"red.every_n_steps": 20, "trainer.max_steps": 500}.
        operator: A; None uses the configuration's.
        noise: The noise model; None uses the configuration's.
        tile: Restore tile × tile pixels at a time, for images too large for the memory; None
            restores the image at once.
        overlap: Pixels that neighbouring tiles share and in which they are blended; None is an
            eighth of a tile, plus what a blur or downsampling mixes.
        denoiser: f, a denoiser or a function from (1, C, H, W) to the same; None uses the
            configuration's.
        network: Called with the number of channels, returns T_θ; None uses the configuration's.
        callbacks: Further callbacks of the fit; with tiles, each fit has copies of them.
        effort: Without a task, "fast", "default" (None), "best", or the time for a fit, such as
            "90s" or "5m".
        report: Return how it was done, too.

    Returns:
        The restored image, of the same kind, dtype and device as `image`, or an array of a file's
        type; larger if the operator reduces images. No files are kept, unless the overrides have a
        `trainer.default_root_dir`, which then gets a run directory, or one per tile. With `report`,
        the image and a dict of plain data: what was "assumed", the settings "chosen", and the
        "result", which is described in the guide as `result.json`. Without tiles it also has the
        "kernel" that was found of an `UnknownBlur`, an array (rows, columns).

    Raises:
        ValueError: An impossible image, setting or combination, such as tiles of an image measured
            by an operator that mixes all of it; before the fit starts.

    >>> import skimage.data
    >>> photo = skimage.data.astronaut()[:35, :41]
    >>> settings = {"trainer.max_steps": 2, "data.noise.sigma": None}  # estimate the noise
    >>> restore(photo, ["denoising", "methods/quick"], settings).shape
    (35, 41, 3)
    """
    if task is not None and effort is not None:
        raise ValueError(
            f"effort={effort!r} chooses settings that the task {task!r} has already; leave one out"
        )
    _check_callbacks(callbacks)
    if tile is None and overlap is not None:
        raise ValueError(f"overlap={overlap} applies to tiles; set tile too, or leave it out")
    with tempfile.TemporaryDirectory() as scratch:
        settings = dict(overrides or {})
        keeps_files = "trainer.default_root_dir" in settings
        if not keeps_files:
            settings |= {"trainer.default_root_dir": scratch, "trainer.logger": False}
        tasks: Sequence[str] = [task] if isinstance(task, str) else task or []
        options = [f"--{name}={_as_text(name, value)}" for name, value in settings.items()]
        if task is None:
            tasks = [task_of(None if operator is None else as_operator(operator))]
        configs = [f"--config={name}" for name in tasks]

        def assemble(chosen: Sequence[str] = (), region: Region | None = None) -> RestorationCLI:
            try:
                cli = RestorationCLI([*configs, *chosen, *options], run=False)
            except ArgumentError as error:
                raise ValueError(reason(error)) from error
            data = cli.datamodule
            if data.axes is not None and isinstance(image, Tensor):
                raise ValueError(
                    "a tensor's axes are known: data.axes is for arrays and files, leave it out"
                )
            if data.measurement is not None or data.ground_truth is not None:
                raise ValueError("restore() gets the measurement itself: leave data's files out")
            data.measurement = _channels_last(image)
            data.operator = data.operator if operator is None else as_operator(operator)
            check_noise_model(noise)
            data.noise = data.noise if noise is None else noise
            if network is not None:
                check_factory("network", network, nn.Module, "SkipNet, width=32")
                cli.model.make_network = network
            if denoiser is not None:
                _use(denoiser, cli)
            data.region = data.region if region is None else region
            cli.trainer.callbacks.extend(callbacks if tile is None else deepcopy(callbacks))
            return cli

        def fit(cli: RestorationCLI) -> Tensor:
            cli.before_fit()
            if not keeps_files:
                unkept = (Writer, LastCheckpoint, SaveConfigCallback)
                kept = [c for c in cli.trainer.callbacks if not isinstance(c, unkept)]
                cli.trainer.callbacks = kept
            began = time.monotonic()
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
            results.append(summarise(cli.model, cli.trainer, time.monotonic() - began))
            return cli.model.restored

        def fit_part(part: InverseProblem) -> Tensor:
            cli = assemble(chosen)
            cli.datamodule.problem = part
            cli.datamodule.image_format = ImageFormat("float32")
            return fit(cli)

        choice, results = Choice(), list[dict[str, Any]]()
        if task is None:
            objects = {"data.noise": noise, "data.operator": operator, "model.network": network}
            given = {*settings, *(name for name, value in objects.items() if value is not None)}
            if tile is not None or any(getattr(c, "chooses", False) for c in callbacks):
                given.add("data.hold_out")
            middle = None
            if tile is not None:
                first = before_choice(tasks[0], given, effort or "default")
                middle = _middle(set_up(assemble(first).datamodule), tile)
            choice = choose(partial(assemble, region=middle), given, effort or "default")
        chosen = as_options(choice.settings)
        cli = assemble(chosen)
        data = cli.datamodule
        if tile is None:
            restored = fit(cli)
        else:
            if data.region is not None:
                raise ValueError("tiles cover the whole image; leave data.region out")
            data.setup()
            assert data.problem is not None
            tiling, parts = data.problem.split(tile, overlap)
            restored = blend((fit_part(part) for part in parts), tiling)
        assert data.problem is not None
        result = results[0] if tile is None else combine(data.problem, restored, results)
        if text := diagnosis(result):
            rank_zero_warn(text, category=RestorationWarning)
        array = with_alpha(to_array(restored, data.image_format), data.image_format)
        if data.image_format.axes:
            array = stored_page(array, data.image_format)[1]
        if report:
            about: dict[str, Any] = {
                "assumed": choice.assumed,
                "chosen": choice.settings,
                "result": result,
            }
            blur = unknown_blur(data.problem.operator)
            if blur is not None and tile is None:
                about["kernel"] = blur.kernel.cpu().numpy()
            return _like(image, array), about
        return _like(image, array)


def _middle(problem: InverseProblem, tile: int) -> Region:
    """A tile in the middle of the image, by which all are judged."""
    height, width = problem.image_shape[-2:]
    middle = Region.middle(height, width, tile)
    return Region(*(side - side % problem.operator.factor for side in middle))


def _use(denoiser: Callable[[Tensor], Tensor], cli: RestorationCLI) -> None:
    if not isinstance(cli.model, DeepRED):
        raise ValueError(
            f"a denoiser is used by DeepRED, but this configuration fits a "
            f"{type(cli.model).__name__}; leave denoiser out"
        )
    check_denoiser(denoiser)
    for update in cli.trainer.callbacks:
        if isinstance(update, REDUpdate):
            update.denoiser = denoiser


def _check_callbacks(callbacks: Sequence[Callback]) -> None:
    if not isinstance(callbacks, Sequence) or not all(isinstance(c, Callback) for c in callbacks):
        raise ValueError(f"callbacks must be a list of callback objects, got {callbacks!r}")
    if any(isinstance(callback, REDUpdate) for callback in callbacks):
        raise ValueError(
            "restore() has a REDUpdate of its own; give its denoiser as denoiser=..., and its "
            'settings as overrides, such as {"red.every_n_steps": 5}'
        )


def _as_text(name: str, value: Any) -> str:
    if getattr(value, "ndim", 0) > 1:
        raise ValueError(
            f"expected a number, text or list for {name}, got an array {tuple(value.shape)}; masks "
            "and kernels are given as operator=Mask(...) or operator=Blur(...)"
        )
    return value if isinstance(value, str) else json.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.generic | np.ndarray | Tensor) else str(value)


def _channels_last(image: object) -> np.ndarray | str | os.PathLike:
    """The image as an array, (H, W) or (H, W, C), or its file."""
    if isinstance(image, np.ndarray | str | os.PathLike):
        return image
    if not isinstance(image, Tensor):
        raise ValueError(
            f"expected a NumPy array, a tensor or a file's path, got {type(image).__name__}; use "
            "numpy.asarray(image)"
        )
    if image.ndim not in (2, 3) and not (image.ndim == 4 and image.shape[0] == 1):
        raise ValueError(
            f"expected a tensor (H, W), (C, H, W) or (1, C, H, W), got {tuple(image.shape)}; "
            "restore one image at a time"
        )
    array = image.detach().cpu()
    array = array.float() if array.is_floating_point() else array  # NumPy has no bfloat16
    return (array if array.ndim == 2 else array.reshape(array.shape[-3:]).movedim(0, -1)).numpy()


def _like(image: np.ndarray | Tensor | str | os.PathLike, restored: np.ndarray) -> Any:
    """The restored array (H, W, C) in the kind, layout, dtype and device of `image`."""
    if isinstance(image, str | os.PathLike):
        return restored[..., 0] if restored.shape[-1] == 1 else restored
    if not isinstance(image, Tensor):
        restored = restored[..., 0] if image.ndim < restored.ndim else restored
        return restored.astype(image.dtype) if image.dtype.kind == "f" else restored
    tensor = torch.from_numpy(restored).movedim(-1, 0).contiguous()  # (C, H, W)
    if image.ndim != 3:
        tensor = tensor[0] if image.ndim == 2 else tensor[None]
    return tensor.to(image.device, image.dtype if image.is_floating_point() else tensor.dtype)
