"""Freed memory stays with the process while a fit runs."""

import ctypes
from collections.abc import Callable

from pytorch_lightning import Callback, LightningModule, Trainer

# glibc's malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
NEVER_TRIM = -1
DEFAULT_TRIM_THRESHOLD = 128 * 1024
DEFAULT_MMAP_MAX = 65536


class KeepMemory(Callback):
    """Keeps the memory that a θ-step frees for the next one, on Linux, while a fit runs.

    Every step asks for the same large blocks. glibc gives such blocks back to the kernel at once,
    which clears every page when they are asked for again: on two cores, with the full network at
    256×256, a third of a step's time. At the end of the fit everything goes back. Where malloc is
    not glibc's, and on a GPU, whose memory torch keeps anyway, the callback does nothing.
    """

    def __init__(self) -> None:
        self._keeping = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keeping = pl_module.device.type == "cpu"
        if self._keeping:
            keep_memory()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._keeping:
            self._keeping = False
            give_memory_back()


def keep_memory() -> None:
    """From now on, glibc's malloc keeps what is freed, for the process."""
    _call("mallopt", ctypes.c_int(M_MMAP_MAX), ctypes.c_int(0))  # large blocks from the heap too
    _call("mallopt", ctypes.c_int(M_TRIM_THRESHOLD), ctypes.c_int(NEVER_TRIM))


def give_memory_back() -> None:
    """Give the kernel what is free, now and, by glibc's first thresholds, from now on."""
    _call("mallopt", ctypes.c_int(M_MMAP_MAX), ctypes.c_int(DEFAULT_MMAP_MAX))
    _call("mallopt", ctypes.c_int(M_TRIM_THRESHOLD), ctypes.c_int(DEFAULT_TRIM_THRESHOLD))
    _call("malloc_trim", ctypes.c_size_t(0))


def _call(name: str, *args: object) -> None:
    """Call a function of the C library, where it has it: not on macOS and Windows."""
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return
    function(*args)
