"""Options, the report of the fault suite, and a quiet trainer."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# Both of Lightning's names are installed; .ci/run repeats a part with the other.
os.environ.setdefault("DEEPRED_LIGHTNING", "pytorch_lightning")

from deepred_pl.lightning import Trainer

# Networks this small are slower on two cores than on one.
torch.set_num_threads(1)


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


@pytest.fixture(autouse=True)
def few_timed_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where settings are chosen, measure the time of a step by fewer steps."""
    monkeypatch.setattr("deepred_pl.choose.UNTIMED", 1)
    monkeypatch.setattr("deepred_pl.choose.TIMED", 2)


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
