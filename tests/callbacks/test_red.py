"""REDUpdate in real fits, against a transcription that knows nothing of this package."""

import itertools
import threading
import time
import types

import numpy as np
import pytest
import torch
from torch import nn

from deepred_pl import DeepImagePrior, DeepRED, InverseProblem, REDUpdate, RestorationDataModule
from deepred_pl.denoisers import Denoiser, NonLocalMeans
from deepred_pl.lightning import Callback, LightningModule
from deepred_pl.noise import GaussianNoise
from deepred_pl.operators import Operator
from tests.helpers import TinyNet, assert_same_state, noisy_problem, picture, smooth

# The transcription


def smooth_numpy(x):
    return 0.9 * (0.5 * x + 0.25 * np.roll(x, 1, -1) + 0.25 * np.roll(x, -1, -1))


def transcribe(
    outs, y, k, rounds, kind, inner, c=0.5, lam=0.5, mu=0.4, rise=0.0, threshold=0.0, total=0
):
    """x, u, f(x), λ and μ after every step, from the networks' outputs (DESIGN: the order)."""

    def x_update(x, f_x, v, step, lam, mu):
        gradient = kind == "gradient" or (kind == "mixed" and step > total / 2)
        if gradient:
            new = x - c / (lam + mu) * (lam * (x - f_x) + mu * (x - v))
        else:
            new = (lam * f_x + mu * v) / (lam + mu)
        return np.clip(new, 0, 1)

    def denoise(job):
        x, v, lam, mu, step = job
        f_x = smooth_numpy(x)
        for _ in range(inner - 1):
            x = x_update(x, f_x, v, step, lam, mu)
            f_x = smooth_numpy(x)
        return x, f_x

    x, u, f_x = y.copy(), np.zeros_like(y), y.copy()
    job = (x, y, lam, mu, 0)  # job 1: f(x₀)
    states = []
    for step, out in enumerate(outs, start=1):
        if step % k == 0:
            start = x
            begun = job
            if step % (k * rounds) == 0:
                inner_x, f_x = denoise(job)
                if rounds > 1:
                    job = (x, out + u, lam, mu, step)  # submitted before the update
                else:
                    start = inner_x
            if kind == "pnp":  # f of the v that the round began with, and u from the same v
                _, v, *_ = begun
                x = np.clip(smooth_numpy(v), 0, 1)
                f_x, u = x, v - x
            else:
                x = x_update(start, f_x, out + u, step, lam, mu)
                u = u + out - x
            psnr = -10 * np.log10(((out - y) ** 2).mean())
            if rise and psnr > threshold:
                lam, mu, threshold = lam + rise, mu + rise, threshold + 0.01
            if rounds == 1:
                job = (x, out + u, lam, mu, step)  # submitted after it
        states.append((x, u, f_x, lam, mu))
    return states


class Recorder(Callback):
    """Keeps what every step ended with; listed behind REDUpdate."""

    def __init__(self):
        self.outs, self.states = [], []

    def on_train_batch_end(self, trainer, model, *args):
        self.outs.append(model.out.double().numpy().copy())
        state = (model.x, model.u, model.f_x, model.lam, model.mu)
        self.states.append([t.double().numpy().copy() for t in state])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["fixed_point", "gradient", "mixed"])
@pytest.mark.parametrize(("k", "rounds"), [(3, 1), (1, 4), (2, 3), (1, 1)])
@pytest.mark.parametrize("inner", [1, 2])
def test_a_fit_equals_the_transcription(make_trainer, channels, kind, k, rounds, inner):
    problem = noisy_problem(channels)
    settings = {"lam": 0.5, "mu": 0.4, "weighting": "rise", "rise_step": 0.1, "rise_start": 10.0}
    model = DeepRED(network=TinyNet, problem=problem, **settings)
    update = REDUpdate(smooth, k, rounds, kind, step_size=0.7, inner_iterations=inner)
    recorder = Recorder()
    make_trainer(max_steps=23, callbacks=[update, recorder]).fit(model)
    y = problem.y.double().numpy()
    want = transcribe(
        recorder.outs, y, k, rounds, kind, inner, c=0.7, rise=0.1, threshold=10.0, total=23
    )
    for got_state, want_state in zip(recorder.states, want, strict=True):
        for got, expected in zip(got_state, want_state, strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-5)
    assert recorder.states[-1][3] > 0.5  # the rise did happen


@pytest.mark.parametrize("k", [1, 4])
def test_plug_and_play_equals_the_transcription(make_trainer, k):
    problem = noisy_problem(3)
    model = DeepRED(network=TinyNet, problem=problem, lam=0.5, mu=0.4)
    recorder = Recorder()
    make_trainer(max_steps=23, callbacks=[REDUpdate(smooth, k, x_update="pnp"), recorder]).fit(
        model
    )
    want = transcribe(recorder.outs, problem.y.double().numpy(), k, 1, "pnp", 1)
    for (x, u, *_), (want_x, want_u, *_) in zip(recorder.states, want, strict=True):
        np.testing.assert_allclose(x, want_x, atol=1e-5)
        np.testing.assert_allclose(u, want_u, atol=1e-5)


# The schedule


def test_the_denoiser_has_the_whole_round_and_is_never_joined_where_it_was_submitted(
    make_trainer, monkeypatch
):
    from deepred_pl.callbacks import red

    events = []

    class Recording(red.Background):
        def submit(self, label, *args):
            events.append("submit")
            super().submit(label, *args)

        def result(self, *args):
            events.append("join")
            return super().result(*args)

    class Steps(Callback):
        def on_train_batch_start(self, *args):
            events.append("hooks end")

        def on_before_zero_grad(self, *args):
            events.append("step")

    monkeypatch.setattr(red, "Background", Recording)
    k = 4
    update = REDUpdate(NonLocalMeans(10), every_n_steps=k)
    model = DeepRED(network=TinyNet, problem=noisy_problem())
    make_trainer(max_steps=3 * k + 2, callbacks=[update, Steps()]).fit(model)
    assert events[0] == "submit"
    assert events.count("join") == 3
    for at in (i for i, event in enumerate(events) if event == "join"):
        since = events[max(i for i in range(at) if events[i] == "submit") : at]
        assert since.count("step") >= k - 1
        assert "hooks end" in since  # not in the hook that submitted


def test_the_denoiser_works_on_one_background_thread(make_trainer):
    threads = set()

    def spying(x):
        threads.add(threading.current_thread())
        return smooth(x)

    model = DeepRED(network=TinyNet, problem=noisy_problem())
    make_trainer(max_steps=9, callbacks=[REDUpdate(spying, every_n_steps=2)]).fit(model)
    assert len(threads) == 1
    assert threading.main_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)


def test_the_result_does_not_depend_on_the_denoisers_speed(make_trainer):
    def slow(x):
        while not update.waiting:
            time.sleep(0.001)
        return smooth(x)

    models = []
    for denoiser in (smooth, slow):
        model = DeepRED(network=TinyNet, problem=noisy_problem())
        update = REDUpdate(denoiser, every_n_steps=2)
        make_trainer(max_steps=9, callbacks=[update]).fit(model)
        models.append(model)
    assert_same_state(*models)


def test_a_denoiser_may_write_into_its_input(make_trainer):
    def in_place(x):
        return x.mul_(0.5)

    models = []
    for denoiser in (in_place, lambda x: x * 0.5):
        model = DeepRED(network=TinyNet, problem=noisy_problem())
        make_trainer(max_steps=9, callbacks=[REDUpdate(denoiser, every_n_steps=2)]).fit(model)
        models.append(model)
    assert_same_state(*models)


def test_the_ground_truth_reaches_the_metrics_and_nothing_else(make_trainer, tmp_path):
    np.save(tmp_path / "truth.npy", picture(3, 9, 11)[0].movedim(0, -1).numpy())
    simulated = RestorationDataModule(tmp_path / "truth.npy", noise=GaussianNoise(25))
    simulated.setup()
    np.save(tmp_path / "y.npy", simulated.problem.y[0].movedim(0, -1).numpy())
    measured = RestorationDataModule(measurement=tmp_path / "y.npy", noise=GaussianNoise(25))
    models = []
    for data in (simulated, measured):
        model = DeepRED(network=TinyNet, weighting="rise")
        trainer = make_trainer(max_steps=9, callbacks=[REDUpdate(smooth, every_n_steps=2)])
        trainer.fit(model, data)
        models.append(model)
    assert_same_state(*models)
    assert measured.problem.ground_truth is None


# Bad input


@pytest.mark.parametrize(
    "wrong",
    [
        {"every_n_steps": 0},
        {"rounds_per_denoising": 0},
        {"inner_iterations": 0},
        {"x_update": "pnp", "inner_iterations": 2},
        {"x_update": "pnp", "rounds_per_denoising": 10},
        {"step_size": 0},
        {"step_size": 2},
        {"x_update": "newton"},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        REDUpdate(smooth, **wrong)


def test_a_denoiser_must_be_callable():
    for wrong in ("BM3D", NonLocalMeans):  # a name, and a class
        with pytest.raises(ValueError, match="denoiser must be an object of"):
            REDUpdate(wrong)


def test_mixed_needs_the_length_of_the_fit(make_trainer):
    update = REDUpdate(smooth, x_update="mixed")
    model = DeepRED(network=TinyNet, problem=noisy_problem())
    with pytest.raises(ValueError, match="max_steps"):
        make_trainer(max_steps=-1, max_time={"seconds": 1}, callbacks=[update]).fit(model)


def test_a_job_that_no_round_would_collect_is_not_started(make_trainer):
    calls = []

    def counting(x):
        calls.append(x)
        return smooth(x)

    model = DeepRED(network=TinyNet, problem=noisy_problem())
    make_trainer(max_steps=9, callbacks=[REDUpdate(counting, every_n_steps=2)]).fit(model)
    assert len(calls) == 4  # collected at steps 2, 4, 6 and 8


def test_a_fit_that_ends_early_waits_for_its_denoiser(make_trainer):
    ended = threading.Event()

    def slow(x):
        time.sleep(0.2)
        ended.set()
        return smooth(x)

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = True

    model = DeepRED(network=TinyNet, problem=noisy_problem())
    make_trainer(max_steps=99, callbacks=[REDUpdate(slow), Stop()]).fit(model)
    assert model.step == 1
    assert ended.is_set()


def test_a_denoiser_may_use_its_memory_again(make_trainer):
    memory = torch.empty(1, 3, 9, 11)

    @torch.inference_mode()
    def economical(x):
        return memory.copy_(0.5 * x)

    models = []
    for denoiser in (economical, lambda x: x * 0.5):
        model = DeepRED(network=TinyNet, problem=noisy_problem())
        update = REDUpdate(denoiser, every_n_steps=2, rounds_per_denoising=2)
        make_trainer(max_steps=9, callbacks=[update]).fit(model)
        models.append(model)
        model.load_state_dict(model.state_dict())
    assert_same_state(*models)


def test_no_round_is_lost_where_a_batch_makes_several_steps(make_trainer):
    class Twice(Parent):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + super().training_step(batch, batch_idx)

    parent = Twice()
    assert rounds_of_single(make_trainer, parent, 3, steps=6) == 4  # at steps 4, 6, 10 and 12
    assert parent.single.step == 12


def test_a_plain_deep_image_prior_is_left_alone(make_trainer):
    def is_not_asked(x):
        raise AssertionError

    models = []
    for callbacks in ([], [REDUpdate(is_not_asked)]):
        model = DeepImagePrior(network=TinyNet, problem=noisy_problem())
        make_trainer(max_steps=12, callbacks=callbacks).fit(model)
        models.append(model)
    assert_same_state(*models)


# Inside another module


class Parent(LightningModule):
    """Restores two images at once, and learns a number of its own beside them."""

    def __init__(self):
        super().__init__()
        self.restorations = nn.ModuleList(
            DeepRED(network=TinyNet, problem=noisy_problem(c, 9 + c, 11), seed=c) for c in (1, 3)
        )
        self.single = DeepRED(network=TinyNet, problem=noisy_problem(1, 5, 7), seed=2)
        self.offset = nn.Parameter(torch.tensor(0.3))

    def children_(self):
        return [*self.restorations, self.single]

    def training_step(self, batch, batch_idx):
        losses = [child.training_step(batch, batch_idx) for child in self.children_()]
        return sum(losses) + (self.offset - self.single.out.mean()) ** 2

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def train_dataloader(self):
        return self.single.train_dataloader()


def parent_callbacks():
    names = ("restorations.0", "restorations.1", "single")
    return [
        REDUpdate(smooth, every_n_steps=k, submodule=n)
        for k, n in zip((2, 3, 5), names, strict=False)
    ]


def rounds_of_single(make_trainer, parent, every_n_steps, steps):
    """How often u of the parent's `single` changes in a fit."""
    us = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            us.append(module.single.u.clone())

    update = REDUpdate(smooth, every_n_steps, submodule="single")
    callbacks = [*parent_callbacks()[:2], update, Watch()]
    make_trainer(max_steps=steps, callbacks=callbacks).fit(parent)
    return sum(not torch.equal(a, b) for a, b in itertools.pairwise(us))


def test_children_of_another_module_are_driven_saved_and_resumed(make_trainer, tmp_path):
    whole, first, second = Parent(), Parent(), Parent()
    make_trainer(max_steps=17, callbacks=parent_callbacks()).fit(whole)
    trainer = make_trainer(max_steps=8, callbacks=parent_callbacks())
    trainer.fit(first)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    keys = [callback.state_key for callback in parent_callbacks()]
    assert len(set(keys)) == 3 and "restorations.1" in keys[1]
    make_trainer(max_steps=17, callbacks=parent_callbacks()).fit(
        second, ckpt_path=tmp_path / "last.ckpt"
    )
    assert_same_state(whole, second)
    for child in whole.children_():
        assert child.step == 17
        assert not torch.equal(child.x, child.problem.y)  # x was updated
        assert child.restored.shape == child.problem.image_shape


def test_a_child_restores_as_if_it_were_alone(make_trainer):
    class Wrapper(LightningModule):
        def __init__(self):
            super().__init__()
            self.restoration = DeepRED(network=TinyNet, problem=noisy_problem())
            self.configure_optimizers = self.restoration.configure_optimizers
            self.train_dataloader = self.restoration.train_dataloader

        def training_step(self, batch, batch_idx):
            return self.restoration.training_step(batch, batch_idx)

    alone = DeepRED(network=TinyNet, problem=noisy_problem())
    make_trainer(max_steps=9, callbacks=[REDUpdate(smooth, every_n_steps=2)]).fit(alone)
    parent = Wrapper()
    update = REDUpdate(smooth, every_n_steps=2, submodule="restoration")
    make_trainer(max_steps=9, callbacks=[update]).fit(parent)
    assert_same_state(alone, parent.restoration)


def test_rounds_are_not_repeated_while_a_parent_trains_something_else(make_trainer):
    class Alternating(Parent):
        def training_step(self, batch, batch_idx):
            if batch_idx % 2:
                return (self.offset - 1) ** 2
            return super().training_step(batch, batch_idx)

    # At its steps 2 and 4, not the parent's four.
    assert rounds_of_single(make_trainer, Alternating(), 2, steps=8) == 2


@pytest.mark.parametrize("submodule", ["", "restoration", "offset"])
def test_a_wrong_submodule_is_refused_and_the_right_ones_are_named(make_trainer, submodule):
    update = REDUpdate(smooth, submodule=submodule)
    with pytest.raises(ValueError, match=r"restorations\.0', 'restorations\.1', 'single"):
        make_trainer(max_steps=1, callbacks=[update]).fit(Parent())


def test_without_a_red_update_a_child_says_so(make_trainer):
    with pytest.raises(RuntimeError, match="submodule='name'"):
        make_trainer(max_steps=1).fit(Parent())


def test_an_inverse_problem_with_another_operator_drives_the_same_updates(make_trainer):
    class Half(Operator):
        """Keeps half the light: A = 0.5 I."""

        def forward(self, x):
            return 0.5 * x

        def image_shape(self, measurement_shape):
            return measurement_shape

        def first_guess(self, y):
            return 2 * y

    problem = InverseProblem(0.5 * picture(1, 9, 11), operator=Half())
    model = DeepRED(network=TinyNet, problem=problem, result="x-u")
    make_trainer(max_steps=60, callbacks=[REDUpdate(smooth, every_n_steps=5)]).fit(model)
    torch.testing.assert_close(model.out.mean(), picture(1, 9, 11).mean(), atol=0.1, rtol=0)


def test_a_denoiser_is_checked_with_images_where_the_fit_will_have_them():
    class Looks(Denoiser):
        def check(self, x):
            seen.append(x.device.type)

        def __call__(self, x):
            return x

    seen = []
    model = DeepRED(network=TinyNet, problem=noisy_problem())
    strategy = types.SimpleNamespace(root_device=torch.device("meta"))
    REDUpdate(Looks()).check(model, types.SimpleNamespace(strategy=strategy, callbacks=[]))
    assert seen == ["meta"]


@pytest.mark.parametrize(
    ("x_update", "sigma", "warned"),
    [("pnp", 10, True), ("pnp", 20, False), ("pnp", 40, True), ("fixed_point", 3, False)],
)
def test_plug_and_play_warns_of_another_noise_level(make_trainer, recwarn, x_update, sigma, warned):
    update = REDUpdate(NonLocalMeans(sigma), x_update=x_update)
    model = DeepRED(network=TinyNet, problem=noisy_problem())  # σ = 25
    make_trainer(max_steps=1, callbacks=[update]).fit(model)
    said = f"assumes a sigma of {sigma}, but that of the noise is 25"
    assert any(said in str(w.message) for w in recwarn) == warned
