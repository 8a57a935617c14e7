import platform
from contextlib import suppress

import psutil
import pytest
import torch

from deepred_pl import DeepImagePrior
from deepred_pl.callbacks import KeepMemory, preflight
from deepred_pl.lightning import Trainer
from tests.faults import processes
from tests.helpers import TinyNet, noisy_problem


def resident():
    return psutil.Process().memory_info().rss / 2**20


def freed_block():
    """MB that stay with the process after a block of 64 MB; of more than glibc keeps by itself."""
    before = resident()
    torch.ones(64, 2**18)
    return resident() - before


class Failing(DeepImagePrior):
    def training_step(self, *batch):
        raise RuntimeError("stopped")


def fit_some(connection):
    """In a process of its own, where no other test's memory comes and goes."""
    torch.set_num_threads(1)

    class Ask(KeepMemory):
        def on_train_start(self, trainer, pl_module):
            connection.send(("kept", freed_block()))
            self.during = resident()

    def fit(kind):
        ask = Ask()
        unused = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        quiet = dict.fromkeys(unused, False)
        trainer = Trainer(max_steps=1, callbacks=[ask], accelerator="cpu", **quiet)
        with suppress(RuntimeError):
            trainer.fit(kind(network=TinyNet, problem=noisy_problem()))
        connection.send(("given", ask.during - resident()))

    freed_block()  # with what torch makes once
    connection.send(("kept", freed_block()))
    # First, while the heap is as it was: later, a gap in it could keep such a block by itself.
    preflight.free_memory, free = lambda device: 1, preflight.free_memory
    fit(DeepImagePrior)
    preflight.free_memory = free
    fit(DeepImagePrior)
    fit(Failing)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_freed_memory_is_kept_during_a_fit_and_given_back_after_it():
    *told, end = processes.told_by(fit_some, seconds=60)
    assert end == ("ended", 0)
    kept, given = ([megabytes for what, megabytes in told if what == w] for w in ("kept", "given"))
    without, where_little_is_free, during, during_failure = kept
    assert max(without, where_little_is_free) < 5
    assert min(during, during_failure) > 40
    assert len(given) == 3 and min(given[1:]) > 40
