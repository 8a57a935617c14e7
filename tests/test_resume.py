"""A fit that was cut off goes on as if it had not been."""

import shutil
from pathlib import Path

import pytest
import torch

from deepred_pl import DeepRED, REDUpdate
from deepred_pl.callbacks import LastCheckpoint
from deepred_pl.cli import main
from deepred_pl.denoisers import TotalVariation
from deepred_pl.images import write_image
from deepred_pl.optim import WarmupCosine
from tests.helpers import RUN, Cut, Scissors, TinyNet, noisy_problem, picture, smooth

ROOT = Path(__file__).parents[1]
TASKS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if path.stem != "fast"]

SCHEDULES = {
    "paper": {"every_n_steps": 5},
    "released": {"every_n_steps": 1, "rounds_per_denoising": 4},
    "released, J = 2": {"every_n_steps": 2, "rounds_per_denoising": 3, "inner_iterations": 2},
    "mixed, J = 3": {"every_n_steps": 4, "x_update": "mixed", "inner_iterations": 3},
    "a shipped denoiser": {"denoiser": TotalVariation(0.05), "every_n_steps": 5},
}


def assert_same_checkpoint(first, second):
    """Every tensor in two checkpoints is equal, the optimizer's and the schedule's too."""
    saved = [torch.load(path, weights_only=True) for path in (first, second)]
    compared = 0

    def walk(a, b, where):
        nonlocal compared
        assert type(a) is type(b), where
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), where
            compared += 1
        elif isinstance(a, dict):
            assert a.keys() == b.keys(), where
            for key in a:
                walk(a[key], b[key], f"{where}/{key}")
        elif isinstance(a, (list, tuple)):
            for i, pair in enumerate(zip(a, b, strict=True)):
                walk(*pair, f"{where}/{i}")
        else:
            assert a == b, where

    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        walk(saved[0][part], saved[1][part], part)
    assert compared > 30
    for name in ("x", "u", "f_x", "x_pending", "average", "lam", "threshold", "z"):
        assert name in saved[0]["state_dict"]


def new_model():
    from functools import partial

    return DeepRED(
        network=TinyNet,
        problem=noisy_problem(),
        weighting="rise",
        rise_step=0.1,
        rise_start=10.0,
        lr_scheduler=partial(WarmupCosine, total_steps=100, warmup_steps=10),
    )


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_fit_resumed_at_any_step_ends_like_an_uninterrupted_one(make_trainer, tmp_path, schedule):
    def trainer(folder, last):
        return make_trainer(
            max_steps=29,
            callbacks=[REDUpdate(**{"denoiser": smooth, **schedule}), last],
            enable_checkpointing=True,
            default_root_dir=tmp_path / folder,
        )

    trainer("whole", LastCheckpoint()).fit(new_model())
    for cut in (1, 13, 20, 26):
        with pytest.raises(Cut):
            trainer(f"cut {cut}", Scissors(cut)).fit(new_model())
        saved = tmp_path / f"cut {cut}" / RUN / "checkpoints" / "last.ckpt"
        assert torch.load(saved, weights_only=True)["global_step"] == cut
        trainer(f"resumed {cut}", LastCheckpoint()).fit(new_model(), ckpt_path=saved)
        resumed = tmp_path / f"resumed {cut}" / RUN / "checkpoints" / "last.ckpt"
        assert_same_checkpoint(resumed, tmp_path / "whole" / RUN / "checkpoints" / "last.ckpt")


def test_a_finished_fit_is_extended_by_resuming_with_more_steps(make_trainer, tmp_path):
    def fit(steps, folder, ckpt_path=None):
        callbacks = [REDUpdate(smooth, every_n_steps=5), LastCheckpoint()]
        make_trainer(
            max_steps=steps,
            callbacks=callbacks,
            enable_checkpointing=True,
            default_root_dir=tmp_path / folder,
        ).fit(new_model(), ckpt_path=ckpt_path)
        return tmp_path / folder / RUN / "checkpoints" / "last.ckpt"

    whole = fit(29, "whole")
    finished = fit(13, "finished")
    extended = fit(29, "extended", ckpt_path=finished)
    assert_same_checkpoint(extended, whole)


@pytest.mark.parametrize("task", TASKS, ids=lambda path: path.stem)
def test_every_task_resumes_exactly(tmp_path, monkeypatch, task):
    write_image(tmp_path / "truth.png", picture(3, 37, 47))
    fifth, end_of_step = tmp_path / "fifth.ckpt", LastCheckpoint.on_train_batch_end

    def last(folder):
        return tmp_path / folder / RUN / "checkpoints/last.ckpt"

    def keep_the_fifth(self, trainer, *args):
        end_of_step(self, trainer, *args)
        if trainer.global_step == 5:
            shutil.copy(last("whole"), fifth)

    def fit(folder, *more):
        main(
            [
                *("fit", "--config", str(task), "--data.ground_truth", str(tmp_path / "truth.png")),
                *("--model.network.init_args.width=4", "--trainer.max_steps=9"),
                *("--red.every_n_steps=3", "--checkpoint.every_n_steps=5"),
                *(f"--trainer.default_root_dir={tmp_path / folder}", "--trainer.accelerator=cpu"),
                *more,
            ]
        )

    with monkeypatch.context() as patch:
        patch.setattr(LastCheckpoint, "on_train_batch_end", keep_the_fifth)
        fit("whole")
    fit("resumed", "--ckpt_path", str(fifth))
    assert_same_checkpoint(last("resumed"), last("whole"))
