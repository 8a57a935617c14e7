"""The `deepred` command: its parser, its subcommands, and errors in one line."""

import json
import logging
import os
import re
import shlex
import signal
import sys
import threading
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill, shorten
from typing import Any, NoReturn

import torch
from jsonargparse import Namespace

import deepred_pl.denoisers  # noqa: F401  makes their short names known
from deepred_pl.background import has_abandoned_job
from deepred_pl.callbacks import (
    CollapseGuard,
    CudaGraph,
    KeepMemory,
    LastCheckpoint,
    Monitor,
    Panels,
    Preflight,
    REDUpdate,
    RestorationBar,
    Writer,
)
from deepred_pl.callbacks.base import check_untaken, restoration_callbacks, run_directory
from deepred_pl.callbacks.checkpoint import SIGNALLED, resume_with
from deepred_pl.checks import RestorationWarning
from deepred_pl.data import RestorationDataModule
from deepred_pl.files import check_writable, load_checkpoint
from deepred_pl.lightning import (
    NAME,
    NAMES,
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    LightningEnvironment,
    LightningModule,
    MisconfigurationException,
    SaveConfigCallback,
    SLURMEnvironment,
    Trainer,
    callbacks,
    loggers,
    rank_zero_warn,
)
from deepred_pl.model import DeepImagePrior
from deepred_pl.trainer import check_trainer

ABOUT = (
    "Restore one degraded image without training data, by DeepRED or Deep Image Prior. `deepred "
    "restore photo.jpg` chooses the settings itself: see `deepred restore --help`. The subcommands "
    "below take all settings."
)
USAGE = "deepred {} --config NAME [--config NAME ...] [--SECTION.SETTING VALUE ...]"
MORE = (
    "Sections: data is the image, model what is fitted to it, red the denoiser and the updates of "
    "x and u, trainer Lightning's Trainer. Every sigma is in grey levels of an 8-bit image. Help "
    "on a part: --model.help DeepRED, --data.operator.help Blur, --red.denoiser.help BM3D."
)
SUBCOMMANDS = {
    "fit": "Fit a network to one image, and write the restored image into the run directory.",
    "test": "Score the restored image of a checkpoint (--ckpt_path) against its ground truth.",
    "predict": "Write the restored image of a checkpoint (--ckpt_path).",
}
SECTIONS = ("trainer", "model", "data", "guard", "red", "panels", "checkpoint")

# Exceptions that a user's mistake may cause.
EXPECTED = (
    *(ValueError, RuntimeError, OSError, MemoryError),
    *(MisconfigurationException, ArgumentError),
)
LONGEST = 600  # characters of an error; a checkpoint of another network lists all its parameters
# Lines of a parser error that only describe how each member of a type was tried.
NOISE = (
    *("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType"),
    *("Not a valid subclass", "Subclass types expect", "a class path (str)", "a dict with"),
    "Type collections.abc.Callable",
)

# What jsonargparse says of a class that is not derived from the one that a setting needs.
NO_SUBCLASS = re.compile(
    r"Expected a path but (\S+) either not accessible or invalid "
    r"Import path does not correspond to a subclass of (\w+).*"
)
BASES = {"Denoiser": "denoisers", "NoiseModel": "noise", "Operator": "operators", "Term": "losses"}

# Settings that the config.yaml of an earlier run may have, and the remedy.
FORMER = {
    "wait_for_denoiser": "remove this line",
    "deepred_pl.model.WarmupCosine": "replace it with deepred_pl.optim.WarmupCosine",
    "deepred_pl.log.SteadyLogger": "replace it with TensorBoardLogger",
    "BM3DDeblurring": "use ImageParameter with start: deepred_pl.denoisers.bm3d.deblur",
}

# In an installed package next to this module; in a checkout at the top level.
_PACKAGE = Path(__file__).parent
CONFIGS = next(
    (d for d in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if d.is_dir()), _PACKAGE
)


def main(args: ArgsType = None) -> None:
    """Run `deepred fit|test|predict`; a user's mistake exits with one line and status 1.

    With the environment variable JSONARGPARSE_DEBUG=true the traceback is shown instead.

    Args:
        args: Command-line arguments as a list; None uses sys.argv.
    """
    try:
        RestorationCLI(args)
    except EXPECTED as error:
        if os.environ.get("JSONARGPARSE_DEBUG", "").lower() == "true":
            raise
        sys.exit(f"deepred: error: {reason(error)}")
    except KeyboardInterrupt:  # before or after the fit, which handles signals itself
        print("deepred: stopped", file=sys.stderr)
        sys.exit(SIGNALLED + signal.SIGINT)


def command() -> NoReturn:
    """Run `main` as a process of its own, which ends even if an abandoned denoiser still runs.

    Python would wait for such a thread's foreign code, and abort the process with another status.
    """
    threading.excepthook = report_in_thread
    warnings.formatwarning = _in_one_line
    try:
        main()
        status: int | str | None = 0
    except SystemExit as error:
        status = error.code
    if not has_abandoned_job():
        sys.exit(status)
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


class RestorationCLI(LightningCLI):
    """Parses settings and builds trainer, module and data; with `run`, runs a subcommand.

    In addition to Lightning's sections `trainer`, `model` and `data` there are `guard`
    (`CollapseGuard`), `red` (`REDUpdate`), `panels` (`Panels`) and `checkpoint` (`LastCheckpoint`).
    These are sections because a configuration that sets `trainer.callbacks` would replace callbacks
    listed there.

    Args:
        args: Command-line arguments as a list, or settings as a dict; None uses sys.argv. A
            `--config` may be the name of a shipped file, such as "denoising" or "methods/dip".
        run: Run the subcommand (fit, test or predict) that the arguments begin with.
    """

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        # Lightning calls functions that torch and jsonargparse have deprecated.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        warnings.filterwarnings("ignore", module=re.escape(f"{NAME}.cli"))
        # Python would show the same text only once, also for another image.
        warnings.filterwarnings("always", category=RestorationWarning, append=True)
        for name in NAMES:
            log = logging.getLogger(f"{name}.utilities.rank_zero")
            log.addFilter(_is_no_advertisement)
        # Errors are raised to the caller, and abbreviated names are errors.
        raising = {"exit_on_error": False, "allow_abbrev": False}
        commands = {
            name: {"description": text, "usage": USAGE.format(name), "epilog": MORE, **raising}
            for name, text in SUBCOMMANDS.items()
        }
        super().__init__(
            save_config_callback=_SaveConfig,
            save_config_kwargs={"save_to_log_dir": False},
            model_class=DeepImagePrior,
            datamodule_class=RestorationDataModule,
            subclass_mode_model=True,
            trainer_defaults={"enable_model_summary": False, "devices": 1},
            seed_everything_default=False,  # model.seed and data.seed determine all randomness
            auto_configure_optimizers=False,
            parser_kwargs={
                "prog": "deepred",
                "description": ABOUT,
                "epilog": "For a first fit of half a minute: deepred fit --config quickstart",
                **raising,
                **commands,
            },
            load_from_checkpoint_support=False,  # plain hparams: load with your own `network`
            args=args,
            run=run,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Use a parser with readable help."""
        self.parser_class = _Parser
        return super().init_parser(**kwargs)

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        # Lightning's descriptions are those of Trainer methods, truncated; no public API changes
        # them. Private names of Lightning 2.6 and argparse.
        super()._add_subcommands(parser, **kwargs)
        for action in parser._actions:
            for choice in getattr(action, "_choices_actions", []):
                choice.help = SUBCOMMANDS[choice.dest]

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The subcommands fit, test and predict; there is nothing to validate."""
        inherited = LightningCLI.subcommands()
        return {name: inherited[name] for name in SUBCOMMANDS}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the sections `guard`, `red`, `panels` and `checkpoint`."""
        parser.add_lightning_class_args(CollapseGuard, "guard")
        parser.add_lightning_class_args(REDUpdate, "red")
        parser.add_lightning_class_args(Panels, "panels")
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        parser.set_defaults({"red.denoiser": {"class_path": "deepred_pl.denoisers.NonLocalMeans"}})
        # Help shows groups in this order: the long list of Lightning's Trainer last. argparse has
        # no public access to it; checked with Python 3.11.
        parser._action_groups.sort(key=lambda group: group is parser.groups["trainer"])

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; unlike Lightning's, without a warning if the program has its own arguments."""
        if isinstance(args, dict | Namespace):
            self.config = parser.parse_object(args)
        else:
            self.config = parser.parse_args(find_configs(sys.argv[1:] if args is None else args))

    def _parse_ckpt_path(self) -> None:
        # Lightning 2.6 lets a checkpoint override the command line, and has no option against it.
        # `DeepImagePrior.set_extra_state` refuses settings that a resumed fit cannot change.
        pass

    def before_instantiate_classes(self) -> None:
        """Validate sections and checkpoint; a resumed fit only needs its checkpoint."""
        for name in SECTIONS:  # the parser accepts any value in their place
            section = self._get(self.config, name)
            if not isinstance(section, Namespace):
                raise ValueError(f"expected named settings in section {name}, got {section!r}")
        path = self._get(self.config, "ckpt_path")
        if path is not None:
            load_checkpoint(Path(path), "loops")
            settings = self._get(self.config, "model").init_args
            if "init_from" in settings:
                settings.init_from = None  # the checkpoint has the network; that run may be gone

    def instantiate_classes(self) -> None:
        """Build trainer, module and data; report a value of a wrong type as a setting's."""
        try:
            super().instantiate_classes()
        except TypeError as error:
            raise ValueError(f"the settings do not fit the classes they name: {error}") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the callbacks of every run, and TensorBoard unless another logger is set.

        Settings that turn one of them off, and a progress bar of the user's, are respected.
        """
        settings = self._get(self.config_init, "trainer")
        _check_gpu(settings.get("accelerator"))
        bare = settings.get("barebones")
        own = [KeepMemory(), Preflight(), CudaGraph(), *([] if bare else [Monitor()])]
        given = settings.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        bars = [c for c in given if isinstance(c, callbacks.ProgressBar)]
        if settings.get("enable_progress_bar") is not False and not bars and not bare:
            own.append(RestorationBar())
        self.trainer_defaults["callbacks"] = [*own, Writer()]
        logged = settings.get("logger") in (None, True)
        if logged and not settings.get("fast_dev_run") and not bare:
            kwargs["logger"] = loggers.TensorBoardLogger(
                settings.get("default_root_dir") or ".", default_hp_metric=False
            )
        if settings.get("plugins") is None:
            # In a scheduler's environment Lightning would adopt its allocation, save in the middle
            # of a step, and resume from any checkpoint in the directory.
            kwargs["plugins"] = LightningEnvironment()
        return super().instantiate_trainer(**kwargs)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list) -> Trainer:
        # A private name of Lightning 2.6, which adds the callbacks of all sections.
        if config.get("enable_checkpointing") is False or config.get("barebones"):
            callbacks = [c for c in callbacks if not isinstance(c, LastCheckpoint)]
        return super()._instantiate_trainer(config, callbacks)

    def before_fit(self) -> None:
        """Find bad input before anything is written."""
        self._get(self.config_init, "checkpoint").how_to_resume = _command_to_resume
        check_trainer(self.model, self.trainer)  # before other devices' processes start
        self.datamodule.setup("fit")
        self.model.build(self.datamodule.problem)
        is_jpeg = str(self.datamodule.measurement).lower().endswith((".jpg", ".jpeg"))
        if self.model.fidelity == "backprojection" and is_jpeg:
            rank_zero_warn(
                "The noise of a JPEG is not white, as the back-projection assumes, and the result "
                "may be full of grain: add --config methods/likelihood",
                category=RestorationWarning,
            )
        for callback in restoration_callbacks(self.trainer, ""):
            callback.check(self.model, self.trainer)
        root = self.trainer.default_root_dir
        if SLURMEnvironment.detect() and any(Path(root).glob("hpc_ckpt_*.ckpt")):
            raise ValueError(
                f"expected no hpc_ckpt_*.ckpt in {root}, found one, from which Lightning would "
                "resume under SLURM; move it, or set another --trainer.default_root_dir"
            )
        if not self.trainer.fast_dev_run:
            check_writable(run_directory(self.trainer), "--trainer.default_root_dir")

    def after_fit(self) -> None:
        """Report a fit that had no step left to make, and wrote nothing."""
        trainer = self.trainer
        if not trainer.fast_dev_run and not (run_directory(trainer) / "result.json").exists():
            raise ValueError(
                f"no step is left: the fit is at step {trainer.global_step} of "
                f"{trainer.max_steps}; increase --trainer.max_steps, or write the checkpoint's "
                "image with `deepred predict`"
            )


def _check_gpu(accelerator: Any) -> None:
    if accelerator not in ("gpu", "cuda") or torch.cuda.is_available():
        return
    if accelerator == "gpu" and torch.backends.mps.is_available():
        return
    why = f"torch {torch.__version__} sees none"
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} is not built for one"
    raise ValueError(
        f"expected an NVIDIA GPU for trainer.accelerator={accelerator!r}, but {why}; install its "
        "driver and a CUDA build of torch, or leave trainer/gpu out"
    )


def _command_to_resume(checkpoint: Path) -> str:
    settings = checkpoint.parents[1] / "config.yaml"
    if not settings.is_file():  # the checkpoint was moved
        return resume_with(checkpoint)
    command = ["deepred", "fit", "--config", str(settings), "--ckpt_path", str(checkpoint)]
    return ": " + shlex.join(command)


class _SaveConfig(SaveConfigCallback):
    """Saves all settings as `config.yaml` in the run directory, whatever the logger."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        path = run_directory(trainer) / self.config_filename
        checkpoint = self.config.get("ckpt_path")  # the trainer does not know it yet
        resumed = checkpoint and path.parent.resolve() in Path(checkpoint).resolve().parents
        if not resumed:
            check_untaken(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.parser.save(self.config, path, skip_none=False, overwrite=bool(resumed))


class _SettingsOnly(RestorationCLI):
    """Parses settings without building anything."""

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass


def settings_of(options: Sequence[str]) -> dict[str, Any]:
    """All settings that result from command-line options, as plain data without None values.

    Raises:
        argparse.ArgumentError: An unknown or invalid setting.
        ValueError: An unknown configuration.
    """
    cli = _SettingsOnly(list(options), run=False)
    return json.loads(cli.parser.dump(cli.config, format="json"))


def find_configs(args: Sequence[str]) -> list[str]:
    """Replace names of shipped configurations in command-line arguments by their paths."""
    found = list(args)
    for i, arg in enumerate(found):
        option, equals, value = arg.partition("=")
        if option in ("--config", "-c") and equals:
            found[i] = f"{option}={find_config(value)}"
        elif option in ("--config", "-c") and i + 1 < len(found):
            found[i + 1] = find_config(found[i + 1])
    return found


def find_config(name: str) -> str:
    """The path of a configuration: a file, or a shipped one by its name.

    Raises:
        ValueError: There is none.
    """
    if Path(name).is_file():
        text = re.sub("#.*", "", Path(name).read_text(encoding="utf-8", errors="replace"))
        if former := [f"{word}: {remedy}" for word, remedy in FORMER.items() if word in text]:
            raise ValueError(f"{name} has settings of an earlier version; {', '.join(former)}")
        return name
    shipped = {
        p.relative_to(CONFIGS).with_suffix("").as_posix(): p for p in CONFIGS.rglob("*.yaml")
    }
    known = name.removeprefix("configs/").removesuffix(".yaml")
    if known not in shipped:
        raise ValueError(
            f"expected a YAML file or a shipped configuration, found no {name}; shipped are "
            + ", ".join(sorted(shipped))
        )
    return str(shipped[known])


def reason(error: BaseException) -> str:
    """The message of an error in one line."""
    lines = [line.strip().removeprefix("- ") for line in str(error).splitlines()]
    lines = [re.sub(r"^Type .* a callable class: (?=Option )", "", line) for line in lines]
    text = " ".join(line for line in lines if line and not line.startswith(NOISE))
    text = NO_SUBCLASS.sub(_expected_class, text)
    if "NoiseModel is abstract" in text:
        text = (
            "this task has no noise model, so name one before its parameters: --data.noise "
            "GaussianNoise --data.noise.sigma 25"
        )
    if not text or text.endswith(":"):  # there is no other line
        text = " ".join(line for line in lines if line)
    return shorten(text or type(error).__name__, LONGEST)


def _expected_class(found: re.Match[str]) -> str:
    path, base = found.groups()
    known = f"deepred_pl.{BASES[base]}.{base}" if base in BASES else base
    text = f"expected a class derived from {known}, got {path}, which is not"
    other = next(name for name in NAMES if name != NAME)
    if path.startswith(f"{other}."):
        return f"{text}: this run uses {NAME}; name its class, or set DEEPRED_LIGHTNING={other}"
    return f"{text}, or cannot be imported"


class _Parser(LightningArgumentParser):
    """Lists only this package's classes in help, where it has some that fit.

    Any class that fits can still be given by its import path.
    """

    def format_help(self) -> str:
        return re.sub(r"known\s+subclasses:\s+([^)]*)\)", _own_classes, super().format_help())


def _own_classes(found: re.Match[str]) -> str:
    names = re.split(r",\s+", found[1])
    # Where any torch module fits, a network is meant: problems and operators are modules too.
    prefix = "deepred_pl.networks." if "torch.nn.Module" in names else "deepred_pl."
    own = [name for name in names if name.startswith(prefix)]
    if not own or len(own) == len(names):
        return found[0]
    indent = 24 * " "  # argparse's
    listed = fill(", ".join(own), 78, initial_indent=indent, subsequent_indent=indent)
    return f"classes of this package:\n{listed})"


_format_warning = warnings.formatwarning


def _in_one_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: Any = None
) -> str:
    if issubclass(category, RestorationWarning):  # not where in the code it was found
        return f"deepred: warning: {message}\n"
    return _format_warning(message, category, filename, lineno, line)


def report_in_thread(error: threading.ExceptHookArgs) -> None:
    """Ignore a full disk in TensorBoard's thread, because the fit raises and reports it, too."""
    if not issubclass(error.exc_type, OSError):
        threading.__excepthook__(error)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "litlogger" not in record.getMessage()
