"""The process's memory: what it can still take, and what it keeps."""

import ctypes
import math
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

CONTAINER = Path("/sys/fs/cgroup")  # version 2

# glibc's malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
NEVER_TRIM = -1
DEFAULT_TRIM_THRESHOLD = 128 * 1024
DEFAULT_MMAP_MAX = 65536


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take on the device."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return int(min(psutil.virtual_memory().available, _free_in_container()))


def _free_in_container() -> float:
    limit = CONTAINER / "memory.max"
    if not limit.is_file() or limit.read_text().strip() == "max":
        return math.inf
    statistics = dict(line.split() for line in (CONTAINER / "memory.stat").read_text().splitlines())
    cache = int(statistics["inactive_file"])  # of files, given up when it is needed
    taken = int((CONTAINER / "memory.current").read_text()) - cache
    return max(0, int(limit.read_text()) - taken)


def as_text(count: int) -> str:
    """A number of bytes to read, as "1.5 GB"."""
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.0f} MB"


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
