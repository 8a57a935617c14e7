"""Seconds per call of the denoisers, on the thread they have in a fit: torch on one core."""

from functools import partial

import pytest
import torch

from deepred_pl.denoisers import BM3D, NonLocalMeans, TotalVariation
from tests.benchmarks.conftest import problem

DENOISERS = {
    "nlm-torch": partial(NonLocalMeans, 3, backend="torch"),
    "tv": TotalVariation,
    "bm3d-np": partial(BM3D, 5),
    "bm3d-lc": partial(BM3D, 5, "lc"),
    "bm3d-lc-1": partial(BM3D, 5, "lc", threads=1),
}


@pytest.mark.parametrize("denoiser", DENOISERS)
def test_denoiser(race, device, side, denoiser):
    x = problem(side, device).y
    ours, rival = DENOISERS[denoiser](), NonLocalMeans(3, backend="skimage")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        race(lambda: _call(ours, x), lambda: _call(rival, x), names=(denoiser, "nlm-skimage"))
    finally:
        torch.set_num_threads(threads)


def _call(denoiser, x):
    denoiser(x)
