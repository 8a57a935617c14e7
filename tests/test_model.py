import copy
import functools
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from deepred_pl import DeepImagePrior, DeepRED, InverseProblem, REDUpdate
from deepred_pl import trainer as trainer_module
from deepred_pl.callbacks import AutoStop, CollapseGuard
from deepred_pl.callbacks.monitor import measure
from deepred_pl.callbacks.writer import summarise
from deepred_pl.lightning import NAME
from deepred_pl.networks import DeepDecoder, SkipNet
from deepred_pl.noise import GaussianNoise
from deepred_pl.operators import Downsample, Mask
from deepred_pl.optim import WarmupCosine
from tests.helpers import TinyNet, assert_same_state, noisy_problem, picture, smooth


def make(kind=DeepImagePrior, **settings):
    settings = {"network": TinyNet, "problem": noisy_problem(), **settings}
    model = kind(**settings)
    if kind is DeepRED:
        model.driven = True  # as a REDUpdate would
    return model


def unclipped():
    return InverseProblem(0.1 + 0.8 * noisy_problem().y, noise=GaussianNoise(25))


def test_the_loss_of_dip_is_the_data_term_of_the_networks_output():
    model = make(problem=unclipped())
    loss = model.training_step()
    want = ((model.out.double() - model.problem.y) ** 2).mean().item()
    assert loss.item() == pytest.approx(want, rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in model.network.parameters())


def test_z_has_as_many_channels_as_the_network_takes():
    network = functools.partial(SkipNet, width=4, scales=1, input_channels=5)
    model = make(network=network)
    assert model.z.shape == (1, 5, *model.average.shape[-2:])
    assert model.training_step().isfinite()


def test_the_loss_of_deepred_adds_the_proximity_term():
    model = make(DeepRED, mu=0.7, problem=unclipped())
    model.x = picture(3, 9, 11)
    model.u = 0.1 * picture(3, 9, 11).flip(-1)
    loss = model.training_step().item()
    out, x, u, y = (t.double().numpy() for t in (model.out, model.x, model.u, model.problem.y))
    want = ((out - y) ** 2).mean() + 0.7 * ((out - (x - u)) ** 2).mean()
    assert loss == pytest.approx(want, rel=1e-5)


def test_average_is_the_exponential_average_that_starts_at_the_measurement():
    model = make(average_decay=0.8)
    want = model.problem.y.double()
    for _ in range(4):
        model.training_step()
        want = 0.8 * want + 0.2 * model.out
    torch.testing.assert_close(model.average.double(), want, atol=1e-6, rtol=0)


def test_the_input_noise_is_a_function_of_seed_and_step():
    noises = {}
    for seed in (0, 1):
        model = make(seed=seed)
        for model.step in (0, 1, 7):
            noises[seed, model.step] = model._input_noise()
            torch.rand(3)  # whatever else the process draws
            assert torch.equal(noises[seed, model.step], model._input_noise())
    assert len({tuple(n.flatten()[:5].tolist()) for n in noises.values()}) == 6
    noise = torch.cat([n.flatten() for n in noises.values()])
    assert noise.mean().item() == pytest.approx(0, abs=0.05)
    assert noise.std().item() == pytest.approx(1, abs=0.05)


def test_input_noise_has_the_std_asked_for():
    seen = []

    class Spy(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, channels, 1, 1))

        def forward(self, z):
            seen.append(z)
            return self.weight + 0 * z[:, :1]

    model = make(network=Spy, input_noise_std=0.05, problem=noisy_problem(3, 33, 47))
    model.training_step()
    assert (seen[0] - model.z).std().item() == pytest.approx(0.05, rel=0.02)
    quiet = make(network=Spy, input_noise_std=0)
    quiet.training_step()
    assert torch.equal(seen[1], quiet.z)


def test_model_seed_owns_weights_and_z_and_the_processes_seed_is_left_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first, same, other = make(seed=3), make(seed=3), make(seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert_same_state(first, same)
    assert not torch.equal(first.z, other.z)
    assert not torch.equal(first.network.head.weight, other.network.head.weight)


@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_z_is_uniform_up_to_the_input_scale(scale):
    z = make(input_scale=scale, problem=noisy_problem(1, 33, 47)).z
    assert z.shape == (1, 32, 33, 47)
    assert z.min() >= 0 and scale * 0.99 < z.max() <= scale
    assert z.mean().item() == pytest.approx(scale / 2, rel=0.02)


def test_a_network_may_prepare_its_own_input():
    class Own(TinyNet.func):
        def prepare(self, problem):
            return torch.full((1, 32, *problem.image_shape[-2:]), 0.25)

    model = make(network=functools.partial(Own, width=4, scales=2))
    assert (model.z == 0.25).all()


@pytest.mark.parametrize(("channels", "size"), [(1, (33, 47)), (2, (5, 5)), (5, (9, 6))])
def test_any_size_and_number_of_channels(channels, size):
    problem = InverseProblem(picture(channels, *size), noise=GaussianNoise(25))
    model = make(DeepRED, problem=problem)
    model.training_step().backward()
    assert model.restored.shape == (1, channels, *size)


def test_an_image_too_small_for_the_network_is_refused():
    problem = noisy_problem(3, 20, 40)
    with pytest.raises(ValueError, match=r"at least 33×33 pixels, got 20×40; .*fewer scales"):
        DeepImagePrior(network=functools.partial(SkipNet, width=4), problem=problem)


def test_an_image_too_large_for_the_memory_is_refused_before_anything_is_drawn():
    problem = InverseProblem(torch.rand(1, 1, 40, 40), operator=Downsample(4000))
    with pytest.raises(ValueError, match=r"160000×160000 pixels needs about 9\.8 TB"):
        make(problem=problem)


def test_a_network_of_another_size_is_refused():
    class Half(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = nn.Conv2d(32, channels, 2, stride=2)

        def forward(self, z):
            return self.conv(z)

    with pytest.raises(ValueError, match=r"must return \(1, 3, 9, 11\).*got \(1, 3, 4, 5\)"):
        make(network=Half).training_step()


@pytest.mark.parametrize("result", ["average", "out", "x", "x-u"])
def test_the_result_asked_for_is_returned_clipped(result):
    model = make(DeepRED, result=result)
    model.step = 1
    model.average, model.out, model.x, model.u = (
        torch.full_like(model.x, value) for value in (0.1, 0.2, 0.3, -0.9)
    )
    want = {"average": 0.1, "out": 0.2, "x": 0.3, "x-u": 1.0}[result]
    torch.testing.assert_close(model.restored, torch.full_like(model.x, want))


@pytest.mark.parametrize(("channels", "of_mask"), [(1, 1), (3, 1), (3, 3)])
@pytest.mark.parametrize("noise", [None, GaussianNoise(5)])
def test_known_pixels_without_noise_are_returned_unchanged(channels, of_mask, noise, make_trainer):
    x, known = picture(channels, 9, 12), picture(of_mask, 9, 12) > 0.5
    model = make(DeepImagePrior, problem=InverseProblem(x, Mask(known), noise))
    make_trainer(max_steps=3).fit(model)
    kept = known.expand_as(x)
    assert torch.equal(model.restored[kept], x[kept]) == (noise is None)
    assert torch.equal(model.restored[~kept], model.average[~kept].clamp(0, 1))
    model.chosen = torch.zeros_like(x)
    assert torch.equal(model.restored[kept], x[kept]) == (noise is None)


@pytest.mark.parametrize("noise", [None, GaussianNoise(5)])
def test_scores_of_inpainting_are_with_the_known_pixels(noise, make_trainer):
    x, known = picture(3, 9, 12), picture(1, 9, 12) > 0.5
    model = make(DeepRED, problem=InverseProblem(x, Mask(known), noise, ground_truth=x))
    trainer = make_trainer(max_steps=3)
    trainer.fit(model)
    curves, result = measure(model), summarise(model, trainer, seconds=1.0)
    for name in ("out", "average", "x"):
        error = getattr(model, name).clamp(0, 1) - x
        error = error.where(~known, 0) if noise is None else error
        want = -10 * error.square().mean().log10().item()
        assert curves[f"psnr_{name}"].item() == pytest.approx(want, abs=1e-3)
        assert result["psnr"][name] == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize("noise_sigma", [10, 25, 50])
def test_the_rise_starts_at_the_noises_own_psnr(noise_sigma):
    problem = InverseProblem(picture(1, 9, 9), noise=GaussianNoise(noise_sigma))
    threshold = make(DeepRED, problem=problem, weighting="rise").threshold.item()
    assert threshold == pytest.approx(-20 * math.log10(noise_sigma / 255) - 0.17, abs=1e-3)
    released = make(DeepRED, problem=problem, weighting="rise", rise_start=20.0)
    assert released.threshold.item() == 20


def test_the_rise_does_not_take_clipped_noise_for_a_close_fit():
    y = (25 / 255 * torch.randn(1, 1, 9, 11, generator=torch.Generator().manual_seed(0))).clamp(0)
    model = make(DeepRED, problem=InverseProblem(y, noise=GaussianNoise(25)), weighting="rise")
    model.out = torch.zeros_like(y)
    # On black, clipping halves the mean square of the noise.
    psnr = -10 * math.log10(2 * y.double().square().mean())
    for threshold, lam in ((psnr + 0.01, 0.5), (psnr - 0.01, 0.53)):
        model.threshold = torch.tensor(threshold)
        model.update_weighting()
        assert model.lam.item() == pytest.approx(lam)


def test_the_discrepancy_rule_sets_lam_and_keeps_mus_proportion_and_lams_floor():
    # On the [0, 1] scale σ is 0.05, the variance 0.0025, and λ at a residual of that 450 times it.
    problem = InverseProblem(torch.full((1, 1, 9, 11), 0.5), noise=GaussianNoise(12.75))
    model = make(DeepRED, problem=problem, weighting="discrepancy", lam=0.3, mu=0.6)
    assert (model.lam.item(), model.mu.item()) == pytest.approx((0.3, 0.6))
    # 0.045 is 0.9 σ, where λ is 0.9⁻²⁰ = 8.2253 times that; at 0.07 it would be below the floor.
    for misfit, lam in {0.05: 1.125, 0.045: 9.2534, 0.07: 0.3}.items():
        model.out = problem.y + misfit
        model.update_weighting()
        assert (model.lam.item(), model.mu.item()) == pytest.approx((lam, 2 * lam), rel=1e-4)


def test_the_discrepancy_rule_needs_a_noise_model():
    with pytest.raises(ValueError, match="'discrepancy' needs a noise model"):
        make(DeepRED, problem=InverseProblem(picture(1, 9, 9)), weighting="discrepancy")


def test_the_rise_needs_a_noise_level():
    plain = InverseProblem(picture(1, 9, 9))
    with pytest.raises(ValueError, match="needs a noise model"):
        make(DeepRED, problem=plain, weighting="rise")
    assert make(DeepRED, problem=plain).lam == 0.5
    assert make(DeepRED, problem=plain, weighting="rise", rise_start=20.0).threshold == 20


@pytest.mark.parametrize("wrong", [{"lam": 0}, {"mu": -0.1}, {"lam": math.nan}])
def test_weights_must_be_positive_and_the_message_names_dip(wrong):
    with pytest.raises(ValueError, match=r"must be > 0.*DeepImagePrior \(methods/dip\)"):
        DeepRED(**wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"input_scale": 0},
        {"input_noise_std": -1},
        {"average_decay": 1.0},
        {"seed": -1},
        {"rise_step": 0.0},
        {"weighting": "growing"},
        {"rise_start": "nosie"},
        {"input_scale": math.nan},
        {"input_noise_std": math.nan},
        {"lam": math.inf},
        {"result": "best"},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DeepRED(**wrong)


def test_what_is_missing_is_said():
    with pytest.raises(RuntimeError, match="create it with problem="):
        DeepImagePrior().training_step()
    with pytest.raises(RuntimeError, match="nothing is restored yet"):
        _ = DeepImagePrior().restored
    unfitted = make(DeepRED)
    assert torch.equal(unfitted.restored, unfitted.problem.first_guess())
    with pytest.raises(ValueError, match="result must be one of"):
        DeepImagePrior(result="x")
    undriven = DeepRED(network=TinyNet, problem=noisy_problem())
    with pytest.raises(RuntimeError, match=r"add REDUpdate\(denoiser\)"):
        undriven.training_step()


@pytest.mark.parametrize(
    ("wrong", "example"),
    [
        ({"network": SkipNet(3, width=4, scales=2)}, r"partial\(SkipNet, width=32\)"),
        ({"network": nn.Conv2d(1, 1, 1)}, "got a Conv2d"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, r"partial\(torch\.optim\.Adam, lr=0.01"),
        ({"lr_scheduler": 0.1}, r"got 0\.1; give for example functools\.partial\(WarmupCosine"),
        ({"problem": picture(3)}, r"must be an InverseProblem, got Tensor"),
    ],
)
def test_objects_of_another_kind_are_refused(wrong, example):
    with pytest.raises(ValueError, match=example):
        DeepRED(**wrong)


PLAIN_SETTINGS = {
    "lam": 0.25,
    "mu": 0.5,
    "average_decay": 0.75,
    "input_noise_std": 0.125,
    "seed": 3,
}


def test_numbers_of_numpy_and_torch_become_pythons(make_trainer, tmp_path):
    settings = {
        "lam": np.float32(0.25),
        "mu": np.float64(0.5),
        "average_decay": torch.tensor(0.75),
        "input_noise_std": np.float16(0.125),
        "seed": np.int64(3),
    }
    numbers, plain = make(DeepRED, **settings), make(DeepRED, **PLAIN_SETTINGS)
    for model in (numbers, plain):
        update = REDUpdate(smooth, every_n_steps=np.int64(2))
        stop = AutoStop(window=np.int64(10), patience=np.int64(1000))
        trainer = make_trainer(max_steps=12, callbacks=[CollapseGuard(np.float32(6)), update, stop])
        trainer.fit(model)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        loaded = DeepRED.load_from_checkpoint(tmp_path / "last.ckpt", network=TinyNet)
        assert torch.equal(loaded.restored, model.restored)
        assert loaded.lam.dtype == torch.float32
        assert {name: loaded.hparams[name] for name in settings} == PLAIN_SETTINGS
        assert {type(loaded.hparams[name]) for name in settings} == {float, int}
    assert_same_state(numbers, plain)


def test_data_that_would_not_be_used_is_refused(make_trainer):
    loader = DataLoader([torch.zeros(3)])
    model, update = make(DeepRED), REDUpdate(smooth, every_n_steps=2)
    with pytest.raises(ValueError, match=r"the batches of a DataLoader: leave it out of fit\(\)"):
        make_trainer(max_steps=2, callbacks=[update]).fit(model, loader)
    make_trainer(max_steps=2, callbacks=[update]).fit(model)
    with pytest.raises(ValueError, match=r"leave it out of predict\(\)"):
        make_trainer().predict(model, loader)


def test_seed_everything_is_said_to_change_nothing(make_trainer, monkeypatch, caplog):
    caplog.set_level("INFO", logger=NAME)
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    trainer_module._say_that_seeds_are_settings.cache_clear()
    for _ in range(2):
        update = REDUpdate(smooth, every_n_steps=2)
        make_trainer(max_steps=1, callbacks=[update]).fit(make(DeepRED))
    assert caplog.text.count("seed_everything does not change θ₀, z and the input noise") == 1


def test_one_module_restores_one_image():
    model = make()
    with pytest.raises(AttributeError, match=r"build\(problem\) gives the problem"):
        model.problem = noisy_problem()
    with pytest.raises(AttributeError, match="create a new module for another image"):
        make(problem=None).problem = noisy_problem()
    model.build(model.problem)  # nothing happens
    with pytest.raises(ValueError, match="another image"):
        model.build(noisy_problem())


def test_a_true_precision_is_refused(make_trainer):
    for precision in ("bf16-true", "64-true"):
        model = make(DeepRED)
        trainer = make_trainer(max_steps=1, precision=precision, callbacks=[REDUpdate(smooth)])
        with pytest.raises(ValueError, match="bf16-mixed"):
            trainer.fit(model)


def test_a_fit_without_an_end_is_refused(make_trainer):
    with pytest.raises(ValueError, match="max_steps"):
        make_trainer().fit(make())
    make_trainer(max_time={"seconds": 0}).fit(make())


def test_mixed_precision_keeps_the_state_in_float32(make_trainer):
    model = make(DeepRED)
    update = REDUpdate(smooth, every_n_steps=2)
    make_trainer(max_steps=5, precision="bf16-mixed", callbacks=[update]).fit(model)
    tensors = {n: v for n, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    assert {v.dtype for v in tensors.values()} == {torch.float32}
    assert all(v.isfinite().all() for v in tensors.values())


def test_the_schedule_is_stepped_after_every_step(make_trainer):
    rates = []

    class Optimizer(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])
            return super().step(closure)

    model = make(
        optimizer=functools.partial(Optimizer, lr=0.4),
        lr_scheduler=functools.partial(WarmupCosine, total_steps=11, warmup_steps=3),
    )
    make_trainer(max_steps=14).fit(model)
    cosine = 0.2 * (1 + np.cos(np.pi * np.arange(8) / 8))
    want = [0.1, 0.2, 0.3, *cosine, 0, 0, 0]
    np.testing.assert_allclose(rates, want, atol=1e-9)


@pytest.mark.parametrize(("warmup", "total"), [(-1, 5), (5, 5)])
def test_an_impossible_schedule_is_refused(warmup, total):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)
    with pytest.raises(ValueError, match="warmup_steps"):
        WarmupCosine(optimizer, total, warmup)


@pytest.mark.parametrize("kind", [DeepImagePrior, DeepRED])
def test_a_checkpoint_alone_gives_the_restored_image(kind, make_trainer, tmp_path):
    model = make(kind, problem=noisy_problem(1, 9, 11), seed=4)
    trainer = make_trainer(max_steps=5, callbacks=[REDUpdate(smooth, every_n_steps=2)])
    trainer.fit(model)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = kind.load_from_checkpoint(tmp_path / "last.ckpt", network=TinyNet)
    assert torch.equal(loaded.restored, model.restored)
    assert loaded.step == 5 and loaded.seed == 4
    with pytest.raises(RuntimeError, match="create it with problem="):
        make_trainer(max_steps=1, callbacks=[REDUpdate(smooth)]).fit(loaded)
    # With its problem it is complete, be it given now or later; with another it is refused.
    with pytest.raises(ValueError, match="is not this problem's"):
        loaded.build(noisy_problem(1, 9, 12))
    loaded.build(noisy_problem(1, 9, 11))
    assert torch.equal(loaded.restored, model.restored)
    whole = kind.load_from_checkpoint(
        tmp_path / "last.ckpt", network=TinyNet, problem=noisy_problem(1, 9, 11)
    )
    assert torch.equal(whole.restored, model.restored)
    with pytest.raises(ValueError, match="is not this problem's"):
        kind.load_from_checkpoint(
            tmp_path / "last.ckpt", network=TinyNet, problem=noisy_problem(1, 9, 12)
        )


def test_a_resumed_fit_keeps_its_settings(make_trainer, tmp_path):
    trainer = make_trainer(max_steps=2, callbacks=[REDUpdate(smooth)])
    trainer.fit(make(DeepRED))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    longer = make_trainer(max_steps=4, callbacks=[REDUpdate(smooth)])
    with pytest.raises(ValueError, match=r"made with lam=0\.5, got 0\.3"):
        longer.fit(make(DeepRED, lam=0.3), ckpt_path=tmp_path / "last.ckpt")
    out = DeepRED.load_from_checkpoint(tmp_path / "last.ckpt", network=TinyNet, result="out")
    assert torch.equal(out.restored, out.out)  # which image is returned may be chosen later


def test_a_fit_may_start_from_the_network_of_another(make_trainer, tmp_path):
    first = make(DeepImagePrior, problem=noisy_problem(3, 10, 12))
    trainer = make_trainer(max_steps=3)
    trainer.fit(first)
    run = tmp_path / "version_0"
    trainer.save_checkpoint(run / "checkpoints" / "last.ckpt")
    again, larger = (
        make(DeepImagePrior, problem=noisy_problem(3, *size), seed=9, init_from=str(run))
        for size in ((10, 12), (20, 24))
    )
    for model in (again, larger):
        assert model.step == 0
        for ours, theirs in zip(model.parameters(), first.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    assert torch.equal(again.z, first.z)
    assert torch.equal(larger.z[:, :, ::2, ::2], first.z)
    assert torch.equal(larger.z[:, :, 1::2, 1::2], first.z)
    with pytest.raises(ValueError, match="does not match this SkipNet"):
        make(DeepImagePrior, problem=noisy_problem(1, 10, 12), init_from=str(run))
    with pytest.raises(ValueError, match=r"last\.ckpt, found no file"):
        make(DeepImagePrior, init_from=str(tmp_path))
    decoder = DeepImagePrior(network=lambda c: DeepDecoder(c, 8, 1), problem=noisy_problem())
    torch.save({"state_dict": decoder.state_dict()}, tmp_path / "decoder.ckpt")
    with pytest.raises(ValueError, match="DeepDecoder creates its own input"):
        DeepImagePrior(
            network=lambda c: DeepDecoder(c, 8, 1),
            problem=noisy_problem(),
            init_from=str(tmp_path / "decoder.ckpt"),
        )


def test_a_module_can_be_copied_and_pickled():
    model = make(DeepRED)
    model.training_step()
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    loss = model.training_step()
    for twin in twins:
        assert torch.equal(twin.training_step(), loss)
        assert torch.equal(twin.restored, model.restored)


def test_a_compiled_network_is_the_same_network_in_checkpoints_and_copies(monkeypatch):
    captured = []

    def backend(graph, inputs):  # real ones compile for a minute
        captured.append(graph)
        return graph.forward

    compile_with = functools.partialmethod(torch.nn.Module.compile, backend=backend)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_with)
    compiled = DeepImagePrior(network=TinyNet, problem=noisy_problem(), compile=True)
    plain = DeepImagePrior(network=TinyNet, problem=noisy_problem())
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    copied = copy.deepcopy(compiled)
    for model in (compiled, copied, plain):
        model.training_step()
    torch.testing.assert_close(compiled.out, plain.out)
    torch.testing.assert_close(copied.out, plain.out)
    assert captured


def test_an_image_may_leave_the_range_as_far_as_the_limits(make_trainer, tmp_path):
    y = picture(1, 9, 11)
    y[..., 4:7, 5:8] = 3
    update = REDUpdate(lambda x: 1.5 * x, every_n_steps=1)
    for limits in ((0, 1), (0, 4)):
        problem = InverseProblem(y, noise=GaussianNoise(25), limits=limits)
        assert problem.first_guess().max() == min(3, limits[1])
        model = DeepRED(network=TinyNet, lam=5, result="x", problem=problem)
        trainer = make_trainer(max_steps=3, callbacks=[update])
        trainer.fit(model)
        assert model.x.max() == limits[1] == model.restored.max()  # clipped there
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = DeepRED.load_from_checkpoint(tmp_path / "last.ckpt", network=TinyNet)
    assert torch.equal(loaded.restored, model.restored)


def test_a_checkpoint_of_an_earlier_version_has_no_limits():
    model = DeepImagePrior(TinyNet, problem=noisy_problem())
    state = model.state_dict() | {"_extra_state": 7}
    model.load_state_dict(state)
    assert model.step == 7 and model.limits == (0, 1)


@pytest.mark.parametrize("limits", [(0.1, 1), (0, 0.5), (0, math.inf), (math.nan, 1)])
def test_limits_contain_the_unit_range(limits):
    with pytest.raises(ValueError, match="at most 0 and at least 1, got"):
        InverseProblem(picture(), limits=limits)
