"""What only a GPU can show; skipped without one."""

import os

import pytest
import torch

# cuBLAS reads it once, at its first call in the process; Lightning sets it for deterministic fits.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

from deepred_pl import DeepRED, REDUpdate, graphs
from deepred_pl.background import Background
from deepred_pl.callbacks import CollapseGuard, CudaGraph, LastCheckpoint, Preflight
from deepred_pl.denoisers import NonLocalMeans, TotalVariation
from deepred_pl.lightning import Callback
from tests.helpers import RUN, TinyNet, assert_same_state, noisy_problem, picture

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def test_a_job_begins_behind_what_was_queued_and_its_result_can_be_used():
    background = Background("cuda")
    for _ in range(5):
        x = torch.ones(2000, 2000, device="cuda")
        for _ in range(20):
            x = x @ x / 2000  # stays 1, and keeps the stream busy
        background.submit("sum", torch.sum, x)
        del x  # its memory may be taken anew only behind the job
        torch.zeros(2000, 2000, device="cuda")
        assert background.result().item() == pytest.approx(4e6, rel=1e-3)
    background.close()


@pytest.mark.parametrize("channels", [1, 3])
def test_non_local_means_is_the_same_on_the_gpu(channels):
    x = picture(channels, 33, 47)
    on_gpu = NonLocalMeans(10)(x.cuda())
    assert on_gpu.is_cuda
    torch.testing.assert_close(on_gpu.cpu(), NonLocalMeans(10)(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("denoiser", [NonLocalMeans(3), TotalVariation(0.1)])  # there, and here
def test_a_fit_runs_on_the_gpu_as_on_the_cpu(make_trainer, monkeypatch, denoiser):
    # Rounding to TF32 changes the result of 8 steps of Adam by 0.1.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    restored = {}
    for where in ("cpu", "gpu"):
        problem = noisy_problem(3, 33, 47)
        model = DeepRED(network=TinyNet, input_noise_std=0, result="out", problem=problem)
        callbacks = [REDUpdate(denoiser, every_n_steps=2), Preflight()]
        make_trainer(max_steps=8, accelerator=where, devices=1, callbacks=callbacks).fit(model)
        restored[where] = model.restored.cpu()
    torch.testing.assert_close(restored["gpu"], restored["cpu"], atol=0.05, rtol=0)


class Captured(Callback):
    """Whether the network's passes were captured."""

    def on_train_start(self, trainer, model):
        self.at_first = model.network in graphs._captured


def fitted(make_trainer, steps=50, ckpt_path=None, **settings):
    """A fit of DeepRED on the GPU, with all that a run of the command line has."""
    precision, deterministic = settings.pop("precision", "32-true"), settings.pop("deterministic")
    model = DeepRED(network=TinyNet, problem=noisy_problem(3, 33, 47), **settings)
    update, captured = REDUpdate(NonLocalMeans(3)), Captured()
    callbacks = [CudaGraph(), CollapseGuard(), update, LastCheckpoint(), captured]
    trainer = make_trainer(
        max_steps=steps,
        accelerator="gpu",
        devices=1,
        callbacks=callbacks,
        precision=precision,
        deterministic=deterministic,
        enable_checkpointing=True,
    )
    try:
        trainer.fit(model, ckpt_path=ckpt_path)
    finally:
        torch.use_deterministic_algorithms(False)
    assert captured.at_first == model.graph
    return model.cpu()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_graph_gives_the_same_fit(make_trainer, precision):
    settings = {"precision": precision, "deterministic": True}
    replayed = fitted(make_trainer, **settings)
    assert_same_state(replayed, fitted(make_trainer, graph=False, **settings))


@pytest.mark.parametrize("graph", [True, False])
def test_a_deterministic_fit_is_repeated_and_resumed_exactly(make_trainer, tmp_path, graph):
    settings = {"precision": "bf16-mixed", "deterministic": True, "graph": graph}
    whole = fitted(make_trainer, **settings)
    assert_same_state(whole, fitted(make_trainer, **settings))
    fitted(make_trainer, steps=27, **settings)
    last = tmp_path / RUN.replace("0", "2") / "checkpoints" / "last.ckpt"
    assert_same_state(whole, fitted(make_trainer, ckpt_path=last, **settings))


def test_the_steps_between_two_rounds_do_not_wait_for_the_gpu():
    problem = noisy_problem(3, 33, 47).cuda()
    model = DeepRED(network=TinyNet, weighting="discrepancy", problem=problem)
    model.driven = True
    optimizer = model.configure_optimizers()

    def step():
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model.training_step()
        loss.backward()
        optimizer.step()

    step()  # the first prepares
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(10):
            step()
            model.update_weighting()
    finally:
        torch.cuda.set_sync_debug_mode("default")
