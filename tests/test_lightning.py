"""The package follows the one of Lightning's two names that a program uses."""

import linecache
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from deepred_pl import lightning
from deepred_pl.lightning import NAME, NAMES, _name, _named


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("how", ["import {0} as pl", "from {0} import Trainer", "  import {0}.x"])
@pytest.mark.parametrize("depth", [1, 3])
def test_the_name_that_is_imported_next_is_found(name, how, depth):
    """Sorted imports put this package before Lightning, in any file up to the program's."""
    calls = "def call(n):\n    return next_name() if n == 1 else call(n - 1)\n"
    other = "import lightning_utilities\nimport this.lightning\n# import lightning\n"
    other += "from lightning.fabric import Fabric\n"
    source = f"{other}{calls}\n{how.format(name)}"
    linecache.cache["program"] = (len(source), None, source.splitlines(keepends=True), "program")
    names = {"next_name": lambda: _named(sys._getframe(1)), "__name__": "program"}
    exec(compile(calls, "program", "exec"), names)
    assert names["call"](depth) == name


def test_what_is_imported_already_is_followed_and_a_variable_decides_otherwise(monkeypatch):
    monkeypatch.delenv("DEEPRED_LIGHTNING", raising=False)
    assert _name() == NAME
    monkeypatch.setenv("DEEPRED_LIGHTNING", "lightning.pytorch")
    assert _name() == "lightning.pytorch"
    monkeypatch.setenv("DEEPRED_LIGHTNING", "lightning")
    with pytest.raises(
        ImportError, match=r"pytorch_lightning, lightning\.pytorch, got 'lightning'"
    ):
        _name()


def test_a_whole_program_with_the_other_name(tmp_path):
    """A sorted program with a root, a child, callbacks, a datamodule and a logger."""
    pytest.importorskip("lightning.pytorch")
    program = """
import torch
from deepred_pl import DeepRED, InverseProblem, REDUpdate
from deepred_pl.callbacks import Monitor, Panels, Writer
from deepred_pl.networks import DeepDecoder
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

def made():
    problem = InverseProblem(torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(0)))
    return DeepRED(network=lambda channels: DeepDecoder(channels, 4, 2), problem=problem)

class Parent(LightningModule):
    def __init__(self):
        super().__init__()
        self.child = made()
    def training_step(self, batch, batch_idx):
        return self.child.training_step(batch, batch_idx)
    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())
    def train_dataloader(self):
        return self.child.train_dataloader()

for model, name in (made(), ""), (Parent(), "child"):
    logger = TensorBoardLogger(".", name or "root", default_hp_metric=False)
    parts = [REDUpdate(lambda x: x.roll(1, -1), every_n_steps=2, submodule=name), Writer()]
    parts += [Monitor(name), Panels(submodule=name)]
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_steps=4, callbacks=parts, log_every_n_steps=2, logger=logger, **quiet)
    trainer.fit(model)
    tags = EventAccumulator(logger.log_dir).Reload().Tags()
    print(len(tags["scalars"]) > 5, len(tags["images"]))

from deepred_pl.cli import main
main(["fit", "--config", "denoising", "--trainer.logger=pytorch_lightning.loggers.CSVLogger"])
"""
    (tmp_path / "program.py").write_text(program)
    env = {name: value for name, value in os.environ.items() if name != "DEEPRED_LIGHTNING"}
    command = [sys.executable, "-W", "ignore", "program.py"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "5", "True", "5"], done.stderr
    assert done.stderr.splitlines()[-1].endswith(
        "got pytorch_lightning.loggers.CSVLogger, which is not: this run uses lightning.pytorch; "
        "name its class, or set DEEPRED_LIGHTNING=pytorch_lightning"
    )


def test_an_alternative_that_is_not_installed_is_passed_over(monkeypatch):
    lines = ["try:\n", "    import lightning.pytorch\n", "except ImportError:\n"]
    lines.append("    import pytorch_lightning\n")
    linecache.cache["program"] = (1, None, lines, "program")
    code = SimpleNamespace(co_filename="program")
    frame = SimpleNamespace(f_globals={}, f_code=code, f_back=None)
    for name in NAMES:
        installed = name.partition(".")[0]
        monkeypatch.setattr(lightning, "find_spec", {installed: installed}.get)
        assert _named(frame) == name
