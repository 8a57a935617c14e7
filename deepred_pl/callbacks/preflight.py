"""Before a fit: what time and memory it will take."""

import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepred_pl.memory import as_text, free_memory
from deepred_pl.model import DeepImagePrior

PART = 128  # pixels of a side; the memory of a step is in proportion to the pixels
TRIES = 3  # steps timed, of which the first are slower
LONGEST = 3.0  # seconds; then no further try


class Preflight(Callback):
    """Says before a fit what time and memory it will take, and refuses what cannot fit.

    The memory is measured on a part of the image, of 128×128 pixels, and right to about a tenth;
    the time on a few θ-steps that leave θ where it is. What the denoiser, the operator and a
    regularizer need besides is not in it.

    Raises:
        ValueError: A θ-step needs more memory than is free.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run or not isinstance(pl_module, DeepImagePrior):
            return
        device = pl_module.device
        forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with trainer.precision_plugin.forward_context(), forked:
            needed, free = step_memory(pl_module), free_memory(device)
            if needed > free:
                height, width = pl_module.average.shape[-2:]
                raise ValueError(
                    f"a θ-step on {height}×{width} pixels needs about {as_text(needed)} of memory, "
                    f"and {as_text(free)} are free; restore a part of the image, or take a smaller "
                    "network (--model.network.init_args.width 32)"
                )
            seconds = step_seconds(pl_module)
        steps = trainer.max_steps - (pl_module.step if trainer.ckpt_path else 0)
        told = f"expected: {seconds:.2g} s a θ-step"
        if trainer.max_steps > 0:
            told += f", {_duration(steps * seconds)} for {steps}"
        rank_zero_info(f"{told}; {as_text(needed)} of the {as_text(free)} of memory that are free")


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
        z = z[..., :PART, :PART].contiguous(memory_format=torch.channels_last)
        scale = model.z.numel() / z.numel()
    with LiveBytes() as live:
        _step(model, model.network.forward, z)  # forward alone is never compiled
    return int(scale * live.most) + 3 * parameters


def _step(model: DeepImagePrior, network: Callable[[Tensor], Tensor], z: Tensor) -> None:
    out = network(z).float()
    if z is model.z:
        with torch.autocast(out.device.type, enabled=False):
            loss = model.loss(out)
        if model.regularizer is not None:
            loss = loss + model.regularizer(out, model)
    else:  # a part, which has no measurement
        loss = out.square().mean()
    torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
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
