"""Measure free memory, and control what the process keeps of it."""

import ctypes
import math
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from rich.filesize import decimal as as_text

CONTAINER = Path("/sys/fs/cgroup")  # version 2

# glibc's malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
NEVER_TRIM = -1
DEFAULT_TRIM_THRESHOLD = 128 * 1024
DEFAULT_MMAP_MAX = 65536


def free_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that this process can still allocate on the device."""
    device = torch.device(device)
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return int(min(psutil.virtual_memory().available, _free_in_container()))


def check_memory(
    needed: int, purpose: str, remedy: str, device: torch.device | str = "cpu"
) -> None:
    """Refuse what needs more memory than is free.

    Raises:
        ValueError: `needed` bytes are not free; the message begins with `purpose`.
    """
    free = free_memory(device)
    if needed > free:
        raise ValueError(
            f"{purpose} needs about {as_text(needed)} of memory, but only {as_text(free)} are "
            f"free; {remedy}"
        )


def _free_in_container() -> float:
    limit = CONTAINER / "memory.max"
    if not limit.is_file() or limit.read_text().strip() == "max":
        return math.inf
    statistics = dict(line.split() for line in (CONTAINER / "memory.stat").read_text().splitlines())
    cache = int(statistics["inactive_file"])  # file cache, which the kernel reclaims when needed
    taken = int((CONTAINER / "memory.current").read_text()) - cache
    return max(0, int(limit.read_text()) - taken)


def keep_memory() -> None:
    """Make glibc's malloc keep freed memory for this process from now on."""
    _call("mallopt", ctypes.c_int(M_MMAP_MAX), ctypes.c_int(0))  # large blocks from the heap too
    _call("mallopt", ctypes.c_int(M_TRIM_THRESHOLD), ctypes.c_int(NEVER_TRIM))


def give_memory_back() -> None:
    """Return free memory to the kernel, now and, with glibc's default thresholds, from now on."""
    _call("mallopt", ctypes.c_int(M_MMAP_MAX), ctypes.c_int(DEFAULT_MMAP_MAX))
    _call("mallopt", ctypes.c_int(M_TRIM_THRESHOLD), ctypes.c_int(DEFAULT_TRIM_THRESHOLD))
    _call("malloc_trim", ctypes.c_size_t(0))


def _call(name: str, *args: object) -> None:
    """Call a function of the C library if it exists; macOS and Windows lack these."""
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return
    function(*args)
