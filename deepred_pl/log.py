"""TensorBoard's log, without which a fit goes on."""

from collections.abc import Callable
from functools import wraps
from typing import Any

from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import rank_zero_experiment
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch.utils.tensorboard import SummaryWriter

from deepred_pl.directory import why


class SteadyLogger(TensorBoardLogger):
    """Lightning's TensorBoardLogger, but a log that cannot be written does not end the fit.

    A disk that is full, or gone, costs the curves from then on; that is told once.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._failed = False

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        made = self._experiment is None
        writer = super().experiment
        if made:
            files = writer.file_writer
            for name in ("add_event", "flush", "close"):
                setattr(files, name, self._steady(getattr(files, name)))
        return writer

    def save(self) -> None:
        self._steady(super().save)()

    def _steady(self, write: Callable[..., None]) -> Callable[..., None]:
        @wraps(write)
        def steady(*args: Any, **kwargs: Any) -> None:
            try:
                write(*args, **kwargs)
            except OSError as error:
                if not self._failed:
                    rank_zero_warn(f"no log in {self.log_dir} any more ({why(error)})")
                self._failed = True

        return steady
