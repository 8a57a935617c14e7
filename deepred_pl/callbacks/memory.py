"""Freed memory stays with the process while a fit runs."""

from pytorch_lightning import Callback, LightningModule, Trainer

from deepred_pl.callbacks.preflight import fit_memory
from deepred_pl.memory import free_memory, give_memory_back, keep_memory
from deepred_pl.model import DeepImagePrior

KEPT = 2.5  # times a step's memory: what is kept lies in pieces; 1.9 was measured at 1024×1024


class KeepMemory(Callback):
    """Keeps the memory that a θ-step frees for the next one, on Linux, while a fit runs.

    Every step asks for the same large blocks. glibc gives such blocks back to the kernel at once,
    which clears every page when they are asked for again: with the full network at 256×256 on two
    cores, from a twentieth to a third of a step's time, by the machine. At the end of the fit what
    is free goes back, and malloc gets glibc's first thresholds, without their later growth.

    Blocks that are kept take about twice the memory of a step, so it keeps none for a restoration
    of which 2.5 times a step's memory are not free. Where malloc is not glibc's, and on a GPU,
    whose memory torch keeps anyway, the callback does nothing.
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
