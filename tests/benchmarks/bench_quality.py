"""Time to quality: seconds until the average passes a PSNR, ours against the textbook loop."""

import time

from pytorch_lightning import Callback

from deepred_pl import REDUpdate
from deepred_pl.run import RestorationCLI
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
    cli = RestorationCLI([f"--config={name}" for name in ("denoising", *configs)], run=False)
    return cli.model, next(c for c in cli.trainer.callbacks if isinstance(c, REDUpdate))


def test_time_to_quality(benchmark, device):
    """The shipped settings and the textbook loop, on 128×128 pixels."""
    took = {}
    benchmark.pedantic(lambda: took.update(textbook=_textbook(problem(128, device))))
    for configs in ((), ("fast",), ("methods/quick",)):
        (model, update), target = settings(*configs), Target()
        model.build(problem(128, device))
        fit(model.to(device), LONGEST, update, target)
        took[" ".join(("denoising", *configs))] = target.reached, target.seconds, target.steps
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
