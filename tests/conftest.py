"""What the tests share: small pictures, small networks, a quiet trainer."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from pytorch_lightning import Trainer
from torch import Tensor

from deepred_pl import InverseProblem
from deepred_pl.networks import SkipNet
from deepred_pl.noise import GaussianNoise

# Networks this small are slower on two cores than on one.
torch.set_num_threads(1)

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


def pytest_addoption(parser: pytest.Parser) -> None:
    faults = parser.getgroup("faults", "the fault suite, tests/faults")
    faults.addoption("--long", action="store_true", help="its long form: more of each fault")
    faults.addoption("--seed", type=int, default=0, help="of its random faults")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the fault suite tried and what survived, as its tests recorded it."""
    reports = [r for group in terminalreporter.stats.values() for r in group]
    figures = {f for r in reports for f in getattr(r, "user_properties", ()) if f[0] == "figures"}
    if figures:
        terminalreporter.section("faults")
        for _, text in sorted(figures):
            terminalreporter.write_line(text)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A quiet CPU trainer in a temporary folder."""

    def make(**kwargs) -> Trainer:
        defaults = {
            "accelerator": "cpu",
            "default_root_dir": tmp_path,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "logger": False,
        }
        return Trainer(**{**defaults, **kwargs})

    return make
