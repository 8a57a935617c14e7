"""What Lightning and RED cost: fits against bare loops, and against fits without RED."""

import logging
import time
import warnings
from functools import partial
from statistics import median

import pytest
import torch

from deepred_pl import DeepRED, REDUpdate
from deepred_pl.callbacks import CollapseGuard, CudaGraph, Monitor
from deepred_pl.denoisers import NonLocalMeans
from deepred_pl.lightning import NAME, Callback, Trainer, loggers
from deepred_pl.networks import SkipNet
from tests.benchmarks.bench_theta_step import PRECISIONS, bare_step
from tests.benchmarks.conftest import BM3DS, deep_image_prior, problem, synchronize

LOG_EVERY = 10  # steps; the command line logs every 50


class Clock(Callback):
    """Seconds between the first step and the last."""

    def on_train_start(self, trainer, model):
        synchronize(model.device)
        self.start = time.perf_counter()

    def on_train_end(self, trainer, model):
        synchronize(model.device)
        self.seconds = time.perf_counter() - self.start


def fit(model, steps, *callbacks, logger=False, precision="32"):
    """Fit, and give the seconds of the steps."""
    warnings.filterwarnings("ignore")
    logging.getLogger(NAME).setLevel(logging.ERROR)
    clock = Clock()
    # REDUpdate waits for its last job at the end of the fit, which is no part of the steps.
    trainer = Trainer(
        max_steps=steps,
        accelerator="gpu" if model.z.is_cuda else "cpu",
        devices=1,
        precision=precision,
        callbacks=[clock, *callbacks],
        logger=logger,
        log_every_n_steps=LOG_EVERY,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model)
    return clock.seconds


@pytest.mark.parametrize("width, steps", [(128, 10), (32, 100)])
def test_lightnings_cost(race, device, side, width, steps, tmp_path):
    """A fit with guard, curves and TensorBoard, against the same module in a loop."""
    step = bare_step(deep_image_prior(problem(side, device), width))

    def bare_loop():
        for _ in range(steps):
            step()

    def our_fit():
        # Of its own, for Lightning brings module and problem to the CPU behind a fit.
        model = deep_image_prior(problem(side, device), width)
        logger = loggers.TensorBoardLogger(tmp_path)
        return fit(model, steps, CollapseGuard(), Monitor(), logger=logger)

    race({"bare loop": bare_loop, "fit": our_fit})


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("width", [128, 32])
def test_the_graphs_gain(race, device, side, width, precision):
    """The fit of DeepRED with NLM whose network is called, and run as a CUDA graph."""
    if device.type != "cuda":
        pytest.skip("only for GPUs")

    def deepred(graph):
        network = partial(SkipNet, width=width)
        model = DeepRED(network=network, graph=graph, problem=problem(side, device)).to(device)
        update = REDUpdate(NonLocalMeans(3), every_n_steps=10)
        return fit(model, 200, CudaGraph(), CollapseGuard(), update, precision=precision)

    race({"called": partial(deepred, False), "graph": partial(deepred, True)})


DENOISERS = {"nlm": partial(NonLocalMeans, 3), **BM3DS}


@pytest.mark.parametrize("k", [10, 20])
def test_reds_cost(race, device, side, k):
    """DeepRED against DIP: two rounds of the full network per denoiser (BM3D's threads named)."""
    waited = {name: [] for name in DENOISERS}

    def deepred(name):
        model = DeepRED(
            network=SkipNet,
            optimizer=partial(torch.optim.Adam, lr=0.008, fused=True),
            problem=problem(side, device),
        ).to(device)
        update = REDUpdate(DENOISERS[name](), every_n_steps=k)
        seconds = fit(model, 2 * k, update)
        waited[name].append(update.wait_seconds)
        return seconds

    def dip():
        return fit(deep_image_prior(problem(side, device), 128), 2 * k)

    rows = race({"DIP": dip, **{name: partial(deepred, name) for name in DENOISERS}})
    for name, seconds in waited.items():
        rows[name]["seconds waited"] = median(seconds)
