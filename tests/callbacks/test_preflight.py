import logging
from functools import partial

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from deepred_pl import DeepImagePrior, DeepRED, REDUpdate, memory
from deepred_pl.callbacks import Preflight, preflight
from deepred_pl.networks import DeepDecoder, ImageParameter, SkipNet
from tests.helpers import TinyNet, noisy_problem, smooth

FLOAT = 4  # bytes


def test_live_bytes_are_those_alive_at_once():
    kept = torch.ones(100)
    with preflight.LiveBytes() as live:
        a = torch.zeros(50)  # 50
        b = a + 1  # 100
        b.mul_(2)  # in place
        a.view(5, 10).t()  # a view
        kept.add_(1)  # was there before
        del a  # 50
        (b * 2).sum()  # 101, and 51 behind it
        del b
        c = torch.zeros(90)  # 90
    assert live.most == 101 * FLOAT
    del c


def test_live_bytes_count_what_is_kept_for_the_backward_pass():
    weight = torch.ones(100, requires_grad=True)
    with preflight.LiveBytes() as live:
        y = weight.exp().exp()  # each keeps its result
        torch.autograd.grad(y.sum(), weight)
    # Two results, the sum and its gradient, and at least one gradient of 100 behind them.
    assert 300 * FLOAT <= live.most <= 420 * FLOAT


@pytest.mark.parametrize("size", [(130, 131), (257, 129), (37, 41)])
def test_the_memory_of_a_part_tells_that_of_a_whole_step(size):
    model = DeepImagePrior(network=TinyNet, problem=noisy_problem(3, *size))
    optimizer = model.configure_optimizers()
    with preflight.LiveBytes() as live:
        model.training_step().backward()
        optimizer.step()
    assert preflight.step_memory(model) == pytest.approx(live.most, rel=0.2)


def test_the_memory_of_a_step_is_what_torchs_profiler_sees():
    model = DeepImagePrior(network=partial(SkipNet, width=32), problem=noisy_problem(3, 200, 260))
    optimizer = model.configure_optimizers()

    def step():
        optimizer.zero_grad()
        model.training_step().backward()
        optimizer.step()

    step()
    kept = 2 * sum(p.numel() for p in model.parameters()) * FLOAT  # Adam's, made in that step
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    taken = most = 0
    for event in sorted(recorded.events(), key=lambda event: event.time_range.start):
        taken += event.self_cpu_memory_usage
        most = max(most, taken)
    assert preflight.step_memory(model) == pytest.approx(most + kept, rel=0.15)


def test_a_network_with_frozen_parameters_is_measured():
    def frozen(channels):
        network = TinyNet(channels)
        network.head.requires_grad_(False)
        return network

    assert preflight.step_memory(DeepImagePrior(network=frozen, problem=noisy_problem())) > 0


def test_a_network_for_large_images_is_measured_on_a_larger_part():
    deep = partial(SkipNet, width=1, skip_width=1, scales=7)  # for 129 pixels and more
    model = DeepImagePrior(network=deep, problem=noisy_problem(1, 140, 129))
    assert preflight.step_memory(model) > model.z.nbytes / 2


def test_a_network_of_another_size_is_refused_by_its_first_step(make_trainer):
    class Half(nn.Conv2d):
        def __init__(self, channels):
            super().__init__(32, channels, 2, stride=2)

    model = DeepImagePrior(network=Half, problem=noisy_problem(3, 9, 11))
    with pytest.raises(ValueError, match=r"must return \(1, 3, 9, 11\)"):
        make_trainer(max_steps=1, callbacks=[Preflight()]).fit(model)


@pytest.mark.parametrize("network", [TinyNet, lambda c: DeepDecoder(c, 8, 2), ImageParameter])
def test_every_network_is_measured_and_left_as_it_is(network, make_trainer, caplog):
    model, plain = (
        DeepRED(network=network, problem=noisy_problem(1, 33, 17), weighting="fixed")
        for _ in range(2)
    )
    caplog.set_level(logging.INFO)
    make_trainer(max_steps=3, callbacks=[REDUpdate(smooth), Preflight()]).fit(model)
    told = [r.message for r in caplog.records if r.message.startswith("Expected:")]
    assert len(told) == 1 and "for 3, plus" in told[0] and "memory" in told[0]
    make_trainer(max_steps=3, callbacks=[REDUpdate(smooth)]).fit(plain)
    assert torch.equal(model.restored, plain.restored)


def test_a_fit_that_cannot_fit_into_memory_is_refused(make_trainer, monkeypatch):
    model = DeepImagePrior(network=TinyNet, problem=noisy_problem(3, 33, 47))
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match=r"33×47 pixels needs about .* use a smaller network"):
        make_trainer(max_steps=1, callbacks=[Preflight()]).fit(model)
    assert model.step == 0
    with pytest.raises(ValueError, match="needs about"):  # by the command line, before it writes
        Preflight().check(model, make_trainer(max_steps=1))


@pytest.mark.parametrize(
    "seconds, told", [(0.4, "0 s"), (89.6, "90 s"), (3540, "59 min"), (7300, "2 h 1 min")]
)
def test_durations(seconds, told):
    assert preflight._duration(seconds) == told


def test_on_a_gpu_the_allocator_says_what_a_step_took(monkeypatch):
    allocated = {"now": 100, "most": 0}
    monkeypatch.setattr(
        torch.cuda, "reset_peak_memory_stats", lambda device: allocated.update(most=100)
    )
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocated["most"])
    needed = iter([900, 340])  # the first step also allocates what is kept for all

    def step():
        allocated["most"] = next(needed)

    assert preflight._most_allocated(step, torch.device("cuda")) == 240
