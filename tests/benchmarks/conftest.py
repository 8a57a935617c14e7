"""What the benchmarks share: races of contenders within one run, and their table.

Each benchmark runs its contenders in turn, round by round, so that whatever else the machine does
meets all; the figures are medians, a ratio's spread is its smallest and largest round.
"""

import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from torch import Tensor

from deepred_pl import DeepImagePrior, InverseProblem
from deepred_pl.denoisers import BM3D
from deepred_pl.memory import keep_memory
from deepred_pl.networks import SkipNet
from deepred_pl.noise import GaussianNoise

BM3DS = {
    "bm3d, lc, 1": partial(BM3D, 5, "lc", threads=1, backend="bm3d"),
    "bm3d, lc, all": partial(BM3D, 5, "lc", backend="bm3d"),
    "bm3d, np, 1": partial(BM3D, 5, "np", threads=1, backend="bm3d"),
    "bm3d, np, all": partial(BM3D, 5, "np", backend="bm3d"),
}
if torch.cuda.is_available() and find_spec("bm3d_triton"):
    BM3DS["bm3d, triton"] = partial(BM3D, 5, backend="triton")

Contender = Callable[[], float | None]  # its own seconds, or None to be timed


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("deepred benchmarks")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--threads", type=int, default=os.cpu_count(), help="torch's threads")
    group.addoption("--sizes", type=int, nargs="+", default=[128, 256], help="sides of images")
    group.addoption("--rounds", type=int, default=3, help="rounds of each race")
    group.addoption("--quality-steps", type=int, default=60, help="θ-steps before the PSNR column")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "side" in metafunc.fixturenames:
        metafunc.parametrize("side", metafunc.config.getoption("sizes"))


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # the table below says it better
    torch.set_num_threads(config.getoption("threads"))
    keep_memory()  # for both contenders of every race; `test_keeping_memory` tells its worth


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    session = getattr(terminalreporter.config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    terminalreporter.section(f"{machine()}: medians, and ratios to the first (smallest–largest)")
    for benchmark in session.benchmarks:
        terminalreporter.write_line(benchmark.name.removeprefix("test_"))
        for name, row in benchmark.extra_info.items():
            terminalreporter.write_line(f"    {name:<14} {'  '.join(_told(row))}")


def _told(row: dict) -> Iterator[str]:
    """A row of the table; the JSON has the numbers."""
    for key, value in row.items():
        if key == "seconds":
            yield f"{value * 1e3:.1f} ms"
        elif key == "ratio":
            median_, least, most = value
            yield f"{median_:.2f} ({least:.2f}–{most:.2f})"
        else:
            yield f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}"


def machine() -> str:
    cpu = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name()}, {cpu}" if torch.cuda.is_available() else cpu


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("device"))


@pytest.fixture
def rounds(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("rounds")


@pytest.fixture
def quality_steps(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("quality_steps")


@pytest.fixture
def race(benchmark, rounds: int, device: torch.device) -> Callable[..., dict]:
    """race({name: contender}): one row of the table for each; the ratios are to the first."""

    def run(contenders: dict[str, Contender]) -> dict[str, dict[str, Any]]:
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        first, *others = [partial(_timed, f, device, seconds[n]) for n, f in contenders.items()]
        for contender in (first, *others):  # warm-up
            contender()
        for times in seconds.values():
            times.clear()
        benchmark.pedantic(first, setup=lambda: [o() for o in others] and None, rounds=rounds)
        rows = benchmark.extra_info
        against = next(iter(seconds.values()))
        for name, times in seconds.items():
            rows[name] = {"seconds": median(times)}
            if times is not against:
                ratios = [t / a for t, a in zip(times, against, strict=True)]
                rows[name]["ratio"] = median(ratios), min(ratios), max(ratios)
        return rows

    return run


def _timed(contender: Contender, device: torch.device, into: list[float]) -> None:
    synchronize(device)
    start = time.perf_counter()
    own = contender()
    synchronize(device)
    into.append(time.perf_counter() - start if own is None else own)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def problem(side: int, device: torch.device, sigma: float = 25) -> InverseProblem:
    """A noisy crop of a photograph, side × side."""
    photo = skimage.data.astronaut()[:side, 128 : 128 + side]
    truth = torch.from_numpy(np.moveaxis(photo, -1, 0)[None] / 255).float()
    noise = GaussianNoise(sigma)
    y = noise.sample(truth, torch.Generator().manual_seed(0)).clamp(0, 1)
    return InverseProblem(y, noise=noise, ground_truth=truth).to(device)


def deep_image_prior(problem: InverseProblem, width: int, **settings) -> DeepImagePrior:
    """Ours, with the settings of the textbook."""
    return DeepImagePrior(
        network=partial(SkipNet, width=width),
        optimizer=partial(torch.optim.Adam, lr=0.008, fused=True),
        problem=problem,
        **settings,
    ).to(problem.y.device)


def psnr(image: Tensor, truth: Tensor) -> float:
    return -10 * float(torch.log10((image.clamp(0, 1) - truth).square().mean()))
