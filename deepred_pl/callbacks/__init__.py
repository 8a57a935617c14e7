"""Lightning callbacks: the RED updates, monitoring, and the results of a run."""

from deepred_pl.callbacks.bar import RestorationBar
from deepred_pl.callbacks.base import RestorationCallback
from deepred_pl.callbacks.checkpoint import LastCheckpoint
from deepred_pl.callbacks.graph import CudaGraph
from deepred_pl.callbacks.guard import CollapseGuard
from deepred_pl.callbacks.kernel import KernelUpdate
from deepred_pl.callbacks.langevin import Langevin
from deepred_pl.callbacks.monitor import Monitor
from deepred_pl.callbacks.panels import Panels
from deepred_pl.callbacks.preflight import KeepMemory, Preflight
from deepred_pl.callbacks.red import REDUpdate
from deepred_pl.callbacks.stopping import AutoStop
from deepred_pl.callbacks.writer import Writer

__all__ = [
    "AutoStop",
    "CollapseGuard",
    "CudaGraph",
    "KeepMemory",
    "KernelUpdate",
    "Langevin",
    "LastCheckpoint",
    "Monitor",
    "Panels",
    "Preflight",
    "REDUpdate",
    "RestorationBar",
    "RestorationCallback",
    "Writer",
]
