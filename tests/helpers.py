"""What several test files use: small pictures and networks, callbacks, comparisons."""

import functools
import json

import numpy as np
import skimage.data
import torch
from torch import Tensor, nn

from deepred_pl import InverseProblem
from deepred_pl.batch import jobs
from deepred_pl.callbacks import LastCheckpoint
from deepred_pl.lightning import Callback
from deepred_pl.networks import SkipNet
from deepred_pl.noise import GaussianNoise

RUN = "lightning_logs/version_0"  # of a trainer's first fit, below its root
TinyNet = functools.partial(SkipNet, width=4, skip_width=2, scales=2)


def picture(channels: int = 3, height: int = 33, width: int = 47) -> Tensor:
    """A corner of a photograph, (1, C, H, W) in [0, 1]."""
    crop = skimage.data.astronaut()[64 : 64 + height, 160 : 160 + width]
    layers = [crop[..., i % 3] for i in range(channels)]
    return torch.from_numpy(np.stack(layers)[None] / 255).float()


def noisy_problem(channels: int = 3, height: int = 9, width: int = 11) -> InverseProblem:
    """A small denoising problem with its ground truth."""
    truth = picture(channels, height, width)
    noise = GaussianNoise(25)
    y = noise.sample(truth, torch.Generator().manual_seed(1)).clamp(0, 1)
    return InverseProblem(y, noise=noise, ground_truth=truth)


def smooth(x: Tensor) -> Tensor:
    """A denoiser that is not idempotent: a horizontal blur that also darkens."""
    return 0.9 * (0.5 * x + 0.25 * x.roll(1, -1) + 0.25 * x.roll(-1, -1))


def assert_same_state(first: nn.Module, second: nn.Module) -> None:
    """Two modules have the same parameters and buffers, bit by bit, and are at the same step."""
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys()
    for name, a in one.items():
        b = other[name]
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, name


def result_of(run):
    """What the run in this directory wrote into result.json."""
    return json.loads((run / "result.json").read_text())


def run_here(fits, workers, threads):
    """`workers.on_this_machine` without its processes, for what is not about them."""
    before = torch.get_num_threads()
    for fit in fits:
        end = None if fit.effort is None else fit.effort.end(workers)
        outcome = fit, jobs.fit(fit, threads, end)
        torch.set_num_threads(before)
        yield outcome
        yield None


class Outs(Callback):
    """Keeps the network's output at every step."""

    def __init__(self):
        self.outs = []

    def on_train_batch_end(self, trainer, model, *args):
        self.outs.append(model.out.double().numpy().copy())


class Cut(Exception):
    """A fit is cut off."""


class Scissors(LastCheckpoint):
    """Cuts the fit off after its first checkpoint, made at step `every_n_steps`."""

    def on_train_batch_end(self, trainer, *args):
        super().on_train_batch_end(trainer, *args)
        if trainer.global_step == self.every_n_steps:
            raise Cut
