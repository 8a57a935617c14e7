"""What Lightning's Trainer offers: it works with one image, or is refused with the reason."""

import copy
import csv
import itertools
import pickle
import threading
from functools import partial

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from deepred_pl import DeepImagePrior, DeepRED, REDUpdate, admm
from deepred_pl.callbacks import LastCheckpoint, Monitor, Panels, Writer
from deepred_pl.lightning import (
    Callback,
    LightningModule,
    Trainer,
    callbacks,
    loggers,
)
from deepred_pl.optim import WarmupCosine
from tests.helpers import TinyNet, assert_same_state, noisy_problem, smooth

EMA = getattr(callbacks, "EMAWeightAveraging", None)  # new in Lightning 2.6


def made(kind=DeepRED, **settings):
    return kind(**{"network": TinyNet, "problem": noisy_problem(), **settings})


def update(**settings):
    return REDUpdate(smooth, every_n_steps=2, **settings)


def fit(make_trainer, model, *others, steps=6, **settings):
    trainer = make_trainer(max_steps=steps, callbacks=[update(), *others], **settings)
    trainer.fit(model)
    return trainer


# Works


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_precisions_round_the_network_and_nothing_else(make_trainer, precision):
    model, exact = made(), made()
    fit(make_trainer, exact)
    fit(make_trainer, model, precision=precision)
    floats = [b.dtype for b in model.buffers() if b.is_floating_point()]
    assert floats and set(floats) == {torch.float32}
    assert model.restored.isfinite().all()
    assert torch.equal(model.out, exact.out) == (precision == "32-true")
    # Of the first step, before any update: Adam follows the signs of gradients, however small.
    model, exact = made(), made()
    fit(make_trainer, exact, steps=1)
    fit(make_trainer, model, steps=1, precision=precision)
    assert (model.out - exact.out).abs().mean() < 0.003


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped(make_trainer, algorithm):
    norms = []

    class Norm(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):  # before the clipping
            norms.append(max(p.grad.abs().max() for p in module.parameters()))

    model, clipped = made(), made()
    fit(make_trainer, model, Norm())
    assert max(norms) > 1e-4
    fit(
        make_trainer,
        clipped,
        gradient_clip_val=1e-5,
        gradient_clip_algorithm=algorithm,
    )
    assert clipped.step == 6 and not torch.equal(clipped.out, model.out)
    largest = max(p.grad.abs().max() for p in clipped.parameters())
    assert largest <= 1e-5 * (1 + 1e-6)


def test_deterministic_gives_the_same_fit(make_trainer):
    model, strict = made(), made()
    fit(make_trainer, model)
    try:
        fit(make_trainer, strict, deterministic=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_state(model, strict)


def test_a_fast_dev_run_makes_a_step_and_leaves_nothing(make_trainer, tmp_path):
    model = made()
    others = [Monitor(), Writer(), LastCheckpoint(1)]
    fit(
        make_trainer,
        model,
        *others,
        steps=-1,
        fast_dev_run=True,
        enable_checkpointing=True,
        logger=loggers.TensorBoardLogger(tmp_path),
    )
    assert model.step == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "limit", [{"overfit_batches": 1}, {"overfit_batches": 0.5}, {"limit_train_batches": 2}]
)
def test_short_epochs_make_the_same_fit(make_trainer, limit):
    """There is one image: an epoch's length is nothing but bookkeeping."""
    model, limited = made(), made()
    fit(make_trainer, model)
    fit(make_trainer, limited, **limit)
    assert limited.step == 6
    assert_same_state(model, limited)


def test_epochs_may_end_the_fit(make_trainer):
    model = made()
    fit(make_trainer, model, steps=-1, limit_train_batches=4, max_epochs=2, max_time="00:01:00:00")
    assert model.step == 8


def test_the_learning_rate_can_be_watched(make_trainer, tmp_path):
    def schedule(optimizer):
        return WarmupCosine(optimizer, total_steps=6, warmup_steps=2)

    logger = loggers.CSVLogger(tmp_path)
    watch = callbacks.LearningRateMonitor(logging_interval="step")
    model = made(lr_scheduler=schedule)
    fit(make_trainer, model, watch, logger=logger, log_every_n_steps=1)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rates = [float(row["lr-Adam"]) for row in csv.DictReader(file) if row["lr-Adam"]]
    assert rates[:3] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])


def test_two_loggers_share_the_curves_and_the_first_has_the_files(make_trainer, tmp_path):
    both = [loggers.CSVLogger(tmp_path / "csv"), loggers.TensorBoardLogger(tmp_path / "tb")]
    model = made()
    fit(make_trainer, model, Monitor(), Writer(), logger=both, log_every_n_steps=2)
    with open(f"{both[0].log_dir}/metrics.csv") as file:
        gaps = [float(row["curves/gap"]) for row in csv.DictReader(file) if row["curves/gap"]]
    events = EventAccumulator(both[1].log_dir).Reload()
    assert gaps == pytest.approx([event.value for event in events.Scalars("curves/gap")], rel=1e-5)
    assert len(gaps) == 3
    files = {path.name for path in (tmp_path / "csv").rglob("*") if path.is_file()}
    assert {"metrics.csv", "restored.png", "result.json"} <= files


class Looks(Callback):
    """θ-steps at which an epoch ends."""

    def __init__(self):
        self.steps = []

    def on_train_epoch_end(self, trainer, module):
        self.steps.append(trainer.global_step)


@pytest.mark.parametrize("every, ends", [(4, [4, 8, 10]), (7, [7, 10]), (0, [10]), (None, [10])])
def test_an_epoch_is_as_long_as_the_trainer_logs_once(make_trainer, every, ends):
    looks, model = Looks(), made()
    trainer = fit(make_trainer, model, looks, steps=10, log_every_n_steps=every)
    assert looks.steps == ends and trainer.global_step == model.step == 10


def test_epochs_do_not_change_a_fit_nor_its_resumption(make_trainer, tmp_path, recwarn):
    whole, stopped, resumed = made(), made(), made()
    fit(make_trainer, whole, steps=11)
    fit(make_trainer, stopped, steps=6, log_every_n_steps=4).save_checkpoint(tmp_path / "last.ckpt")
    looks = Looks()
    trainer = make_trainer(max_steps=11, log_every_n_steps=4, callbacks=[update(), looks])
    trainer.fit(resumed, ckpt_path=tmp_path / "last.ckpt")
    assert looks.steps == [8, 11]
    assert_same_state(whole, resumed)
    assert not [w for w in recwarn if "resum" in str(w.message)]


def test_the_best_of_a_curve_is_kept_at_every_epochs_end(make_trainer, tmp_path):
    """As everybody writes it, without a period of one's own."""
    best = callbacks.ModelCheckpoint(tmp_path, monitor="curves/gap", mode="min", save_top_k=1)
    model, gaps = made(), {}

    class Watch(Callback):
        def on_train_epoch_end(self, trainer, module):
            gaps[trainer.global_step] = float(trainer.callback_metrics["curves/gap"])

    settings = {"enable_checkpointing": True, "log_every_n_steps": 3}
    fit(make_trainer, model, Monitor(), best, Watch(), steps=15, **settings)
    assert len(gaps) == 5 and min(gaps, key=gaps.get) != 15
    kept = DeepRED.load_from_checkpoint(best.best_model_path, network=TinyNet)
    assert kept.step == min(gaps, key=gaps.get)


@pytest.mark.parametrize("end", [{"steps": 20}, {"steps": -1, "max_time": "00:01:00:00"}])
def test_max_epochs_that_would_end_a_fit_early_are_refused(make_trainer, end):
    settings = {"max_epochs": 2, "log_every_n_steps": 4, **end}
    assert "would end the fit after 8 θ-steps" in refused(make_trainer, made(), **settings)


@pytest.mark.parametrize("epochs", [5, -1])
def test_max_epochs_that_end_no_fit_early_are_taken(make_trainer, epochs):
    settings = {"steps": 20, "max_epochs": epochs, "log_every_n_steps": 4}
    assert fit(make_trainer, made(), **settings).global_step == 20


def test_epochs_of_other_data_end_a_fit_as_they_are_set(make_trainer):
    model = made()
    make_trainer(max_steps=20, max_epochs=2, callbacks=[update()]).fit(model, range(6))
    assert model.step == 12


def test_a_metric_stops_the_fit(make_trainer):
    stopping = callbacks.EarlyStopping(
        "curves/gap", patience=1, mode="max", check_on_train_epoch_end=True
    )
    model = made()
    fit(
        make_trainer,
        model,
        Monitor(),
        stopping,
        steps=40,
        limit_train_batches=2,
        log_every_n_steps=2,
    )
    assert 4 <= model.step < 40


def test_lightnings_own_checkpoints_serve(make_trainer, tmp_path):
    whole, model, resumed = made(), made(), made()
    fit(make_trainer, whole, steps=9)
    saving = callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    fit(make_trainer, model, saving, steps=6, enable_checkpointing=True)
    make_trainer(max_steps=9, callbacks=[update()]).fit(resumed, ckpt_path=tmp_path / "step=5.ckpt")
    assert_same_state(whole, resumed)
    alone = DeepRED.load_from_checkpoint(tmp_path / "step=5.ckpt", network=TinyNet)
    assert alone.step == 5 and alone.restored.shape == (1, 3, 9, 11)


def test_copies_and_pickles_of_a_fitted_module_go_on_alike(make_trainer):
    model = made()
    fit(make_trainer, model, steps=4)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in [model, *copies]:
        fit(make_trainer, twin, steps=3)
    for twin in copies:
        assert twin.step == 7
        assert_same_state(model, twin)


# Refused


def refused(make_trainer, model, *others, **settings):
    with pytest.raises(ValueError) as error:
        fit(make_trainer, model, *others, **settings)
    assert model.step == 0
    return str(error.value)


@pytest.mark.parametrize("kind", [DeepImagePrior, DeepRED])
def test_accumulated_gradients_are_refused(make_trainer, kind):
    said = refused(make_trainer, made(kind), accumulate_grad_batches=4)
    assert "expected accumulate_grad_batches=1, got 4; average_decay smooths" in said


def test_a_schedule_of_accumulation_is_refused(make_trainer):
    schedule = callbacks.GradientAccumulationScheduler({0: 4})
    said = refused(make_trainer, made(), schedule)
    assert "expected accumulate_grad_batches=1, got {0: 4}" in said


def test_clipping_before_a_fused_step_in_mixed_precision_is_refused(make_trainer):
    settings = {"gradient_clip_val": 1.0, "precision": "bf16-mixed"}
    assert "set the optimizer's fused to false" in refused(make_trainer, made(), **settings)
    model = made(optimizer=partial(torch.optim.Adam, lr=0.01))
    fit(make_trainer, model, **settings)
    assert model.step == 6


def test_epochs_alone_are_no_end(make_trainer):
    said = refused(make_trainer, made(), steps=-1, max_epochs=2, limit_train_batches=3)
    assert "expected max_steps or max_time" in said


@pytest.mark.parametrize("name", ["StochasticWeightAveraging", "EMAWeightAveraging"])
@pytest.mark.parametrize("kind", [DeepImagePrior, DeepRED])
def test_averaged_weights_are_refused(make_trainer, kind, name):
    if not hasattr(callbacks, name):
        pytest.skip("an older Lightning")
    settings = {"swa_lrs": 0.01, "swa_epoch_start": 1} if name.startswith("Sto") else {}
    said = refused(make_trainer, made(kind), getattr(callbacks, name)(**settings))
    assert f"{name} averages weights" in said and "leave it out" in said


def test_several_devices_are_refused():  # test_cli: before their processes start
    model = made()
    trainer = Trainer(accelerator="cpu", devices=2, max_steps=1, logger=False)
    model.trainer = trainer
    trainer.training = True
    with pytest.raises(ValueError, match=r"one image uses one device: .* got 2"):
        model.configure_model()


def test_a_compiled_module_is_refused_and_the_way_is_named(make_trainer):
    model = made()
    trainer = make_trainer(max_steps=2, callbacks=[update()])
    with pytest.raises(ValueError, match="compile=True compiles only the network"):
        trainer.fit(torch.compile(model, backend="eager"))


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "16-true"])
def test_true_precisions_are_refused(make_trainer, precision):
    assert "use precision='bf16-mixed'" in refused(make_trainer, made(), precision=precision)


# Inside another module


class Outer(LightningModule):
    """Restores an image, and learns its mean beside it."""

    def __init__(self):
        super().__init__()
        self.restoration = made()
        self.mean = nn.Parameter(torch.tensor(0.0))

    def training_step(self, batch, batch_idx):
        loss = self.restoration.training_step(batch, batch_idx)
        return loss + (self.mean - self.restoration.out.mean()) ** 2

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)

    def train_dataloader(self):
        return itertools.repeat(0)


def inner():
    return REDUpdate(smooth, every_n_steps=2, submodule="restoration")


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16-mixed"},
        {"precision": "16-mixed"},
        {"gradient_clip_val": 0.1},
        {"accumulate_grad_batches": 2},
        {"limit_train_batches": 3},
    ],
)
def test_a_parent_has_them_too_and_its_checkpoint_is_loaded_alone(make_trainer, tmp_path, settings):
    parent = Outer()
    trainer = make_trainer(max_steps=6, callbacks=[inner()], **settings)
    trainer.fit(parent)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    passes = 6 * settings.get("accumulate_grad_batches", 1)
    assert parent.restoration.step == passes  # a child counts its passes
    assert not torch.equal(parent.restoration.x, parent.restoration.problem.y)
    loaded = Outer.load_from_checkpoint(tmp_path / "last.ckpt")
    assert_same_state(parent, loaded)
    assert torch.equal(parent.restoration.restored, loaded.restoration.restored)


def test_a_parents_true_precision_is_refused(make_trainer):
    with pytest.raises(ValueError, match="use precision='bf16-mixed'"):
        make_trainer(max_steps=2, callbacks=[inner()], precision="bf16-true").fit(Outer())


def test_a_parents_fast_dev_run_makes_a_step_and_leaves_nothing(make_trainer, tmp_path):
    parent, watch = Outer(), [Monitor("restoration"), Panels(1, submodule="restoration")]
    logger = loggers.TensorBoardLogger(tmp_path)
    make_trainer(callbacks=[inner(), *watch], fast_dev_run=True, logger=logger).fit(parent)
    assert parent.restoration.step == 1 and not list(tmp_path.iterdir())


def test_a_parent_and_its_copies_go_on_alike(make_trainer):
    parent = Outer()
    make_trainer(max_steps=3, callbacks=[inner()]).fit(parent)
    copies = [copy.deepcopy(parent), pickle.loads(pickle.dumps(parent))]
    for twin in [parent, *copies]:
        make_trainer(max_steps=3, callbacks=[inner()]).fit(twin)
    for twin in copies:
        assert twin.restoration.step == 6
        assert_same_state(parent, twin)


def test_where_a_parent_accumulates_the_denoiser_works_beside_every_round(make_trainer):
    """A job is handed over at the end of each round, not begun where it is wanted."""
    started, turn = [], threading.Event()

    def note(x):
        started.append(parent.restoration.step)
        turn.set()
        return smooth(x)

    parent = Outer()
    update = REDUpdate(note, every_n_steps=4, submodule="restoration")

    class Wait(Callback):
        def on_train_batch_end(self, trainer, module, *batch):
            if module.restoration.step < 12:  # the last round hands over nothing
                assert turn.wait(60)  # it was handed over, and began
            if module.restoration.step % 4 == 3:
                turn.clear()

    make_trainer(max_steps=3, accumulate_grad_batches=4, callbacks=[update, Wait()]).fit(parent)
    assert [step // 4 for step in started] == [0, 1, 2]
    assert all(step % 4 <= 1 for step in started)


def test_where_a_parent_accumulates_a_step_is_saved_once_and_whole(make_trainer):
    saved = []

    class Noting(LastCheckpoint):
        def _save(self, trainer):
            saved.append((trainer.global_step, trainer.lightning_module.restoration.step))

    settings = {"callbacks": [inner(), Noting(every_n_steps=2)], "enable_checkpointing": True}
    make_trainer(max_steps=5, accumulate_grad_batches=4, **settings).fit(Outer())
    assert saved == [(2, 8), (4, 16), (5, 20)]


def test_where_a_parent_accumulates_mixed_changes_at_half_of_its_passes(make_trainer):
    update = REDUpdate(smooth, every_n_steps=2, x_update="mixed", submodule="restoration")
    trainer = make_trainer(max_steps=4, accumulate_grad_batches=2, callbacks=[update])
    kinds = [update._x_update(step, trainer, (0, 1)).func for step in (2, 4, 6, 8)]
    assert kinds == [admm.fixed_point, admm.fixed_point, admm.gradient_step, admm.gradient_step]


def test_where_a_parent_accumulates_a_round_is_of_its_childs_passes(make_trainer):
    parent, changed = Outer(), []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, *batch):
            changed.append(module.restoration.x.clone())

    make_trainer(max_steps=3, accumulate_grad_batches=2, callbacks=[inner(), Watch()]).fit(parent)
    rounds = [not torch.equal(a, b) for a, b in itertools.pairwise(changed)]
    assert rounds == [True, False, True, False, True]  # at passes 2, 4 and 6


@pytest.mark.skipif(EMA is None, reason="an older Lightning")
def test_a_parents_averaged_weights_are_refused_where_they_would_average_x(make_trainer):
    trainer = make_trainer(max_steps=2, callbacks=[EMA(), inner()])
    with pytest.raises(ValueError, match="EMAWeightAveraging averages weights"):
        trainer.fit(Outer())
