"""The one place that assembles a fit: settings to trainer, module and data."""

from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from pytorch_lightning import Trainer
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import TensorBoardLogger

import deepred_pl.denoisers  # noqa: F401  their short names
from deepred_pl.callbacks import LastCheckpoint, Monitor, REDUpdate, RestorationBar, Writer
from deepred_pl.data import RestorationDataModule
from deepred_pl.directory import check_writable, run_directory
from deepred_pl.model import DeepImagePrior

ABOUT = "Restore one degraded image without training data, by DeepRED or Deep Image Prior."
SUBCOMMANDS = {
    "fit": "Fit a network to one image, and write what it restores into the run directory.",
    "test": "Score the restored image of a checkpoint (--ckpt_path) against its ground truth.",
    "predict": "Write the restored image of a checkpoint (--ckpt_path).",
}


class RestorationCLI(LightningCLI):
    """Parses settings and builds trainer, module and data; with `run`, runs a subcommand.

    Beside Lightning's sections `trainer`, `model` and `data` there are `red` (`REDUpdate`) and
    `checkpoint` (`LastCheckpoint`): sections, because an overlay that sets `trainer.callbacks`
    would replace callbacks listed there.

    It lives here and not with the command line, for everything that runs a fit uses this parser.

    Args:
        args: Command-line arguments as a list, or settings as a dict; None takes sys.argv.
        run: Run the subcommand (fit, test or predict) that the arguments begin with.
    """

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        raising = {"exit_on_error": False}  # for the caller to tell
        commands = {name: {"description": text, **raising} for name, text in SUBCOMMANDS.items()}
        super().__init__(
            model_class=DeepImagePrior,
            datamodule_class=RestorationDataModule,
            subclass_mode_model=True,
            trainer_defaults={"enable_model_summary": False},
            seed_everything_default=False,  # model.seed and data.seed own all randomness
            auto_configure_optimizers=False,
            parser_kwargs={"prog": "deepred", "description": ABOUT, **raising, **commands},
            load_from_checkpoint_support=False,  # plain hparams: load with your own `network`
            args=args,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """fit, test and predict; there is nothing to validate."""
        inherited = LightningCLI.subcommands()
        return {name: inherited[name] for name in SUBCOMMANDS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the sections `red` and `checkpoint`."""
        parser.add_lightning_class_args(REDUpdate, "red")
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        parser.set_defaults({"red.denoiser": {"class_path": "deepred_pl.denoisers.NonLocalMeans"}})

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; unlike Lightning's, without a warning when a program's own arguments exist."""
        if isinstance(args, dict | Namespace):
            self.config = parser.parse_object(args)
        else:
            self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Leave the command line as given: Lightning would let the checkpoint override it.

        `DeepImagePrior.on_load_checkpoint` refuses what a resumed fit cannot change.
        """

    def before_instantiate_classes(self) -> None:
        """Find a checkpoint that is none; torch would advise to load it unsafely."""
        path = self._get(self.config, "ckpt_path")
        if path is None or not Path(path).is_file():
            return
        try:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)["loops"]
        except Exception as error:  # unpicklers raise what they like
            raise ValueError(
                f"expected a run's checkpoints/last.ckpt, got {path}, which is damaged or none; "
                "give another, or start without"
            ) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the callbacks every run has, and TensorBoard unless another logger is set."""
        settings = self._get(self.config_init, "trainer")
        callbacks = [Monitor(), Writer()]
        if settings.get("enable_progress_bar") is not False:
            callbacks.insert(1, RestorationBar())
        self.trainer_defaults["callbacks"] = callbacks
        if settings.get("logger") in (None, True) and not settings.get("fast_dev_run"):
            kwargs["logger"] = TensorBoardLogger(
                settings.get("default_root_dir") or ".", default_hp_metric=False
            )
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Find bad input before anything is written."""
        self.datamodule.setup("fit")
        self.model.build(self.datamodule.problem)
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
