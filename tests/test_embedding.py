"""Restorations as a part of something larger, as notebooks/03_embedding.ipynb shows them."""

import functools
import itertools
import re
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from deepred_pl import (
    DeepImagePrior,
    DeepRED,
    InverseProblem,
    REDUpdate,
    RestorationDataModule,
    admm,
    restore,
)
from deepred_pl.callbacks import AutoStop, CollapseGuard, Monitor, RestorationBar, Writer
from deepred_pl.checks import RestorationWarning
from deepred_pl.lightning import (
    Callback,
    LightningDataModule,
    LightningModule,
    Trainer,
    callbacks,
)
from deepred_pl.noise import GaussianNoise
from deepred_pl.operators import Blur, Mask, Operator, gaussian_kernel
from tests.helpers import TinyNet, assert_same_state, noisy_problem, picture, smooth

TRUE_WIDTH = 1.5


class Known(nn.Module):
    """A network that gives the true image, but for an offset that it learns."""

    def __init__(self, channels):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(1))

    def forward(self, z):
        return picture(1, 33, 47) + self.offset


class SemiBlind(LightningModule):
    """Learns the width of a blur beside a restoration."""

    def __init__(self, y=None, width=0.8):
        super().__init__()
        problem = None
        if y is not None:
            problem = InverseProblem(y, Blur.gaussian(9, width, "reflect"), GaussianNoise(1))
        self.restoration = DeepRED(
            network=Known, lam=1e-6, mu=1e-6, input_noise_std=0, result="out", problem=problem
        )
        self.log_width = nn.Parameter(torch.tensor(width).log())

    def training_step(self, batch, batch_idx):
        self.restoration.problem.operator.kernel = gaussian_kernel(9, self.log_width.exp())
        return self.restoration.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)

    def train_dataloader(self):
        return self.restoration.train_dataloader()


def trainer_of(make_trainer, steps):
    update = REDUpdate(smooth, every_n_steps=5, submodule="restoration")
    return make_trainer(max_steps=steps, callbacks=[update])


@pytest.mark.parametrize("start", [0.8, 3.0])
def test_a_parent_learns_the_width_of_a_blur(make_trainer, tmp_path, start):
    y = Blur.gaussian(9, TRUE_WIDTH, "reflect")(picture(1, 33, 47))
    whole, stopped, resumed = (SemiBlind(y, start) for _ in range(3))
    trainer_of(make_trainer, 80).fit(whole)
    assert whole.log_width.exp().item() == pytest.approx(TRUE_WIDTH, rel=0.02)
    assert abs(whole.restoration.network.offset.item()) < 0.01
    half = trainer_of(make_trainer, 40)
    half.fit(stopped)
    half.save_checkpoint(tmp_path / "half.ckpt")
    trainer_of(make_trainer, 80).fit(resumed, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(resumed.log_width, whole.log_width)
    assert torch.equal(resumed.restoration.x, whole.restoration.x)
    alone = SemiBlind.load_from_checkpoint(tmp_path / "half.ckpt")  # without a measurement
    assert torch.equal(alone.log_width, stopped.log_width)
    assert torch.equal(alone.restoration.restored, stopped.restoration.restored)


class Restored(LightningDataModule):
    """Restores pictures before a network learns from them; once."""

    def __init__(self, folder):
        super().__init__()
        self.file, self.fits = folder / "restored.npy", 0

    def prepare_data(self):
        if not self.file.exists():
            self.fits += 1
            tiny = {"trainer.max_steps": 3, "model.network.width": 4, "data.noise.sigma": 4}
            image = (255 * picture(1, 40, 41)[0, 0]).byte().numpy()
            np.save(self.file, restore(image, ["denoising", "methods/quick"], tiny))

    def train_dataloader(self):
        image = torch.from_numpy(np.load(self.file) / 255).float()[None, None]
        return DataLoader(TensorDataset(image))


class Mean(LightningModule):
    """Learns a picture's mean."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.rand(()))

    def training_step(self, batch, batch_idx):
        return (self.mean - batch[0].mean()) ** 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def test_a_datamodule_restores_what_it_feeds_once_and_leaves_the_others_seed(
    make_trainer, tmp_path
):
    data, drawn = Restored(tmp_path), []
    for _ in range(2):
        torch.manual_seed(0)
        model = Mean()
        make_trainer(max_epochs=3).fit(model, datamodule=data)
        drawn.append(torch.rand(1))
    assert data.fits == 1  # the second time it was there
    assert torch.equal(*drawn)
    assert model.mean.item() == pytest.approx(np.load(data.file).mean() / 255, abs=1e-3)


# The program's own settings of torch


def small_restore(image, **settings):
    tiny = {"trainer.max_steps": 3, "model.network.width": 4, "data.noise.sigma": 25}
    return restore(image, ["denoising", "methods/quick"], tiny, **settings)


class Pipeline(LightningModule):
    """Restores what it gets, in any of Lightning's hooks, and learns something else."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.restored = []

    def step(self, batch, batch_idx):
        known = Mask(torch.ones(1, 1, *batch.shape[-2:]))  # made in these settings, too
        operators = (None, known)
        self.restored = [small_restore(batch[0].float(), operator=a) for a in operators]
        return self.weight * self.restored[0].mean()

    training_step = validation_step = predict_step = step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@functools.cache
def restored_outside():
    module = Pipeline()
    module.step(noisy_problem(3, 33, 35).y, 0)
    return module.restored


@pytest.mark.parametrize(
    "hook, settings",
    [
        ("predict", {}),
        ("validate", {"inference_mode": False}),
        ("fit", {"precision": "bf16-mixed"}),
        ("fit", {"precision": "64-true"}),
    ],
)
def test_restore_gives_the_same_in_every_hook(make_trainer, hook, settings):
    image, module, expected = noisy_problem(3, 33, 35).y[0], Pipeline(), restored_outside()
    trainer = make_trainer(max_epochs=1, **settings)
    getattr(trainer, hook)(module, DataLoader([image]))
    assert module.restored is not expected
    assert all(itertools.starmap(torch.equal, zip(module.restored, expected, strict=True)))
    assert torch.get_default_dtype() == torch.float32


def test_a_module_is_the_same_whatever_the_program_has_set(make_trainer):
    def fitted(problem):
        model = DeepRED(network=TinyNet, problem=problem)
        make_trainer(max_steps=5, callbacks=[REDUpdate(smooth, every_n_steps=2)]).fit(model)
        return model

    plain = fitted(noisy_problem())
    for empty in (None, True):
        with make_trainer().init_module(empty_init=empty):
            assert_same_state(fitted(noisy_problem()), plain)
    problem = noisy_problem()
    torch.set_default_dtype(torch.float64)
    try:
        assert_same_state(fitted(problem), plain)
    finally:
        torch.set_default_dtype(torch.float32)


def test_modules_made_in_threads_are_those_of_their_seeds():
    def made(i):
        return DeepRED(network=TinyNet, problem=noisy_problem(), seed=i % 3)

    torch.manual_seed(0)
    expected = torch.rand(3)
    alone = [made(i) for i in range(3)]
    torch.manual_seed(0)
    with ThreadPoolExecutor(4) as threads:
        for i, model in enumerate(threads.map(made, range(24))):
            assert_same_state(model, alone[i % 3])
    assert torch.equal(torch.rand(3), expected)  # the process's own generator has not moved


# Gradients


class Temporal(LightningModule):
    """Two frames and a loss on both, which a parent computes from their images."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight
        self.frames = nn.ModuleList(
            DeepRED(network=TinyNet, seed=i, problem=noisy_problem()) for i in range(2)
        )

    def training_step(self, batch, batch_idx):
        (one, first), (two, second) = (frame.theta_step() for frame in self.frames)
        return one + two + self.weight * (first - second).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def train_dataloader(self):
        return self.frames[0].train_dataloader()


def test_a_parents_loss_on_the_images_moves_the_networks(make_trainer):
    apart = []
    for weight in (0.0, 100.0):
        parent = Temporal(weight)
        updates = [REDUpdate(smooth, every_n_steps=5, submodule=f"frames.{i}") for i in range(2)]
        make_trainer(max_steps=20, callbacks=updates).fit(parent)
        first, second = (frame.out for frame in parent.frames)
        apart.append((first - second).square().mean().item())
    assert apart[1] < 0.5 * apart[0]


class Gain(Operator):
    """A brightness that is learned."""

    def __init__(self):
        super().__init__()
        self.brightness = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.brightness * x

    def image_shape(self, shape):
        return shape


class AdaptedGain(nn.Module):
    def __init__(self):
        super().__init__()
        self.brightness = nn.Parameter(torch.tensor(1.0))

    def A(self, x):
        return self.brightness * x

    A_adjoint = A


@pytest.mark.parametrize(
    "operator, said", [(Gain, "no optimizer has them"), (AdaptedGain, "derive it from Operator")]
)
def test_what_will_not_be_learned_is_named(make_trainer, operator, said):
    problem = InverseProblem(noisy_problem().y, operator(), GaussianNoise(25))
    model = DeepRED(network=TinyNet, problem=problem)
    update = REDUpdate(smooth, every_n_steps=2)
    with pytest.warns(RestorationWarning, match=rf"brightness will stay .*{said}"):
        make_trainer(max_steps=1, callbacks=[update]).fit(model)


def test_a_gain_that_a_parent_learns_is_not_named_and_moves(make_trainer, recwarn):
    parent = SemiBlind()
    parent.restoration.build(InverseProblem(0.5 * picture(1, 33, 47), Gain(), GaussianNoise(1)))
    parent.training_step = parent.restoration.training_step
    trainer_of(make_trainer, 40).fit(parent)
    assert parent.restoration.problem.operator.brightness < 0.9
    assert not [w for w in recwarn if "will stay" in str(w.message)]


# The rules of a restoration, also inside a parent


class Plain(LightningModule):
    """A parent of one restoration."""

    def __init__(self, kind=DeepRED, **settings):
        super().__init__()
        self.restoration = kind(**{"network": TinyNet, "problem": noisy_problem(), **settings})

    def training_step(self, batch, batch_idx):
        return self.restoration.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def train_dataloader(self):
        return self.restoration.train_dataloader()


def test_other_settings_are_refused_where_a_child_is_resumed(make_trainer, tmp_path):
    trainer = trainer_of(make_trainer, 4)
    trainer.fit(Plain(lam=0.4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"made with lam=0\.4, got 2\.0; resume with the same"):
        trainer_of(make_trainer, 8).fit(Plain(lam=2.0), ckpt_path=tmp_path / "last.ckpt")
    unbuilt = Plain(lam=2.0, problem=None)
    unbuilt.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    with pytest.raises(ValueError, match=r"made with lam=0\.4"):
        unbuilt.restoration.build(noisy_problem())


def test_epochs_end_a_parents_fit_where_they_end(make_trainer):
    parent = Plain()
    update = REDUpdate(smooth, every_n_steps=5, submodule="restoration")
    make_trainer(max_epochs=3, log_every_n_steps=4, callbacks=[update]).fit(parent)
    assert parent.restoration.step == 12
    parent.train_dataloader = lambda: itertools.repeat(0)
    with pytest.raises(ValueError, match=r"max_epochs=2 never ends a fit .* set max_steps"):
        make_trainer(max_epochs=2, callbacks=[update]).fit(parent)


@pytest.mark.parametrize("kind", [DeepRED, DeepImagePrior])
def test_a_child_without_a_problem_gets_the_datamodules_or_says_how(make_trainer, kind):
    def trainer():
        watch = [Monitor("restoration")]
        update = [REDUpdate(smooth, every_n_steps=2, submodule="restoration")] * (kind is DeepRED)
        return make_trainer(max_steps=4, callbacks=watch + update)

    parent, data = Plain(kind, problem=None), RestorationDataModule()
    data.problem = noisy_problem()
    trainer().fit(parent, datamodule=data)
    alone = Plain(kind)
    trainer().fit(alone)
    assert_same_state(parent, alone)
    empty = Plain(kind, problem=None)
    empty.configure_optimizers = lambda: torch.optim.Adam([nn.Parameter(torch.ones(1))])
    with pytest.raises(RuntimeError, match=r"has no measurement to fit; .* call build\(problem\)"):
        trainer().fit(empty)


@pytest.mark.parametrize("kind", [Plain, DeepRED])
def test_an_optimizer_of_many_evaluations_is_refused(make_trainer, kind):
    made = Plain() if kind is Plain else DeepRED(network=TinyNet, problem=noisy_problem())
    made.configure_optimizers = lambda: torch.optim.LBFGS(made.parameters())
    update = REDUpdate(smooth, submodule="restoration" if kind is Plain else "")
    with pytest.raises(ValueError, match="LBFGS evaluates the loss many times per step"):
        make_trainer(max_steps=4, callbacks=[update]).fit(made)


@pytest.mark.parametrize("kind", [DeepRED, DeepImagePrior])
def test_averaged_weights_are_refused_for_a_child_too(make_trainer, kind):
    averaging = callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    watch = [Monitor("restoration"), averaging]  # without a REDUpdate
    with pytest.raises(ValueError, match="StochasticWeightAveraging averages weights"):
        make_trainer(max_steps=2, callbacks=watch).fit(Plain(kind))


def test_a_network_that_no_optimizer_has_is_named(make_trainer):
    parent = Plain()
    parent.head = nn.Linear(1, 1)
    parent.configure_optimizers = lambda: torch.optim.Adam(parent.head.parameters())
    update = REDUpdate(smooth, every_n_steps=2, submodule="restoration")
    with pytest.warns(RestorationWarning, match="No optimizer has the parameters of the resto"):
        make_trainer(max_steps=1, callbacks=[update]).fit(parent)


def test_a_writer_says_that_it_writes_nothing_for_a_child(make_trainer, tmp_path):
    update = REDUpdate(smooth, every_n_steps=2, submodule="restoration")
    with pytest.warns(RestorationWarning, match="nothing for one inside Plain"):
        make_trainer(max_steps=1, callbacks=[update, Writer()]).fit(Plain())
    assert not list(tmp_path.iterdir())


def test_several_devices_are_refused_for_a_child_too():  # without starting their processes
    parent = Plain()
    update = REDUpdate(smooth, submodule="restoration")
    trainer = Trainer(accelerator="cpu", devices=2, max_steps=1, logger=False, callbacks=[update])
    with pytest.raises(ValueError, match=r"one image uses one device: .* got 2"):
        update.on_fit_start(trainer, parent)


def test_a_warning_is_given_if_the_denoiser_is_being_trained(make_trainer):
    parent = Plain()
    parent.denoiser = nn.Conv2d(3, 3, 3, padding=1)
    update = REDUpdate(parent.denoiser, every_n_steps=2, submodule="restoration")
    with pytest.warns(RestorationWarning, match="depends on timing; give REDUpdate a copy"):
        make_trainer(max_steps=1, callbacks=[update]).fit(parent)


# Many restorations


def test_a_restoration_that_its_parent_replaces_is_followed(make_trainer):
    """As a video's frames one after the other: each is fitted as it would be alone."""

    def parts(name):
        guard, update = CollapseGuard(submodule=name), REDUpdate(smooth, 2, submodule=name)
        return [guard, update, Monitor(name), AutoStop(window=10, patience=100, submodule=name)]

    class Frames(Plain):
        def on_train_epoch_start(self):
            if self.current_epoch > 0:
                finished.append(self.restoration)
                self.restoration = DeepRED(network=TinyNet, problem=noisy_problem(1), seed=1)
                self.trainer.strategy.setup_optimizers(self.trainer)

    finished, parent = [], Frames()
    trainer = make_trainer(max_steps=26, log_every_n_steps=13, callbacks=parts("restoration"))
    trainer.fit(parent)
    finished.append(parent.restoration)
    for restoration, channels in zip(finished, (3, 1), strict=True):
        alone = Plain(problem=noisy_problem(channels), seed=restoration.seed)
        make_trainer(max_steps=13, callbacks=parts("restoration")).fit(alone)
        for name in ("x", "u", "out", "average", "chosen"):
            first, second = (getattr(m, name) for m in (restoration, alone.restoration))
            assert torch.equal(first, second), name


def test_restorations_that_share_a_denoiser_take_turns(make_trainer):
    class Stateful:
        """A denoiser with a work array."""

        def __init__(self):
            self.work, self.inside, self.most = torch.empty(1, 3, 9, 11), 0, 0

        def __call__(self, x):
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.work.copy_(x)
            time.sleep(0.001)  # lets others run
            self.inside -= 1
            return smooth(self.work).clone()

        def method(self, x):
            return self(x)

    def fitted(*denoisers):
        parent = Temporal(0.0)
        names = [f"frames.{i}" for i in range(2)]
        updates = [REDUpdate(d, 2, submodule=n) for d, n in zip(denoisers, names, strict=True)]
        make_trainer(max_steps=20, callbacks=updates).fit(parent)
        return parent

    shared, apart = Stateful(), fitted(Stateful(), Stateful())
    assert_same_state(fitted(shared, shared), apart)
    assert_same_state(fitted(shared.method, shared.method), apart)  # two objects of one
    assert shared.most == 1


def test_the_fit_stops_once_all_have_stopped(make_trainer):
    parent, steps = Temporal(0.0), []
    stops = [
        AutoStop(window=10, patience=patience, submodule=f"frames.{i}")
        for i, patience in enumerate((2, 30))
    ]
    updates = [REDUpdate(smooth, every_n_steps=5, submodule=f"frames.{i}") for i in range(2)]

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, *batch):
            if stops[0].stopped:
                steps.append(module.frames[0].chosen)

    trainer = make_trainer(max_steps=200, callbacks=[*updates, *stops, Watch()])
    trainer.fit(parent)
    assert all(stop.stopped for stop in stops) and trainer.global_step < 200
    assert len(steps) > 20 and all(image is steps[0] for image in steps)


def test_the_bar_shows_a_childs_numbers(make_trainer, capsys):
    parent = Temporal(0.0)
    watch = [Monitor("frames.0"), Monitor("frames.1"), RestorationBar()]
    updates = [REDUpdate(smooth, every_n_steps=5, submodule=f"frames.{i}") for i in range(2)]
    settings = {"max_steps": 20, "log_every_n_steps": 10, "enable_progress_bar": True}
    make_trainer(callbacks=updates + watch, **settings).fit(parent)
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 2
    assert re.fullmatch(
        r"step 20 of 20: PSNR average [\d.]+, [\d.]+ dB  gap [\d.]+, [\d.]+", shown[1]
    )


def test_mixed_changes_at_half_of_the_models_steps(make_trainer):
    """A parent with two optimizers of its own takes two of Lightning's steps for a θ-step."""

    class Adversarial(Plain):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.critic = nn.Conv2d(3, 1, 3)

        def training_step(self, batch, batch_idx):
            ours, critics = self.optimizers()
            loss, out = self.restoration.theta_step()
            for optimizer, value in ((ours, loss), (critics, self.critic(out.detach()).mean())):
                optimizer.zero_grad()
                self.manual_backward(value)
                optimizer.step()
            kinds.append(update._x_update(self.restoration.step, self.trainer, (0, 1)).func)

        def configure_optimizers(self):
            parts = self.restoration, self.critic
            return [torch.optim.SGD(part.parameters(), lr=0.001) for part in parts]

    update = REDUpdate(smooth, 2, x_update="mixed", submodule="restoration")
    kinds = []
    make_trainer(max_steps=16, callbacks=[update]).fit(Adversarial())
    assert kinds == [admm.fixed_point] * 4 + [admm.gradient_step] * 4


# Callbacks of an earlier fit, and modules that come late


@pytest.mark.parametrize("resumes", [False, True])
def test_callbacks_of_a_fit_that_failed_serve_another(make_trainer, tmp_path, resumes):
    """A bug in the user's code, then the same callbacks again."""

    class Bug(Callback):
        def on_train_batch_end(self, trainer, module, *batch):
            if trainer.global_step == 15:
                trainer.save_checkpoint(tmp_path / "last.ckpt")
                raise KeyError("of the user's")

    parts = [REDUpdate(smooth, every_n_steps=2), AutoStop(window=10, patience=1000)]
    model = DeepRED(network=TinyNet, problem=noisy_problem())
    with pytest.raises(KeyError):
        make_trainer(max_steps=40, callbacks=[*parts, Bug()]).fit(model)
    if resumes:
        model = DeepRED(network=TinyNet, problem=noisy_problem())
    path = tmp_path / "last.ckpt" if resumes else None
    make_trainer(max_steps=25, callbacks=parts).fit(model, ckpt_path=path)
    assert model.step == (25 if resumes else 40)
    if resumes:  # as without a stop
        whole = DeepRED(network=TinyNet, problem=noisy_problem())
        again = [REDUpdate(smooth, every_n_steps=2), AutoStop(window=10, patience=1000)]
        make_trainer(max_steps=25, callbacks=again).fit(whole)
        assert_same_state(model, whole)
        assert parts[1].state_dict()["best_step"] == again[1].state_dict()["best_step"]


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_a_parent_may_create_its_restoration_in_a_hook(make_trainer, hook):
    class Late(Plain):
        def __init__(self):
            LightningModule.__init__(self)

        def create(self, stage=None):
            if not hasattr(self, "restoration"):
                self.restoration = DeepRED(network=TinyNet, problem=noisy_problem())

    late, update = Late(), REDUpdate(smooth, every_n_steps=2, submodule="restoration")
    setattr(late, hook, late.create)
    make_trainer(max_steps=3, callbacks=[update]).fit(late)
    assert late.restoration.step == 3


def test_a_misspelled_name_is_refused_for_a_restoration_that_is_trained_itself(make_trainer):
    model = DeepRED(network=TinyNet, problem=noisy_problem())
    with pytest.raises(ValueError, match=r"at submodule='resto' of DeepRED, which has them at"):
        make_trainer(max_steps=2, callbacks=[REDUpdate(smooth, submodule="resto")]).fit(model)


def test_one_that_stops_does_not_undo_what_others_want(make_trainer):
    """Another callback ends the fit at the step at which one of two has found its image."""

    class End(Callback):
        step = None

        def on_train_batch_end(self, trainer, module, *batch):
            trainer.should_stop = trainer.should_stop or trainer.global_step == self.step

    def fit(end):
        names = ["frames.0", "frames.1"]
        first, second = (
            AutoStop("variance", 10, p, n) for p, n in zip((2, 999), names, strict=True)
        )
        updates = [REDUpdate(smooth, every_n_steps=5, submodule=name) for name in names]
        trainer = make_trainer(max_steps=100, callbacks=[*updates, end, first, second])
        trainer.fit(Temporal(0.0))
        assert first.stopped and not second.stopped
        return trainer.global_step, first.best_step

    end = End()
    steps, best = fit(end)
    end.step = best + 2  # when its patience is over
    assert steps == 100 and fit(end)[0] == end.step


def test_a_module_that_has_stopped_keeps_its_image_where_a_fit_is_resumed(make_trainer, tmp_path):
    def parts():
        stops = [
            AutoStop(window=10, patience=p, submodule=f"frames.{i}") for i, p in enumerate((2, 99))
        ]
        updates = [REDUpdate(smooth, every_n_steps=5, submodule=f"frames.{i}") for i in range(2)]
        return [*stops, *updates]

    stopped, resumed, first = Temporal(0.0), Temporal(0.0), parts()
    trainer = make_trainer(max_steps=40, callbacks=first)
    trainer.fit(stopped)
    assert [stop.stopped for stop in first[:2]] == [True, False]
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    second = parts()
    make_trainer(max_steps=60, callbacks=second).fit(resumed, ckpt_path=tmp_path / "last.ckpt")
    assert second[0].stopped
    assert torch.equal(resumed.frames[0].chosen, stopped.frames[0].chosen)


def test_restore_in_threads_is_the_same_also_with_another_default_type():
    images = [noisy_problem(3, 33, 35).y[0], noisy_problem(1, 33, 35).y[0]]
    expected = [small_restore(image) for image in images]
    torch.set_default_dtype(torch.float64)
    try:
        with ThreadPoolExecutor(2) as threads:
            restored = list(threads.map(small_restore, images))
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(itertools.starmap(torch.equal, zip(restored, expected, strict=True)))


def test_one_that_ended_a_fit_looks_on_where_it_is_resumed_with_more_patience(
    make_trainer, tmp_path
):
    def fit(patience, ckpt_path=None):
        model = DeepRED(network=TinyNet, problem=noisy_problem())
        stop = AutoStop(window=10, patience=patience)
        trainer = make_trainer(max_steps=100, callbacks=[REDUpdate(smooth, 5), stop])
        trainer.fit(model, ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return model.step, stop.stopped, stop.state_dict()["blocks"]

    ended, stopped, _ = fit(2)
    assert stopped and ended < 60
    longer, _, blocks = fit(30, tmp_path / "last.ckpt")
    whole, _, expected = fit(30)
    assert longer == whole > ended
    assert all(torch.equal(a["mean"], b["mean"]) for a, b in zip(blocks, expected, strict=True))
