"""The base class of callbacks that act on one restoration, and helpers that they share."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from deepred_pl.model import DeepImagePrior


class RestorationCallback(Callback):
    """A callback that acts on one restoration of the trained module.

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
    _model: DeepImagePrior | None = None

    def __init__(self, submodule: str = "") -> None:
        self.submodule = submodule

    @property
    def state_key(self) -> str:
        """The key of its state in checkpoints, one for each submodule."""
        return self._generate_state_key(submodule=self.submodule)

    @property
    def model(self) -> DeepImagePrior:
        """The restoration that it acts on, during a fit."""
        assert self._model is not None
        return self._model

    def restoration(self, pl_module: LightningModule) -> DeepImagePrior:
        """Find the restoration that it acts on.

        Raises:
            ValueError: There is none at `submodule`; the message lists those that exist.
        """
        children = dict(pl_module.named_modules())
        found = children.get(self.submodule)
        if not isinstance(found, DeepImagePrior):
            names = [name for name, child in children.items() if isinstance(child, DeepImagePrior)]
            raise ValueError(
                f"expected a DeepImagePrior or DeepRED at submodule={self.submodule!r} of "
                f"{type(pl_module).__name__}, which has them at {names}; use one of these names"
            )
        return found

    def siblings(self, trainer: Trainer) -> list["RestorationCallback"]:
        """The other callbacks that act on the same restoration."""
        return [c for c in restoration_callbacks(trainer, self.submodule) if c is not self]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._model = self.restoration(pl_module)
        self.check(self._model, trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._model = None

    # What siblings, the writer and the command line ask

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
    """The directory of the trainer's run: its logger's, or its default root."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def tensorboard_writers(trainer: Trainer) -> list[SummaryWriter]:
    """The event files of the trainer's TensorBoard loggers."""
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    return [logger.experiment for logger in loggers]


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
