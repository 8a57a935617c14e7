"""The θ-step against the textbook loop: seconds, FLOP/s, memory, and PSNR at equal steps."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.conftest import deep_image_prior, problem, psnr
from tests.benchmarks.textbook import Textbook


def has_bf16_units(device):
    """Whether bfloat16 has instructions; without them it is emulated, many times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported()  # as have all CPUs with AMX


def bare_step(model, precision="32"):
    """One θ-update of ours without Lightning's trainer."""
    optimizer = model.configure_optimizers()
    device = model.z.device.type

    def step():
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = model.training_step()
        loss.backward()
        optimizer.step()

    return step


def peak_memory(step, device):
    """Bytes that tensors take at most during a step, beyond what they took before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    taken = most = 0
    for event in sorted(recorded.events(), key=lambda e: e.time_range.start):
        taken += event.self_cpu_memory_usage
        most = max(most, taken)
    return most


@pytest.mark.parametrize("width", [128, 32])
@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_theta_step(race, device, side, width, precision, quality_steps):
    if precision == "bf16-mixed" and not has_bf16_units(device):
        pytest.skip("no instructions for bfloat16")
    noisy = problem(side, device)
    model, textbook = deep_image_prior(noisy, width), Textbook(noisy.y, width)
    step = bare_step(model, precision)
    with FlopCounterMode(display=False) as counter:
        textbook.step()
    row = race(step, textbook.step, names=("ours", "textbook"))
    seconds = float(row["ours"].split()[0]) / 1e3
    row["GFLOP/s"] = f"{counter.get_total_flops() / seconds / 1e9:.0f}"  # the textbook's FLOP
    memory = [peak_memory(s, device) / 2**20 for s in (step, textbook.step)]
    row["MiB"] = "{:.0f}, textbook {:.0f}".format(*memory)

    model, textbook = deep_image_prior(noisy, width), Textbook(noisy.y, width)
    step = bare_step(model, precision)
    for _ in range(quality_steps):
        step()
        textbook.step()
    scores = [psnr(m.average, noisy.ground_truth) for m in (model, textbook)]
    row[f"dB after {quality_steps}"] = "{:.2f}, textbook {:.2f}".format(*scores)


@pytest.mark.parametrize("width", [128, 32])
def test_keeping_memory(race, device, side, width):
    """What `KeepMemory` is worth."""
    if device.type != "cpu":
        pytest.skip("of CPUs alone")
    from deepred_pl.callbacks.memory import give_memory_back, keep_memory

    step = bare_step(deep_image_prior(problem(side, device), width))

    def without():
        give_memory_back()
        try:
            step()
        finally:
            keep_memory()

    step()
    race(step, without, names=("kept", "not kept"))
