"""Estimate the time and memory of a fit before it starts, and keep its memory between steps."""

import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepred_pl.callbacks.base import RestorationCallback
from deepred_pl.lightning import Callback, LightningModule, Trainer, rank_zero_info
from deepred_pl.memory import as_text, check_memory, free_memory, give_memory_back, keep_memory
from deepred_pl.model import DeepImagePrior, DeepRED
from deepred_pl.torch_state import own_random_numbers

PART = 128  # pixels of a side; the memory of a step is proportional to the pixels
TRIES = 3  # steps timed; the first is slower
LONGEST = 3.0  # seconds of timing, after which no further step is timed
KEPT = 2.5  # times a step's memory: kept memory is fragmented; 1.9 was measured at 1024×1024


class Preflight(RestorationCallback):
    """Reports the expected time and memory of a fit, and refuses what exceeds the free memory.

    It applies to a restoration that is trained directly, not to children of another module. The
    memory is measured on a part of the image of 128×128 pixels, to within about 10 %; the time on a
    few θ-steps that leave θ unchanged, without a CUDA graph. A denoiser slower than its round adds
    to the time; the memory does not include the denoiser, the operator and a regularizer.

    Raises:
        ValueError: A θ-step needs more memory than is free.
    """

    def __init__(self) -> None:
        super().__init__()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass  # a parent may have no restoration under its name

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, DeepImagePrior):
            return
        self.check_once(pl_module, trainer)
        if trainer.fast_dev_run:
            return
        needed = _check_fit(pl_module, trainer)
        if pl_module.compiled:
            rank_zero_info("Compiling the network, which takes a minute or two.")
        with (
            trainer.precision_plugin.forward_context(),
            own_random_numbers(device=pl_module.device),
        ):
            seconds = step_seconds(pl_module)
        steps = trainer.max_steps - (pl_module.step if trainer.ckpt_path else 0)
        text = f"Expected: {seconds:.2g} s per θ-step"
        if trainer.max_steps > 0:
            text += f", {_duration(steps * seconds)} for {steps}"
        if isinstance(pl_module, DeepRED):
            text += ", plus any time spent waiting for the denoiser"
        free = as_text(free_memory(pl_module.device))
        rank_zero_info(f"{text}; {as_text(needed)} of memory ({free} free).")

    def check(self, model: DeepImagePrior, trainer: Trainer) -> None:
        # Before a fit on a GPU the module is not there yet.
        if not trainer.fast_dev_run and model.device.type == trainer.strategy.root_device.type:
            _check_fit(model, trainer)


class KeepMemory(Callback):
    """Keeps the memory that a θ-step frees for the next step, on Linux, while a fit runs.

    Every step allocates the same large blocks. glibc returns such blocks to the kernel at once,
    which clears every page when they are allocated again: with the full network at 256×256 on two
    cores, this takes from a twentieth to a third of a step's time, depending on the machine. At the
    end of the fit free memory is returned, and malloc gets glibc's initial thresholds.

    Kept blocks take about twice the memory of a step, so nothing is kept for a restoration if
    less than 2.5 times a step's memory is free. If malloc is not glibc's, and on a GPU, whose
    memory torch keeps anyway, the callback does nothing.
    """

    def __init__(self) -> None:
        self._keeping = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keeping = pl_module.device.type == "cpu"
        if self._keeping and isinstance(pl_module, DeepImagePrior):
            self._keeping = KEPT * fit_memory(pl_module, trainer) < free_memory(pl_module.device)
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


def _check_fit(model: DeepImagePrior, trainer: Trainer) -> int:
    """Return the bytes that a θ-step needs; raise if they are not free."""
    needed = fit_memory(model, trainer)
    height, width = model.average.shape[-2:]
    check_memory(
        needed,
        f"a θ-step on {height}×{width} pixels",
        "restore a part of the image, or use a smaller network (model.network.width)",
        model.device,
    )
    return needed


def fit_memory(model: DeepImagePrior, trainer: Trainer) -> int:
    """Bytes that a θ-step needs at the trainer's precision."""
    with trainer.precision_plugin.forward_context(), own_random_numbers(device=model.device):
        return step_memory(model)


def step_seconds(model: DeepImagePrior) -> float:
    """Seconds of one θ-step without the optimizer; θ is unchanged."""
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
    """Bytes that a θ-step needs, with gradients and Adam's moments.

    Networks whose z has the image's size are run on a part of it; others have a small z.
    """
    assert model.network is not None
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    z, scale = model.z, 1.0
    if z.shape[-2:] == model.average.shape[-2:]:
        side = max(PART, getattr(model.network, "smallest_side", 1))
        z = z[..., :side, :side].contiguous(memory_format=torch.channels_last)
        scale = model.z.numel() / z.numel()
    step = partial(_step, model, model.network.forward, z)  # forward itself is not compiled
    return int(scale * _most_allocated(step, z.device)) + 3 * parameters


def _most_allocated(step: Callable[[], None], device: torch.device) -> int:
    """Bytes that a step allocates at most."""
    if device.type != "cuda":
        with LiveBytes() as live:
            step()
        return live.most
    # With what operations allocate within themselves, such as cuDNN's workspaces.
    step()  # the first also tries algorithms, and allocates what is kept for all
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    return torch.cuda.max_memory_allocated(device) - before


def _step(model: DeepImagePrior, network: Callable[[Tensor], Tensor], z: Tensor) -> None:
    out = network(z).float()
    if z is model.z and out.shape == model.average.shape:
        loss = model.total_loss(out)
    else:  # a part, which has no measurement, or a shape that the first step refuses
        loss = out.square().mean()
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(loss, trained, allow_unused=True)
    if out.is_cuda:
        torch.cuda.synchronize(out.device)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors created in its context; `most` is the maximum."""

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
