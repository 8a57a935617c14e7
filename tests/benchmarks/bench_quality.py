"""Time to quality: seconds until the average passes a PSNR, ours against the textbook loop."""

import time
from functools import partial

import torch
from pytorch_lightning import Callback

from deepred_pl import DeepRED, REDUpdate
from deepred_pl.denoisers import NonLocalMeans
from deepred_pl.model import WarmupCosine
from deepred_pl.networks import SkipNet
from tests.benchmarks.bench_trainer import fit
from tests.benchmarks.conftest import problem, psnr, synchronize
from tests.benchmarks.textbook import Textbook

TARGET = 26.5  # dB
EVERY = 10  # steps between two looks
LONGEST = 1000  # steps


class Target(Callback):
    """Ends the fit when the average passes the target; its looks are no part of the time."""

    def on_train_start(self, trainer, model):
        self.seconds, self.start = 0.0, time.perf_counter()

    def on_train_batch_end(self, trainer, model, *args):
        if model.step % EVERY == 0:
            synchronize(model.device)
            self.seconds += time.perf_counter() - self.start
            self.reached = psnr(model.average, model.problem.ground_truth) >= TARGET
            trainer.should_stop = self.reached
            self.steps = model.step
            self.start = time.perf_counter()


def quick(noisy):
    """DeepRED as methods/quick sets it."""
    return DeepRED(
        network=partial(SkipNet, width=32),
        optimizer=partial(torch.optim.Adam, lr=0.02, fused=True),
        lr_scheduler=partial(WarmupCosine, total_steps=600, warmup_steps=30),
        input_scale=1.0,
        weighting="discrepancy",
        problem=noisy,
    )


def released(noisy):
    """DeepRED with the released settings."""
    return DeepRED(
        network=SkipNet,
        optimizer=partial(torch.optim.Adam, lr=0.008, fused=True),
        weighting="discrepancy",
        problem=noisy,
    )


def test_time_to_quality(benchmark, device):
    """Two ways of ours, and the textbook loop; all on 128×128 pixels."""
    noisy = problem(128, device)
    took = {"textbook": _textbook(noisy)}
    for name, settings in {"ours, released": released, "ours, quick": quick}.items():
        model, target = settings(noisy).to(device), Target()
        update = REDUpdate(NonLocalMeans(3), every_n_steps=10)
        if settings is quick:
            benchmark.pedantic(lambda *fitted: fit(*fitted), (model, LONGEST, update, target))
        else:
            fit(model, LONGEST, update, target)
        took[name] = target.reached, target.seconds, target.steps
    for name, (reached, seconds, steps) in took.items():
        benchmark.extra_info[name] = {
            f"{TARGET} dB" if reached else f"not {TARGET} dB": f"{seconds:.1f} s, {steps} steps",
            "ratio": f"{seconds / took['textbook'][1]:.2f}",
        }


def _textbook(noisy):
    textbook, seconds, steps = Textbook(noisy.y), 0.0, 0
    reached = False
    while not reached and steps < LONGEST:
        start = time.perf_counter()
        for _ in range(EVERY):
            textbook.step()
        synchronize(noisy.y.device)
        seconds, steps = seconds + time.perf_counter() - start, steps + EVERY
        reached = psnr(textbook.average, noisy.ground_truth) >= TARGET
    return reached, seconds, steps
