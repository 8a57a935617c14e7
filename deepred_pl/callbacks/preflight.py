"""Before a fit: what time and memory it will take."""

import time
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepred_pl.memory import as_text, free_memory
from deepred_pl.model import DeepImagePrior, DeepRED

PART = 128  # pixels of a side; the memory of a step is in proportion to the pixels
TRIES = 3  # steps timed, of which the first are slower
LONGEST = 3.0  # seconds; then no further try


class Preflight(Callback):
    """Says before a fit what time and memory it will take, and refuses what cannot fit.

    The memory is measured on a part of the image, of 128×128 pixels, to within about 10 %; the
    time on a few θ-steps that leave θ where it is. A denoiser slower than its round adds to the
    time; what it, the operator and a regularizer need is not in the memory.

    Raises:
        ValueError: A θ-step needs more memory than is free.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run or not isinstance(pl_module, DeepImagePrior):
            return
        needed, free = self._memory(pl_module, trainer)
        if pl_module.compiled:
            rank_zero_info("compiling the network: a minute or two")
        with trainer.precision_plugin.forward_context(), _forked(pl_module.device):
            seconds = step_seconds(pl_module)
        steps = trainer.max_steps - (pl_module.step if trainer.ckpt_path else 0)
        told = f"expected: {seconds:.2g} s a θ-step"
        if trainer.max_steps > 0:
            told += f", {_duration(steps * seconds)} for {steps}"
        if isinstance(pl_module, DeepRED):
            told += ", and what a slow denoiser adds"
        rank_zero_info(f"{told}; {as_text(needed)} of the {as_text(free)} of memory that are free")

    def check(self, model: DeepImagePrior, trainer: Trainer) -> None:
        """Refuse what cannot fit; called before the fit, where the module is on its device already.

        Raises:
            ValueError: A θ-step needs more memory than is free.
        """
        if not trainer.fast_dev_run and model.device.type == trainer.strategy.root_device.type:
            self._memory(model, trainer)

    def _memory(self, model: DeepImagePrior, trainer: Trainer) -> tuple[int, int]:
        """Bytes that a θ-step takes and that are free."""
        needed, free = fit_memory(model, trainer), free_memory(model.device)
        if needed > free:
            height, width = model.average.shape[-2:]
            raise ValueError(
                f"a θ-step on {height}×{width} pixels needs about {as_text(needed)} of memory, "
                f"and {as_text(free)} are free; restore a part of the image, or take a smaller "
                "network (fewer channels: --model.network.init_args.width)"
            )
        return needed, free


def fit_memory(model: DeepImagePrior, trainer: Trainer) -> int:
    """Bytes that a θ-step takes at the trainer's precision."""
    with trainer.precision_plugin.forward_context(), _forked(model.device):
        return step_memory(model)


def _forked(device: torch.device) -> AbstractContextManager:
    """Within, random numbers are drawn that nobody misses afterwards."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def step_seconds(model: DeepImagePrior) -> float:
    """Seconds of one θ-step without the optimizer; θ stays where it is."""
    assert model.network is not None
    if model.compiled:
        _step(model, model.network, model.z)
    start = time.perf_counter()
    times: list[float] = []
    while len(times) < TRIES and time.perf_counter() - start < LONGEST:
        before = time.perf_counter()
        _step(model, model.network, model.z)
        times.append(time.perf_counter() - before)
    return min(times)


def step_memory(model: DeepImagePrior) -> int:
    """Bytes that a θ-step takes, with its gradients and the moments of Adam.

    Networks whose z has the image's size run on a part of it; others have small ones.
    """
    assert model.network is not None
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    z, scale = model.z, 1.0
    if z.shape[-2:] == model.average.shape[-2:]:
        side = max(PART, getattr(model.network, "smallest_side", 1))
        z = z[..., :side, :side].contiguous(memory_format=torch.channels_last)
        scale = model.z.numel() / z.numel()
    with LiveBytes() as live:
        _step(model, model.network.forward, z)  # forward alone is never compiled
    return int(scale * live.most) + 3 * parameters


def _step(model: DeepImagePrior, network: Callable[[Tensor], Tensor], z: Tensor) -> None:
    out = network(z).float()
    if z is model.z and out.shape == model.average.shape:
        with torch.autocast(out.device.type, enabled=False):
            loss = model.loss(out)
        if model.regularizer is not None:
            loss = loss + model.regularizer(out, model)
    else:  # a part, which has no measurement, or what the first step will refuse
        loss = out.square().mean()
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(loss, trained, allow_unused=True)
    if out.is_cuda:
        torch.cuda.synchronize(out.device)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within; `most` is the largest count."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if _is_plain(t)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if _is_plain(tensor) and _storage(tensor) not in given | self._known:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        self._known.add(storage._cdata)
        self._now += storage.nbytes()
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes > 9 else f"{60 * minutes + seconds} s"
