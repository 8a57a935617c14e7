"""Time to quality: seconds until the average passes a PSNR, ours against the textbook loop."""

import time
from functools import partial

from deepred_pl import REDUpdate
from deepred_pl.cli import RestorationCLI
from deepred_pl.lightning import Callback
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


def settings(*configs):
    """Module and REDUpdate of shipped configurations."""
    cli = RestorationCLI([f"--config={name}" for name in configs], run=False)
    return cli.model, next(c for c in cli.trainer.callbacks if isinstance(c, REDUpdate))


def test_time_to_quality(race, device):
    """The shipped settings and the textbook loop, on 128×128 pixels, until they pass the target."""
    steps = {}

    def textbook():
        seconds, steps["textbook"] = _textbook(problem(128, device))
        return seconds

    def ours(name):
        (model, update), target = settings(*name.split()), Target()
        model.build(problem(128, device))
        fit(model.to(device), LONGEST, update, target)
        steps[name] = target.steps if target.reached else f"not in {LONGEST}"
        return target.seconds

    names = ("denoising", "denoising fast", "denoising methods/quick")
    rows = race({"textbook": textbook, **{name: partial(ours, name) for name in names}})
    for name, made in steps.items():
        rows[name]["steps"] = made


def _textbook(noisy):
    textbook, seconds = Textbook(noisy.y), 0.0
    for steps in range(EVERY, LONGEST + 1, EVERY):
        start = time.perf_counter()
        for _ in range(EVERY):
            textbook.step()
        synchronize(noisy.y.device)
        seconds += time.perf_counter() - start
        if psnr(textbook.average, noisy.ground_truth) >= TARGET:
            return seconds, steps
    return seconds, f"not in {LONGEST}"
