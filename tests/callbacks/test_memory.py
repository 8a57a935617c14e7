import platform
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own, where no other test's memory comes and goes.
SCRIPT = """
from contextlib import suppress

import psutil
import torch
from pytorch_lightning import Trainer

from deepred_pl import DeepImagePrior
from deepred_pl.callbacks import KeepMemory, preflight
from tests.helpers import TinyNet, noisy_problem

def resident():
    return psutil.Process().memory_info().rss / 2**20

def freed_block():
    "MB that stay with the process behind a block of 64 MB; of more than glibc keeps by itself."
    before = resident()
    torch.ones(64, 2**18)
    return resident() - before

class Ask(KeepMemory):
    def on_train_start(self, trainer, pl_module):
        print("kept", freed_block())
        self.during = resident()

class Fail(DeepImagePrior):
    def training_step(self, *batch):
        raise RuntimeError("stopped")

def fit(kind):
    ask = Ask()
    trainer = Trainer(max_steps=1, callbacks=[ask], accelerator="cpu", logger=False,
                      enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False)
    with suppress(RuntimeError):
        trainer.fit(kind(network=TinyNet, problem=noisy_problem()))
    print("given", ask.during - resident())

print("kept", freed_block())
# First, while the heap is as it was: later, a gap in it could keep such a block by itself.
preflight.free_memory, free = lambda device: 1, preflight.free_memory
fit(DeepImagePrior)
preflight.free_memory = free
fit(DeepImagePrior)
fit(Fail)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_freed_memory_is_kept_during_a_fit_and_given_back_after_it():
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = run.stdout.splitlines()
    kept = [float(line.split()[1]) for line in lines if line.startswith("kept ")]
    given = [float(line.split()[1]) for line in lines if line.startswith("given ")]
    without, where_little_is_free, during, during_failure = kept
    assert max(without, where_little_is_free) < 5
    assert min(during, during_failure) > 40
    assert len(given) == 3 and min(given[1:]) > 40
