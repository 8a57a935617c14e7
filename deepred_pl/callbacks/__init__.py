"""Lightning callbacks: updates, watchers, and what a run leaves behind."""

from deepred_pl.callbacks.checkpoint import LastCheckpoint
from deepred_pl.callbacks.guard import CollapseGuard
from deepred_pl.callbacks.langevin import Langevin
from deepred_pl.callbacks.memory import KeepMemory
from deepred_pl.callbacks.monitor import Monitor, RestorationBar
from deepred_pl.callbacks.panels import Panels
from deepred_pl.callbacks.preflight import Preflight
from deepred_pl.callbacks.red import REDUpdate
from deepred_pl.callbacks.stopping import AutoStop
from deepred_pl.callbacks.writer import Writer

__all__ = [
    "AutoStop",
    "CollapseGuard",
    "KeepMemory",
    "Langevin",
    "LastCheckpoint",
    "Monitor",
    "Panels",
    "Preflight",
    "REDUpdate",
    "RestorationBar",
    "Writer",
]
