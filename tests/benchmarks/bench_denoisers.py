"""Seconds per call of the denoisers, on the thread they have in a fit: torch on one core."""

from functools import partial

import torch

from deepred_pl.denoisers import NonLocalMeans, TotalVariation, nlm
from tests.benchmarks.conftest import BM3DS, problem

DENOISERS = {
    "nlm": partial(NonLocalMeans, 3, backend="skimage"),
    "nlm, torch": partial(NonLocalMeans, 3, backend="torch"),
    "tv": TotalVariation,
    **BM3DS,
}
if torch.cuda.is_available():
    assert nlm._on_gpu() is not nlm.nl_means, "the Triton kernel does not run here"
    DENOISERS["nlm, triton"] = partial(NonLocalMeans, 3)


def test_denoisers(race, device, side):
    x = problem(side, device).y
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        race({name: partial(_call, denoiser(), x) for name, denoiser in DENOISERS.items()})
    finally:
        torch.set_num_threads(threads)


def _call(denoiser, x):
    denoiser(x)
