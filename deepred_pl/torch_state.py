"""Torch's settings of process and thread, whatever the calling program has set."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_lock = threading.RLock()


@contextmanager
def default_settings() -> Iterator[None]:
    """Gradients on, inference mode and autocast off, and float32 on the CPU as defaults.

    Lightning runs a program's hooks in other settings: inference mode in `predict_step`, autocast
    or another default type in `training_step`.
    """
    dtype = torch.get_default_dtype()  # of the process, so that it is only touched if need be
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
            stack.enter_context(torch.autocast(device, enabled=False))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
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

    Default devices and empty initialisation are function modes of torch, which has no other way to
    leave them.
    """
    with torch._C.DisableTorchFunction():
        yield
