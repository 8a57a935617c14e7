"""The θ-step against the textbook loop: seconds, FLOP/s, memory, and PSNR at equal steps."""

import time
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from deepred_pl.memory import give_memory_back, keep_memory
from tests.benchmarks.conftest import deep_image_prior, problem, psnr
from tests.benchmarks.textbook import Textbook

PRECISIONS = ("32", "bf16-mixed")


def has_bf16(device):
    """Whether bfloat16 has instructions; without them it is emulated, many times slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    known = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # AMX comes with it
    return known is not None and known()


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
def test_theta_step(race, device, side, width, quality_steps):
    """Ours in each precision; the FLOP are the textbook's, so that the rates compare too."""

    def contenders():
        textbook = Textbook(noisy.y, width)
        made = {
            "textbook": (textbook, textbook.step),
            **{f"ours, {p}": ours(p) for p in PRECISIONS if p == "32" or has_bf16(device)},
        }
        if device.type == "cuda":  # on CPUs it takes minutes and gives nothing
            made["bf16, compiled"] = ours("bf16-mixed", compile=True)
        return made

    def ours(precision, **settings):
        model = deep_image_prior(noisy, width, **settings)
        return model, bare_step(model, precision)

    noisy = problem(side, device)
    steps = {name: step for name, (_, step) in contenders().items()}
    with FlopCounterMode(display=False) as counter:
        steps["textbook"]()
    rows = race(steps)
    fitted = contenders()
    for name, (model, step) in fitted.items():
        rows[name]["GFLOP/s"] = round(counter.get_total_flops() / rows[name]["seconds"] / 1e9)
        rows[name]["MiB"] = round(peak_memory(steps[name], device) / 2**20)
        for _ in range(quality_steps):
            step()
        rows[name][f"dB after {quality_steps} steps"] = psnr(model.average, noisy.ground_truth)


@pytest.mark.parametrize("width", [128, 32])
def test_keeping_memory(race, device, side, width):
    """What `KeepMemory` is worth."""
    if device.type != "cpu":
        pytest.skip("only for CPUs")
    step = bare_step(deep_image_prior(problem(side, device), width))

    def one_step(prepare):
        prepare()
        step()  # the first after a change takes or gives memory
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        keep_memory()
        return seconds

    race({"kept": partial(one_step, keep_memory), "not kept": partial(one_step, give_memory_back)})
