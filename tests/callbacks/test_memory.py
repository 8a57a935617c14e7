import platform
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own: what other tests left on the heap may serve the blocks asked for here.
SCRIPT = """
import resource, torch
from contextlib import suppress
from pytorch_lightning import Trainer
from deepred_pl import DeepImagePrior
from deepred_pl.callbacks import KeepMemory
from tests.conftest import TinyNet, noisy_problem

BLOCK = 64 * 2**20  # bytes; larger than what glibc ever keeps by itself

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(BLOCK // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

class Ask(KeepMemory):
    def on_train_start(self, trainer, pl_module):
        # At first the blocks come from the kernel, until the heap has room for them.
        print("faults", min(page_faults() for _ in range(5)))

class Fail(DeepImagePrior):
    def training_step(self, *batch):
        raise RuntimeError("stopped")

def fit(kind):
    Trainer(max_steps=1, callbacks=[Ask()], accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False).fit(
                kind(network=TinyNet, problem=noisy_problem()))

print("faults", page_faults())
fit(DeepImagePrior)
print("faults", page_faults())
with suppress(RuntimeError):
    fit(Fail)
print("faults", page_faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_freed_memory_is_kept_during_a_fit_and_given_back_behind_it():
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    told = [line.split()[1] for line in run.stdout.splitlines() if line.startswith("faults")]
    before, during, after, during_failure, after_failure = map(int, told)
    assert max(during, during_failure) < 0.1 * before
    assert min(after, after_failure) > 0.9 * before
