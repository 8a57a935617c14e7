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
    which clears every page when they are asked for again: at 256×256 with the full network that
    was 40 % of a step on two cores. At the end of the fit everything goes back. Where malloc is
    not glibc's, and on a GPU, whose memory torch keeps anyway, the callback does nothing.
    """

    def __init__(self) -> None:
        self._keeping = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keeping = pl_module.device.type == "cpu"
        if self._keeping:
            _malloc_option(M_MMAP_MAX, 0)  # large blocks from the heap too
            _malloc_option(M_TRIM_THRESHOLD, NEVER_TRIM)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._keeping:
            self._keeping = False
            _malloc_option(M_MMAP_MAX, DEFAULT_MMAP_MAX)
            _malloc_option(M_TRIM_THRESHOLD, DEFAULT_TRIM_THRESHOLD)
            trim = _libc("malloc_trim")
            if trim is not None:
                trim(ctypes.c_size_t(0))


def _malloc_option(option: int, value: int) -> None:
    set_option = _libc("mallopt")
    if set_option is not None:
        set_option(ctypes.c_int(option), ctypes.c_int(value))


def _libc(name: str) -> Callable[..., int] | None:
    """A function of the C library; None where it has none, as on macOS and Windows."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
