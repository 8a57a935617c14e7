"""Lightning callbacks: the RED update, the monitor, and what a run leaves behind."""

from deepred_pl.callbacks.checkpoint import LastCheckpoint
from deepred_pl.callbacks.monitor import Monitor, RestorationBar
from deepred_pl.callbacks.red import REDUpdate
from deepred_pl.callbacks.writer import Writer

__all__ = ["LastCheckpoint", "Monitor", "REDUpdate", "RestorationBar", "Writer"]
