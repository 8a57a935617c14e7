import platform
import resource

import pytest
import torch

from deepred_pl import DeepImagePrior
from deepred_pl.callbacks import KeepMemory
from tests.conftest import TinyNet, noisy_problem

BLOCK = 64 * 2**20  # bytes; larger than what glibc ever keeps by itself


def page_faults() -> int:
    """Pages the kernel clears for one block that is asked for again and again."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(BLOCK // 4)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc is not glibc's")
def test_freed_memory_is_kept_during_a_fit_and_given_back_behind_it(make_trainer):
    model = DeepImagePrior(network=TinyNet, problem=noisy_problem())
    faults = {"before": page_faults()}

    class Ask(KeepMemory):
        def on_train_start(self, trainer, pl_module):
            page_faults()  # at first it comes from the kernel
            faults["during"] = page_faults()

    make_trainer(max_steps=1, callbacks=[Ask()]).fit(model)
    faults["after"] = page_faults()
    assert faults["during"] < 0.1 * faults["before"]
    assert faults["after"] > 0.9 * faults["before"]
