"""TensorBoard's log, without which a fit goes on."""

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.loggers.logger import rank_zero_experiment
from pytorch_lightning.utilities.rank_zero import rank_zero_info
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
            self._make_steady(writer.file_writer)
            with suppress(AttributeError):  # of TensorBoard's own: without it, its thread fails
                self._make_steady(writer.file_writer.event_writer._async_writer._writer)
        return writer

    def save(self) -> None:
        self._steady(super().save)()

    def _make_steady(self, writer: object) -> None:
        for name in ("add_event", "write", "flush", "close"):
            if hasattr(writer, name):
                setattr(writer, name, self._steady(getattr(writer, name)))

    def _steady(self, write: Callable[..., None]) -> Callable[..., None]:
        @wraps(write)
        def steady(*args: Any, **kwargs: Any) -> None:
            if self._failed:
                return  # behind a record that is cut off, nothing can be read
            try:
                write(*args, **kwargs)
            except OSError as error:
                self._failed = True
                rank_zero_info(f"no log in {self.log_dir} any more ({why(error)})")

        return steady
