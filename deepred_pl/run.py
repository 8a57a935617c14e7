"""The one place that assembles a fit: settings to trainer, module and data."""

import json
import logging
import re
import sys
import tempfile
import warnings
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, TypeVar

import numpy as np
import torch
from jsonargparse import Namespace
from pytorch_lightning import Trainer
from pytorch_lightning.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor

import deepred_pl.denoisers  # noqa: F401  their short names
from deepred_pl.callbacks import (
    AutoStop,
    CollapseGuard,
    KeepMemory,
    Langevin,
    LastCheckpoint,
    Monitor,
    Panels,
    Preflight,
    REDUpdate,
    RestorationBar,
    Writer,
)
from deepred_pl.data import RestorationDataModule
from deepred_pl.directory import check_checkpoint, check_writable, run_directory
from deepred_pl.help import ReadableParser
from deepred_pl.images import to_array
from deepred_pl.log import SteadyLogger
from deepred_pl.model import DeepImagePrior, check_trainer
from deepred_pl.noise import NoiseModel
from deepred_pl.operators import Operator, Physics, as_operator
from deepred_pl.settings import bound_values, check_factories, find_configs
from deepred_pl.tiles import Region, Tiling, blend, cut

Image = TypeVar("Image", np.ndarray, Tensor)

ABOUT = "Restore one degraded image without training data, by DeepRED or Deep Image Prior."
USAGE = "deepred {} --config NAME [--config NAME ...] [--SECTION.SETTING VALUE ...]"
MORE = (
    "Sections: data is the image, model what is fitted to it, red the denoiser and the updates of "
    "x and u, trainer Lightning's own. Every sigma is in grey levels of an 8-bit image. More of a "
    "part: --model.help DeepRED, --data.operator.help Blur, --red.denoiser.help BM3D."
)
SUBCOMMANDS = {
    "fit": "Fit a network to one image, and write what it restores into the run directory.",
    "test": "Score the restored image of a checkpoint (--ckpt_path) against its ground truth.",
    "predict": "Write the restored image of a checkpoint (--ckpt_path).",
}

# What a user's mistake raises.
EXPECTED = (
    *(ValueError, RuntimeError, OSError, MemoryError),
    *(MisconfigurationException, ArgumentError),
)

SECTIONS = ("trainer", "model", "data", "guard", "red", "panels", "checkpoint")

LONGEST = 600  # characters; a checkpoint of another network lists all its parameters

# What a parser error says beside its reason: how it tried every member of a type.
BESIDE = (
    *("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType"),
    *("Not a valid subclass", "Subclass types expect", "a class path (str)", "a dict with"),
    "Type collections.abc.Callable",
)


class RestorationCLI(LightningCLI):
    """Parses settings and builds trainer, module and data; with `run`, runs a subcommand.

    Beside Lightning's sections `trainer`, `model` and `data` there are `guard` (`CollapseGuard`),
    `red` (`REDUpdate`), `panels` (`Panels`) and `checkpoint` (`LastCheckpoint`): sections, because
    an overlay that sets `trainer.callbacks` would replace callbacks listed there.

    It lives here and not with the command line, for everything that runs a fit uses this parser.

    Args:
        args: Command-line arguments as a list, or settings as a dict; None takes sys.argv. A
            `--config` may be the name of a shipped file, as "denoising" or "methods/dip".
        run: Run the subcommand (fit, test or predict) that the arguments begin with.
    """

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        bound_values()
        # Lightning calls what torch and jsonargparse have deprecated.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        warnings.filterwarnings("ignore", module="pytorch_lightning.cli")
        rank_zero_log = logging.getLogger("pytorch_lightning.utilities.rank_zero")
        rank_zero_log.addFilter(_is_no_advertisement)
        # Errors are the caller's to tell, and a name cut short is one.
        raising = {"exit_on_error": False, "allow_abbrev": False}
        commands = {
            name: {"description": text, "usage": USAGE.format(name), "epilog": MORE, **raising}
            for name, text in SUBCOMMANDS.items()
        }
        super().__init__(
            model_class=DeepImagePrior,
            datamodule_class=RestorationDataModule,
            subclass_mode_model=True,
            trainer_defaults={"enable_model_summary": False, "devices": 1},
            seed_everything_default=False,  # model.seed and data.seed own all randomness
            auto_configure_optimizers=False,
            parser_kwargs={
                "prog": "deepred",
                "description": ABOUT,
                "epilog": "deepred fit --config quickstart is a first fit, in half a minute.",
                **raising,
                **commands,
            },
            load_from_checkpoint_support=False,  # plain hparams: load with your own `network`
            args=args,
            run=run,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser whose help can be read."""
        self.parser_class = ReadableParser
        return super().init_parser(**kwargs)

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Tell what they are in words of ours; Lightning's are of its Trainer, and cut short."""
        super()._add_subcommands(parser, **kwargs)
        for action in parser._actions:
            for choice in getattr(action, "_choices_actions", []):
                choice.help = SUBCOMMANDS[choice.dest]

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """fit, test and predict; there is nothing to validate."""
        inherited = LightningCLI.subcommands()
        return {name: inherited[name] for name in SUBCOMMANDS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the sections `guard`, `red`, `panels` and `checkpoint`."""
        parser.add_lightning_class_args(CollapseGuard, "guard")
        parser.add_lightning_class_args(REDUpdate, "red")
        parser.add_lightning_class_args(Panels, "panels")
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        # Help in the order of the groups: what is this package's goes before Lightning's Trainer.
        parser._action_groups.sort(key=lambda group: group is parser.groups["trainer"])
        parser.set_defaults({"red.denoiser": {"class_path": "deepred_pl.denoisers.NonLocalMeans"}})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; unlike Lightning's, without a warning when a program's own arguments exist."""
        if isinstance(args, dict | Namespace):
            self.config = parser.parse_object(args)
        else:
            self.config = parser.parse_args(find_configs(sys.argv[1:] if args is None else args))

    def _parse_ckpt_path(self) -> None:
        """Leave the command line as given: Lightning would let the checkpoint override it.

        `DeepImagePrior.on_load_checkpoint` refuses what a resumed fit cannot change.
        """

    def before_instantiate_classes(self) -> None:
        """Find what is no setting, and no checkpoint; go on from a checkpoint alone."""
        for name in SECTIONS:  # the parser takes whatever stands there
            section = self._get(self.config, name)
            if not isinstance(section, Namespace):
                raise ValueError(f"expected settings by their names in {name}, got {section!r}")
        path = self._get(self.config, "ckpt_path")
        settings = self._get(self.config, "model").init_args
        check_factories(settings)
        check_factories(self._get(self.config, "red"))
        if path is not None and "init_from" in settings:
            settings.init_from = None  # the checkpoint has the network; that run may be gone
        if path is not None:
            check_checkpoint(Path(path))
            self.save_config_kwargs = {"overwrite": True}  # without a logger it is there already

    def instantiate_classes(self) -> None:
        """Build the parts; a value of a type that one cannot take is a mistake in the settings."""
        try:
            super().instantiate_classes()
        except TypeError as error:
            raise ValueError(
                f"the settings do not fit the parts that they name: {error}"
            ) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the callbacks every run has, and TensorBoard unless another logger is set."""
        settings = self._get(self.config_init, "trainer")
        callbacks = [KeepMemory(), Preflight(), Monitor(), Writer()]
        if settings.get("enable_progress_bar") is not False:
            callbacks.insert(3, RestorationBar())
        self.trainer_defaults["callbacks"] = callbacks
        if settings.get("logger") in (None, True) and not settings.get("fast_dev_run"):
            kwargs["logger"] = SteadyLogger(
                settings.get("default_root_dir") or ".", default_hp_metric=False
            )
        if settings.get("plugins") is None:
            # A scheduler's environment would have Lightning take its allocation for the fit's, save
            # in the middle of a step, and go on from whatever checkpoint lies in the directory.
            kwargs["plugins"] = LightningEnvironment()
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Find bad input before anything is written."""
        check_trainer(self.model, self.trainer)  # before other devices' processes start
        self.datamodule.setup("fit")
        self.model.build(self.datamodule.problem)
        for callback in self.trainer.callbacks:
            if isinstance(callback, REDUpdate | AutoStop | Langevin | Preflight):
                callback.check(self.model, self.trainer)
        root = self.trainer.default_root_dir
        if SLURMEnvironment.detect() and any(Path(root).glob("hpc_ckpt_*.ckpt")):
            raise ValueError(
                f"expected no hpc_ckpt_….ckpt in {root}, got one, from which Lightning would go on "
                "under SLURM; move it away, or choose another --trainer.default_root_dir"
            )
        if not self.trainer.fast_dev_run:
            check_writable(run_directory(self.trainer))

    def after_fit(self) -> None:
        """Say so where a fit had no step left to make, and so wrote nothing."""
        trainer = self.trainer
        if not trainer.fast_dev_run and not (run_directory(trainer) / "result.json").exists():
            raise ValueError(
                f"no step was left to make: the fit is at step {trainer.global_step} of "
                f"{trainer.max_steps}; give a larger --trainer.max_steps, or let `deepred predict` "
                "write the checkpoint's image"
            )


def restore(
    image: Image,
    task: str | Sequence[str] = "denoising",
    overrides: Mapping[str, Any] | None = None,
    operator: Operator | Physics | None = None,
    noise: NoiseModel | None = None,
    tile: int | None = None,
    overlap: int | None = None,
) -> Image:
    """Restore one image in memory, by the settings of a configuration file.

    Args:
        image: The measurement: an array (H, W) or (H, W, C), or a tensor (H, W), (C, H, W) or
            (1, C, H, W); uint8, uint16, or floats in [0, 1].
        task: Name of a shipped configuration, as "denoising", or a YAML file; or several, later
            ones changing earlier ones, as ["denoising", "methods/quick"].
        overrides: Settings by their names on the command line, as
            {"red.every_n_steps": 20, "trainer.max_steps": 500}.
        operator: A; None takes the configuration's.
        noise: The noise model; None takes the configuration's.
        tile: Restore tile × tile pixels at a time, for images too large for the memory; None
            restores the image at once.
        overlap: Pixels that neighbouring tiles share, and over which they are blended; None is an
            eighth of a tile, and what a blur or downsampling mixes beside it.

    Returns:
        The restored image, of the kind, dtype and device of `image`; larger than it with an
        operator that makes images smaller. Nothing is left on disk, unless the overrides name a
        `trainer.default_root_dir`, which then gets the run directory, with tiles one for each.

    Raises:
        ValueError: An image, a setting or a combination that cannot be, as tiles behind an
            operator that mixes the whole image; before the fit starts.

    >>> import skimage.data
    >>> photo = skimage.data.astronaut()[:35, :41]
    >>> restore(photo, ["denoising", "methods/quick"], {"trainer.max_steps": 2}).shape
    (35, 41, 3)
    """
    if tile is None and overlap is not None:
        raise ValueError(f"overlap={overlap} is that of tiles; give tile too, or leave it out")
    with tempfile.TemporaryDirectory() as scratch:
        settings = dict(overrides or {})
        keeps_files = "trainer.default_root_dir" in settings
        if not keeps_files:
            settings |= {"trainer.default_root_dir": scratch, "trainer.logger": False}
        tasks = [task] if isinstance(task, str) else task
        options = [f"--config={name}" for name in tasks]
        options += [f"--{name}={_as_text(value)}" for name, value in settings.items()]

        def assemble() -> RestorationCLI:
            try:
                cli = RestorationCLI(options, run=False)
            except ArgumentError as error:
                raise ValueError(str(error)) from error
            data = cli.datamodule
            if data.measurement is not None or data.ground_truth is not None:
                raise ValueError(
                    "restore() is given the measurement itself: leave data's files out"
                )
            data.measurement = _channels_last(image)
            data.operator = data.operator if operator is None else as_operator(operator)
            data.noise = data.noise if noise is None else noise
            return cli

        def fit(region: Region | None = None) -> RestorationCLI:
            cli = assemble()
            cli.datamodule.region = region or cli.datamodule.region
            cli.before_fit()
            if not keeps_files:
                unkept = (Writer, LastCheckpoint, SaveConfigCallback)
                kept = [c for c in cli.trainer.callbacks if not isinstance(c, unkept)]
                cli.trainer.callbacks = kept
            cli.trainer.fit(cli.model, datamodule=cli.datamodule)
            return cli

        if tile is None:
            cli = fit()
            restored = to_array(cli.model.restored, cli.datamodule.image_format)
        else:
            data = assemble().datamodule
            data.setup()
            tiling = tiling_of(data, tile, overlap)
            tiles = [fit(region).model.restored for region in tiling.regions]
            restored = to_array(blend(tiles, tiling), data.image_format)
    return _like(image, restored)


def tiling_of(data: RestorationDataModule, tile: int, overlap: int | None = None) -> Tiling:
    """How to cut the image that a datamodule has set up.

    Args:
        data: The datamodule.
        tile: Side of a tile in pixels.
        overlap: Pixels that tiles share; None is an eighth of a tile, and twice the margin.

    Raises:
        ValueError: The image cannot be cut, or not so.
    """
    assert data.problem is not None
    if data.region is not None:
        raise ValueError("expected a whole image to cut into tiles; leave data.region out")
    operator = data.problem.operator
    rows, columns = operator.reach()  # refuses
    # Pixels beside a cut whose own measured value mixes in what is beyond, and is not compared.
    margin = rows * operator.factor, columns * operator.factor
    least = 2 * max(margin) + operator.factor if max(margin) else 0
    if overlap is None:
        overlap = tile // 8 + 2 * max(margin)
    elif overlap < least:
        raise ValueError(
            f"tiles behind {operator} must share at least {least} pixels, got an overlap of "
            f"{overlap}; leave it out"
        )
    height, width = data.problem.image_shape[-2:]
    regions = cut(height, width, tile, overlap, operator.factor)
    for region in regions:
        data.problem.part(region)  # refuses
    return Tiling(regions, overlap, margin)


class _Parser(RestorationCLI):
    """Parses settings, and builds nothing."""

    def before_instantiate_classes(self) -> None:
        """Nothing is instantiated."""

    def instantiate_classes(self) -> None:
        """Nothing is instantiated."""


def settings_of(options: Sequence[str]) -> dict[str, Any]:
    """All settings that options of the command line come to, as plain data, but for None.

    Raises:
        argparse.ArgumentError: A setting that is none; ValueError: a configuration that is none.
    """
    cli = _Parser(list(options), run=False)
    return json.loads(cli.parser.dump(cli.config, format="json"))


def reason(error: BaseException) -> str:
    """What an error says, in one line."""
    lines = [line.strip().removeprefix("- ") for line in str(error).splitlines()]
    lines = [re.sub(r"^Type .* a callable class: (?=Option )", "", line) for line in lines]
    reasons = [line for line in lines if line and not line.startswith(BESIDE)]
    told = " ".join(reasons)
    if not told or told.endswith(":"):  # what stands beside the reason is all that there is
        told = " ".join(line for line in lines if line)
    return shorten(told or type(error).__name__, LONGEST)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage()


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _channels_last(image: np.ndarray | Tensor) -> np.ndarray:
    """The image as an array, (H, W) or (H, W, C)."""
    if isinstance(image, np.ndarray):
        return image
    if not isinstance(image, Tensor):
        raise ValueError(
            f"expected a NumPy array or a tensor, got {type(image).__name__}; give "
            "numpy.asarray(image), or use deepred_pl.images.read_image for files"
        )
    if image.ndim not in (2, 3) and not (image.ndim == 4 and image.shape[0] == 1):
        raise ValueError(
            f"expected a tensor (H, W), (C, H, W) or (1, C, H, W), got {tuple(image.shape)}; "
            "restore one image at a time"
        )
    array = image.detach().cpu()
    array = array.float() if array.is_floating_point() else array  # NumPy has no bfloat16
    return (array if array.ndim == 2 else array.reshape(array.shape[-3:]).movedim(0, -1)).numpy()


def _like(image: np.ndarray | Tensor, restored: np.ndarray) -> Any:
    """The restored array (H, W, C) in the kind, layout, dtype and device of `image`."""
    if not isinstance(image, Tensor):
        restored = restored[..., 0] if image.ndim == 2 else restored
        return restored.astype(image.dtype) if image.dtype.kind == "f" else restored
    tensor = torch.from_numpy(restored).movedim(-1, 0).contiguous()  # (C, H, W)
    if image.ndim != 3:
        tensor = tensor[0] if image.ndim == 2 else tensor[None]
    return tensor.to(image.device, image.dtype if image.is_floating_point() else tensor.dtype)
