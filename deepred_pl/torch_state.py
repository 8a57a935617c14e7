"""Torch's settings of process and thread, whatever the calling program has set."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_lock = threading.RLock()


class _Float32:
    """Makes float32 the process's default type while any of its threads is in this context."""

    def __init__(self) -> None:
        self._users, self._before = 0, torch.float32

    def __enter__(self) -> None:
        with _lock:
            if self._users == 0:
                self._before = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
            self._users += 1

    def __exit__(self, *error: object) -> None:
        with _lock:
            self._users -= 1
            if self._users == 0:
                torch.set_default_dtype(self._before)


_float32 = _Float32()


@contextmanager
def default_settings() -> Iterator[None]:
    """Gradients on, inference mode and autocast off, and float32 on the CPU as defaults.

    Lightning runs a program's hooks in other settings: inference mode in `predict_step`, autocast
    or another default type in `training_step`.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_float32)
        yield


@contextmanager
def own_random_numbers(
    seed: int | None = None, device: torch.device | None = None
) -> Iterator[None]:
    """Leave the process's random generators as they were, for one thread at a time.

    Args:
        seed: Seed of the CPU's generator in this context; None keeps its state.
        device: A GPU whose generator is kept, too.
    """
    on_gpu = device is not None and device.type == "cuda"
    with _lock, torch.random.fork_rng([device] if on_gpu else []):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def default_factories() -> Iterator[None]:
    """Create and initialise tensors on the CPU, also inside `Trainer.init_module(empty_init=True)`.

    Default devices and empty initialisation are function modes of torch; only this private name,
    checked with torch 2.13, leaves all of them.
    """
    with torch._C.DisableTorchFunction():
        yield
