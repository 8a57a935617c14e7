"""What only a GPU can show; skipped without one."""

import pytest
import torch

from deepred_pl import DeepRED, REDUpdate
from deepred_pl.background import Background
from deepred_pl.callbacks import Preflight
from deepred_pl.denoisers import NonLocalMeans, TotalVariation
from tests.helpers import TinyNet, noisy_problem, picture

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
