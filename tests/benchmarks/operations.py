"""Operations that a θ-step dispatches, and the bytes they read and write, as on a GPU.

    python tests/benchmarks/operations.py --side 512

counts ten steps of DeepRED with the guard and the x- and u-updates, in bfloat16, on the CPU but by
a GPU's convolutions, padding and upsampling: there every operation is at least one kernel. Not
counted are views, the denoiser, and what operations do within themselves, such as changes of memory
layout; a GPU's autocast gives some operations float32 that have bfloat16 here.
"""

import argparse
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deepred_pl import DeepRED, InverseProblem, REDUpdate, fast_conv, resize
from deepred_pl.callbacks import CollapseGuard
from deepred_pl.lightning import Callback, Trainer
from deepred_pl.networks import SkipNet
from deepred_pl.noise import GaussianNoise

FIRST, STEPS = 60, 10


class Count(TorchDispatchMode):
    """Counts operations, except views, and the bytes of their inputs and outputs."""

    def __init__(self):
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given, made = tensors((args, kwargs)), tensors(result)
        storages = {t.untyped_storage().data_ptr() for t in given}
        writes = func._schema.is_mutable
        new = [t for t in made if t.untyped_storage().data_ptr() not in storages]
        if (writes or new) and "empty" not in str(func):
            self.operations += 1
            self.bytes += sum(t.numel() * t.element_size() for t in [*given, *new])
        return result


def tensors(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


class During(Callback):
    """Counts from one step to another."""

    def __init__(self):
        self.count = Count()

    def on_train_batch_start(self, trainer, model, *batch):
        if trainer.global_step == FIRST:
            self.count.__enter__()
        if trainer.global_step == FIRST + STEPS:
            self.count.__exit__(None, None, None)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--width", type=int, default=128)
    arguments = parser.parse_args()
    fast_conv.pays_off = resize._on_cpu = lambda x: False
    y = torch.rand(1, 3, arguments.side, arguments.side)
    model = DeepRED(
        network=partial(SkipNet, width=arguments.width),
        problem=InverseProblem(y, noise=GaussianNoise(25)),
    )
    during = During()
    Trainer(
        max_steps=FIRST + STEPS + 1,
        accelerator="cpu",
        precision="bf16-mixed",
        callbacks=[during, CollapseGuard(), REDUpdate(torch.clone, every_n_steps=10)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model)
    print(f"{during.count.operations / STEPS:.0f} operations per step")
    print(f"{during.count.bytes / STEPS / 1e9:.2f} GB per step")


if __name__ == "__main__":
    main()
