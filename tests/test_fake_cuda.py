"""The hot path on fake CUDA tensors, which need no GPU: a mixed device or a wait for it raises.

Fake tensors have a device and a shape, but no values. They have no backward pass, so operators
whose back-projection differentiates them are not among these cases.
"""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from deepred_pl import DeepImagePrior, DeepRED, InverseProblem, REDUpdate, admm, resize
from deepred_pl.callbacks import AutoStop, CollapseGuard, Langevin
from deepred_pl.callbacks.base import stability
from deepred_pl.callbacks.guard import _OnHost, _State
from deepred_pl.callbacks.monitor import measure
from deepred_pl.denoisers.nlm import nl_means
from deepred_pl.losses import SURE, TotalVariationPenalty
from deepred_pl.moments import RunningMoments, together
from deepred_pl.networks import DeepDecoder, ImageParameter, MeasurementNet, SkipNet
from deepred_pl.noise import (
    GammaNoise,
    GaussianNoise,
    LaplaceNoise,
    PoissonGaussianNoise,
    PoissonNoise,
)
from deepred_pl.operators import Blur, Downsample, Identity, Mask, Observed, Radon
from tests.helpers import TinyNet, picture, smooth

SIDE = 20
SOME = (torch.arange(SIDE**2) % 3 > 0).float().view(1, 1, SIDE, SIDE)
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "item")


class Physics:
    """An operator of others, by its adjoint."""

    def A(self, x):
        return 0.5 * x

    A_adjoint = A


OPERATORS = {
    "identity": Identity,
    "circular": partial(Blur.gaussian, 5, 1.0),
    "replicate": partial(Blur.gaussian, 5, 1.0, "replicate"),
    "reflect": partial(Blur.gaussian, 5, 1.0, "reflect"),
    "zero": partial(Blur.gaussian, 5, 1.0, "zero"),
    "downsample": partial(Downsample, 2),
    "mask": partial(Mask, SOME),
    "radon": partial(Radon, 9),
    "observed": lambda: Observed(Blur.uniform(3), SOME),
    "adapted": Physics,
}
FILTERED = ("identity", "circular", "replicate", "mask", "radon", "observed")
NOISES = {
    "gaussian": partial(GaussianNoise, 10),
    "per channel": partial(GaussianNoise, [5, 10, 15]),
    "laplace": partial(LaplaceNoise, 10),
    "poisson": partial(PoissonNoise, 30),
    "poisson-gaussian": PoissonGaussianNoise,
    "gamma": GammaNoise,
    "none": lambda: None,
}


class NoWait(TorchDispatchMode):
    """Refuses operations that wait for the GPU, or copy between it and the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        assert name not in WAITING, f"{name} waits for the GPU"
        result = func(*args, **kwargs)
        if name == "_to_copy":
            devices = {args[0].device.type, result.device.type}
            free = kwargs.get("non_blocking")
            assert len(devices) == 1 or free, f"{name} copies between {devices}"
        return result


class Indexing(TorchFunctionMode):
    """Indexing and copies, which a build for CPUs refuses on other devices, by what it has."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__:
            return part(*args)
        if func is torch.Tensor.__setitem__:
            return copied(part(*args[:2]), args[2])
        if func is torch.Tensor.copy_:
            return copied(*args, **(kwargs or {}))
        if func is torch.Tensor.__invert__:
            return torch.bitwise_not(*args)
        if func is torch.Tensor.contiguous:
            layout = (kwargs or {}).get("memory_format", torch.contiguous_format)
            return args[0].clone(memory_format=layout)
        return func(*args, **(kwargs or {}))


def copied(x, value, non_blocking=False):
    """A fake has no values: only devices and shapes are compared."""
    value = torch.as_tensor(value, device=x.device) if isinstance(value, int | float) else value
    assert value.device == x.device or non_blocking, "copy_ copies between devices"
    assert value.expand_as(x).shape == x.shape
    return x


def part(x, at):
    at = at if isinstance(at, tuple) else (at,)
    if any(isinstance(i, torch.Tensor) for i in at):
        raise AssertionError("indexing by a tensor waits for the GPU")
    axes, dim = x.ndim - sum(i is not None and i is not ... for i in at), 0
    for i in at:
        if i is ...:
            dim += axes
        elif i is None:
            x, dim = x.unsqueeze(dim), dim + 1
        elif isinstance(i, slice):
            start, stop, step = i.indices(x.shape[dim])
            assert step == 1
            x, dim = x.narrow(dim, start, max(0, stop - start)), dim + 1
        else:
            x = x.select(dim, i)
    return x


@pytest.fixture(autouse=True)
def fake_cuda(monkeypatch):
    """What a build of torch for CPUs has no fake form of."""

    def shape_of_grid_sample(x, grid, **settings):
        if x.device.type == "cpu":
            return grid_sample(x, grid, **settings)
        assert x.device == grid.device
        return x.new_empty(*x.shape[:2], *grid.shape[1:3])

    grid_sample = F.grid_sample
    monkeypatch.setattr(F, "grid_sample", shape_of_grid_sample)
    event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda **settings: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(DeepImagePrior, "generator", lambda self, purpose="": None)
    yield
    resize._matrices.cache_clear()  # of fakes, which belong to one mode


def moved(module):
    """Put parameters and buffers on the fake GPU; called in `FakeTensorMode`."""
    for part in module.modules():
        for group in (part._parameters, part._buffers):
            for name, t in group.items():
                if t is not None:
                    fake = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
                    is_parameter = group is part._parameters
                    group[name] = nn.Parameter(fake, requires_grad=False) if is_parameter else fake
    return module


def check(model, *steps):
    """Run steps of a fit, each a function of the model, on the fake GPU."""
    resize._matrices.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=False), torch.no_grad(), Indexing():
        moved(model)
        model.driven = True
        with NoWait():
            for step in steps:
                step(model)
        measure(model)  # at logged steps, which wait for the values anyway
        for name, buffer in model.named_buffers():
            assert buffer.device.type == "cuda", name


def theta_step(model):
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        loss = model.training_step()
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert loss.device.type == model.out.device.type == "cuda" and loss.dtype == torch.float32


def optimizer_step(model):
    optimizer = model.configure_optimizers()
    for p in model.network.parameters():
        p.grad = torch.empty_like(p)
    optimizer.step()
    return optimizer


def problem(operator="identity", noise="gaussian"):
    operator, noise, truth = OPERATORS[operator](), NOISES[noise](), picture(3, SIDE, SIDE)
    apply = operator.A if isinstance(operator, Physics) else operator
    y = (1.3 * apply(truth) - 0.1).clamp(0, 1)  # some of it is clipped
    return InverseProblem(y, operator, noise, ground_truth=truth)


@pytest.mark.parametrize(
    ("operator", "noise"),
    [*((operator, "gaussian") for operator in OPERATORS), *(("downsample", n) for n in NOISES)],
)
def test_the_theta_step(operator, noise):
    for weighting in ("fixed", "rise", "discrepancy")[: 1 if noise == "none" else 3]:
        model = DeepRED(network=TinyNet, weighting=weighting, problem=problem(operator, noise))
        check(model, theta_step, DeepRED.update_weighting)


@pytest.mark.parametrize("operator", FILTERED)
@pytest.mark.parametrize("noise", ["gaussian", "poisson"])
def test_the_back_projection(operator, noise):
    model = DeepRED(
        network=TinyNet,
        fidelity="backprojection",
        weighting="discrepancy",
        problem=problem(operator, noise),
    )
    check(model, theta_step, DeepRED.update_weighting)


@pytest.mark.parametrize(
    "network",
    [
        partial(SkipNet, width=4, scales=2),
        partial(DeepDecoder, width=4, scales=2),
        ImageParameter,
        partial(MeasurementNet, width=4, scales=2),
    ],
)
def test_every_network_and_the_optimizer(network):
    check(DeepImagePrior(network=network, problem=problem()), theta_step, optimizer_step)


@pytest.mark.parametrize("term", [TotalVariationPenalty(), SURE()])
def test_every_term(term):
    model = DeepImagePrior(
        network=partial(MeasurementNet, width=4, scales=2),
        input_noise_std=0,
        regularizer=term,
        problem=problem(),
    )
    check(model, theta_step)


@pytest.mark.parametrize("x_update", ["fixed_point", "gradient", "mixed", "pnp"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_the_round_of_red(x_update, rounds):
    if x_update == "pnp" and rounds > 1:
        return
    update = REDUpdate(smooth, x_update=x_update, rounds_per_denoising=rounds)
    update._start_job = lambda model, trainer: None
    trainer = SimpleNamespace(max_steps=99, global_step=0, accumulate_grad_batches=1)

    def make_round(model):
        for denoised in (True, False):
            update._round(model, model.x.clone(), model.f_x.clone(), denoised, trainer)
            model.prior = admm.red_prior(model.x, model.f_x)

    check(DeepRED(network=TinyNet, problem=problem()), theta_step, make_round)


def test_the_guard_langevin_and_the_moments():
    def callbacks(model):
        optimizer = optimizer_step(model)
        trainer = SimpleNamespace(optimizers=[optimizer], callbacks=[], global_step=9, max_steps=10)
        guard, state = CollapseGuard(), _State()
        guard._trained = model
        for _ in range(2):
            state.take(guard, trainer)
            assert _OnHost(stability(model))._number.device.type == "cpu"
        state.restore()
        langevin, stop = Langevin(), AutoStop(window=50)
        langevin._trained = stop._trained = model
        for rate in (0.01, torch.empty((), device="cuda")):
            optimizer.param_groups[0]["lr"] = rate
            langevin.on_train_batch_end(trainer, model)
        for _ in range(3):
            stop.on_train_batch_end(trainer, model)

    check(DeepRED(network=TinyNet, problem=problem()), theta_step, callbacks)


def test_non_local_means_and_running_moments():
    with FakeTensorMode(), torch.no_grad(), NoWait(), Indexing():
        x = torch.empty(1, 3, 64, 64, device="cuda")
        assert nl_means(x, 5, 6, 0.6 * 3 / 255, 3 / 255).device.type == "cuda"
        moments = RunningMoments()
        moments.add(x)
        moments.add(x)
        together([moments, moments])


@pytest.mark.parametrize(
    ("planted", "message"),
    [
        (lambda model: model.out + torch.ones(1, 3, SIDE, SIDE), "to be on the same device"),
        (lambda model: model.out.mean().item(), "_local_scalar_dense waits"),
        (lambda model: bool(model.lam > 1), "_local_scalar_dense waits"),
        (lambda model: model.out.cpu(), "_to_copy copies between"),
        (lambda model: torch.tensor([math.pi]).to(model.out), "_to_copy copies between"),
        (lambda model: model.out.copy_(torch.zeros(1, 3, SIDE, SIDE)), "copy_ copies between"),
        (lambda model: model.out[model.out > 0], "indexing by a tensor waits"),
        (lambda model: torch.masked_select(model.out, model.out > 0), "masked_select waits"),
    ],
)
def test_a_planted_mixed_device_or_wait_raises(planted, message):
    with pytest.raises((AssertionError, RuntimeError), match=message):
        check(DeepRED(network=TinyNet, problem=problem()), theta_step, planted)
