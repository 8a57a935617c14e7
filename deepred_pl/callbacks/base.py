"""The base class of callbacks that act on one restoration, and helpers that they share."""

from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from deepred_pl.lightning import Callback, LightningModule, Trainer, loggers
from deepred_pl.model import DeepImagePrior
from deepred_pl.trainer import check_end, check_fit


class RestorationCallback(Callback):
    """A callback that acts on one restoration of the trained module.

    The restoration is looked up at every use, because a parent may replace it between two epochs by
    another image's. Subclasses that override one of Lightning's hooks also call this class's.

    Callbacks do not import one another; they query their `siblings`, the others that act on the
    same restoration, through the attributes and methods of this class.

    Args:
        submodule: Dotted name of the restoration inside the trained module; "" is the module.

    Attributes:
        chooses: Whether it sets the restoration's `chosen` image.
        waiting: Whether the fit is waiting for the denoiser; the round has changed nothing yet.
    """

    chooses: ClassVar[bool] = False
    waiting: bool = False
    _trained: LightningModule | None = None  # during a fit
    _current: DeepImagePrior | None = None  # the restoration that it has started with

    def __init__(self, submodule: str = "") -> None:
        self.submodule = submodule

    @property
    def state_key(self) -> str:
        """The key of its state in checkpoints, one for each submodule."""
        return self._generate_state_key(submodule=self.submodule)

    @property
    def model(self) -> DeepImagePrior:
        """The restoration that it acts on, during a fit."""
        assert self._trained is not None
        return self.restoration(self._trained)

    def restoration(self, pl_module: LightningModule) -> DeepImagePrior:
        """Find the restoration that it acts on.

        Raises:
            ValueError: There is none at `submodule`; the message lists those that exist.
        """
        try:
            found = pl_module.get_submodule(self.submodule)
        except AttributeError:
            found = None
        if not isinstance(found, DeepImagePrior):
            children = pl_module.named_modules()
            names = [name for name, child in children if isinstance(child, DeepImagePrior)]
            raise ValueError(
                f"expected a DeepImagePrior or DeepRED at submodule={self.submodule!r} of "
                f"{type(pl_module).__name__}, which has them at {names}; use one of these names"
            )
        return found

    def siblings(self, trainer: Trainer) -> list["RestorationCallback"]:
        """The other callbacks that act on the same restoration."""
        return [c for c in restoration_callbacks(trainer, self.submodule) if c is not self]

    # Lightning's hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning gives these only to the module that is trained.
        child = dict(pl_module.named_modules()).get(self.submodule)
        problem = getattr(trainer.datamodule, "problem", None)
        if isinstance(child, DeepImagePrior) and child is not pl_module:
            child.trainer = trainer
            if child.problem is None and problem is not None:
                child.build(problem)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._trained, self._current = pl_module, None
        self._check_all(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_end(trainer)
        self._follow(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, *batch: Any
    ) -> None:
        self._follow(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trained = self._current = None

    def _follow(self, trainer: Trainer) -> None:
        if self._trained is None or (model := self.model) is self._current:
            return
        if self._current is not None:  # a parent has replaced it: reset all, then start
            for callback in restoration_callbacks(trainer, self.submodule):
                if callback._current is not None:
                    callback.setup(trainer, self._trained, "fit")
                    callback._check_all(trainer)
                    callback._current = None
        self._current = model
        self.start(model, trainer)

    def _check_all(self, trainer: Trainer) -> None:
        self.check_once(self.model, trainer)
        self.check(self.model, trainer)

    def check_once(self, model: DeepImagePrior, trainer: Trainer) -> None:
        """Check what all callbacks of a restoration need; only the first of them does it."""
        if self is restoration_callbacks(trainer, self.submodule)[0]:
            check_fit(model, trainer)

    # What subclasses do

    def start(self, model: DeepImagePrior, trainer: Trainer) -> None:
        """Begin with a restoration: as a fit starts, or resumes, or after a parent replaced it."""

    # What siblings, the writer and the command line ask

    @property
    def group(self) -> str:
        """The name that its curves begin with."""
        return self.submodule or "curves"

    def check(self, model: DeepImagePrior, trainer: Trainer) -> None:
        """Refuse a restoration or trainer that it cannot work with; called before the fit.

        Raises:
            ValueError: It cannot; the message says why.
        """
        others = [type(c).__name__ for c in self.siblings(trainer) if c.chooses]
        if self.chooses and others:
            raise ValueError(
                "expected one callback that chooses the returned image, got "
                f"{type(self).__name__} and {', '.join(others)}; leave one out"
            )

    def summary(self) -> dict[str, Any]:
        """Its contribution to `result.json` and to TensorBoard's HParams, as plain data."""
        return {}

    def curves(self) -> dict[str, float]:
        """Its contribution to the curves that `Monitor` logs."""
        return {}

    def settle(self) -> None:
        """Judge what it has put off; called before a checkpoint is saved."""

    def roll_back(self, state: dict[str, Any]) -> None:
        """Return to `state`, an earlier `state_dict()`, after the restoration was rolled back."""
        self.load_state_dict(state)

    @property
    def period(self) -> int | None:
        """θ-steps between two of its denoisings; None if it makes none."""
        return None

    @property
    def failed(self) -> bool:
        """Whether it will end the fit before the next step."""
        return False

    @property
    def std(self) -> Tensor | None:
        """Standard deviation per value of the image it chooses, (1, C, H, W), if it knows it."""
        return None


def restoration_callbacks(
    trainer: Trainer, submodule: str | None = None
) -> list[RestorationCallback]:
    """The trainer's callbacks that act on the restoration at `submodule`; None: on any."""
    found = [c for c in trainer.callbacks if isinstance(c, RestorationCallback)]
    return [c for c in found if submodule in (None, c.submodule)]


def run_directory(trainer: Trainer) -> Path:
    """The directory of the trainer's run.

    That of its first logger if it has one on this machine, as TensorBoard's and CSV's have, or else
    the next lightning_logs/version_n of the trainer's default root, which is created.
    """
    if isinstance(trainer.logger, loggers.TensorBoardLogger | loggers.CSVLogger):
        return Path(trainer.logger.log_dir)
    if trainer not in _directories:
        _directories[trainer] = _new_version(Path(trainer.default_root_dir) / "lightning_logs")
    return _directories[trainer]


_directories: WeakKeyDictionary[Trainer, Path] = WeakKeyDictionary()


def check_untaken(file: Path) -> None:
    """Raise ValueError if this file of another run is in a run directory."""
    if file.exists():
        raise ValueError(
            f"expected a run directory of its own, but there is a run in {file.parent}; choose "
            "another, or leave the logger's version out"
        )


def _new_version(runs: Path) -> Path:
    """Create the next version_n in a folder of runs."""
    numbers = [path.name.removeprefix("version_") for path in runs.glob("version_*")]
    number = max((int(number) + 1 for number in numbers if number.isdecimal()), default=0)
    while True:
        directory = runs / f"version_{number}"
        try:
            directory.mkdir(parents=True)
        except FileExistsError:  # another process was faster
            number += 1
        except OSError:  # whoever writes into it reports it
            return directory
        else:
            return directory


def tensorboard_writers(trainer: Trainer) -> list[SummaryWriter]:
    """The event files of the trainer's TensorBoard loggers."""
    return [
        logger.experiment
        for logger in trainer.loggers
        if isinstance(logger, loggers.TensorBoardLogger)
    ]


def is_log_step(trainer: Trainer) -> bool:
    """Whether this is one of every `trainer.log_every_n_steps` steps; with 0 none is."""
    every = trainer.log_every_n_steps
    return bool(every) and trainer.global_step % every == 0


def name_of(part: object) -> str:
    """The name of a function, or of an object's class."""
    return getattr(part, "__name__", type(part).__name__)


@torch.no_grad()
def stability(model: DeepImagePrior) -> Tensor:
    """PSNR(out, average) in dB, 0-dim; NaN if these or the network are not finite."""
    assert model.network is not None
    norms = torch._foreach_norm([p.detach() for p in model.network.parameters()])
    distance = (model.out - model.average).square().mean().clamp(min=1e-12)
    return -10 * torch.log10(distance) + 0 * torch.stack(norms).sum()  # 0 · NaN is NaN
