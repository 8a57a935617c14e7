import csv
import time

import numpy as np
import pytest
import torch
from scipy.stats import truncnorm
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from deepred_pl import DeepImagePrior, DeepRED, InverseProblem, REDUpdate
from deepred_pl.callbacks import Monitor, RestorationBar
from deepred_pl.callbacks.monitor import measure
from deepred_pl.lightning import Callback, LightningModule, loggers
from tests.helpers import TinyNet, noisy_problem, picture, smooth


def fitted(make_trainer, problem, kind=DeepRED, steps=7, **settings):
    model = kind(network=TinyNet, problem=problem)
    callbacks = [REDUpdate(smooth, every_n_steps=2), Monitor()]
    trainer = make_trainer(max_steps=steps, callbacks=callbacks, **settings)
    trainer.fit(model)
    return model, trainer


@pytest.mark.parametrize("channels", [1, 3])
def test_the_curves_are_those_of_the_paper(make_trainer, channels):
    problem = noisy_problem(channels, 12, 13)
    before, after = (fitted(make_trainer, problem, steps=steps)[0] for steps in (5, 6))
    curves = {name: value.item() for name, value in measure(after).items()}
    out, average, x, y, truth = (
        t.double().numpy()
        for t in (after.out, after.average, after.x, problem.y, problem.ground_truth)
    )
    residual, s = ((out - y) ** 2).mean(), 25 / 255
    below, above = (
        truncnorm.mean(-np.inf, -out / s, out, s),
        truncnorm.mean((1 - out) / s, np.inf, out, s),
    )
    completed = np.where(y == 0, below, np.where(y == 1, above, y))  # what was clipped
    data_term = ((out - completed) ** 2).mean()
    # Round 3 collected f(x) of the x that round 2 left, which is still there after step 5.
    matched, f_x = before.x.double().numpy(), after.f_x.double().numpy()
    np.testing.assert_allclose(f_x, smooth(before.x).double().numpy(), atol=1e-6)
    assert curves["objective"] / 255**2 == pytest.approx(
        data_term + 0.5 * (matched * (matched - f_x)).mean(), rel=1e-4
    )
    assert curves["data_term"] / 255**2 == pytest.approx(data_term, rel=1e-4)
    assert curves["gap"] == pytest.approx(np.sqrt(((x - out) ** 2).sum()), rel=1e-4)
    for name, image in {"out": out, "average": average, "x": x}.items():
        psnr = -10 * np.log10(((image - truth) ** 2).mean())
        assert curves[f"psnr_{name}"] == pytest.approx(psnr, abs=1e-3)
    # What clipping to [0, 1] leaves of the noise, by drawing it.
    noise = np.random.default_rng(0).normal(0, 25 / 255, (20_000, *out.shape))
    left = ((np.clip(out + noise, 0, 1) - out) ** 2).mean()
    assert curves["residual_to_sigma"] == pytest.approx(np.sqrt(residual / left), rel=1e-3)
    assert (curves["lam"], curves["mu"]) == (0.5, 0.5)


def test_dip_has_its_own_curves(make_trainer):
    model, _ = fitted(make_trainer, noisy_problem(), DeepImagePrior)
    assert set(measure(model)) == {"data_term", "psnr_out", "psnr_average", "residual_to_sigma"}


def test_without_truth_or_noise_level_there_are_no_such_curves(make_trainer):
    model, _ = fitted(make_trainer, InverseProblem(picture(1, 9, 9)))
    assert set(measure(model)) == {"data_term", "objective", "gap", "lam", "mu"}


def test_curves_are_logged_every_n_steps_through_the_logger(make_trainer, tmp_path):
    logger = loggers.CSVLogger(tmp_path)
    _, trainer = fitted(make_trainer, noisy_problem(), logger=logger, log_every_n_steps=3)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        logged = list(csv.DictReader(file))
    assert [row["step"] for row in logged] == ["2", "5"]  # Lightning counts steps from 0
    assert {"curves/objective", "curves/psnr_average", "curves/denoiser_wait_seconds"} <= set(
        logged[0]
    )
    assert "curves/psnr_average" in trainer.callback_metrics  # for callbacks that monitor a metric


def layout_of(folder):
    events = EventAccumulator(str(folder)).Reload()
    content = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    layout = layout_pb2.Layout.FromString(content)
    return {
        (category.title, chart.title): list(chart.multiline.tag)
        for category in layout.category
        for chart in category.chart
    }, set(events.Tags()["scalars"])


@pytest.mark.parametrize("kind", [DeepRED, DeepImagePrior])
def test_tensorboard_has_the_papers_figure(make_trainer, tmp_path, kind):
    logger = loggers.TensorBoardLogger(tmp_path)
    fitted(make_trainer, noisy_problem(), kind, logger=logger, log_every_n_steps=2)
    layout, logged = layout_of(logger.log_dir)
    assert [title for title, _ in layout] == ["Figure 3"] * 3
    shown = {tag for tags in layout.values() for tag in tags}
    assert shown >= {"curves/data_term", "curves/psnr_out", "curves/psnr_average"}
    if kind is DeepRED:
        assert shown <= logged


def test_a_figure_without_a_true_image_has_no_psnr_and_each_child_has_one(make_trainer, tmp_path):
    class Two(LightningModule):
        def __init__(self):
            super().__init__()
            self.a = DeepRED(network=TinyNet, problem=noisy_problem())
            self.b = DeepImagePrior(network=TinyNet, problem=InverseProblem(picture(1, 9, 9)))
            self.configure_optimizers = lambda: torch.optim.Adam(self.parameters())
            self.train_dataloader = self.a.train_dataloader

        def training_step(self, batch, batch_idx):
            return self.a.training_step() + self.b.training_step()

    logger = loggers.TensorBoardLogger(tmp_path)
    callbacks = [REDUpdate(smooth, submodule="a"), Monitor("a"), Monitor("b")]
    make_trainer(max_steps=2, callbacks=callbacks, logger=logger, log_every_n_steps=1).fit(Two())
    layout, logged = layout_of(logger.log_dir)
    assert [title for title, _ in layout] == ["Figure 3: a"] * 3 + ["Figure 3: b"] * 2
    assert {"a/gap", "b/data_term"} <= logged


def test_the_denoisers_work_and_the_wait_for_it_are_logged_and_survive(make_trainer, tmp_path):
    def slow(x):
        time.sleep(0.05)
        return smooth(x)

    def fit(model, steps, **resume):
        update = REDUpdate(slow, every_n_steps=2)
        trainer = make_trainer(
            max_steps=steps,
            callbacks=[update, Monitor()],
            logger=loggers.CSVLogger(tmp_path),
            log_every_n_steps=2,
        )
        trainer.fit(model, **resume)
        return trainer, update, {k: float(v) for k, v in trainer.callback_metrics.items()}

    def made():
        return DeepRED(network=TinyNet, problem=noisy_problem())

    trainer, update, logged = fit(made(), 4)
    assert 0.05 < logged["curves/denoiser_busy_seconds"] < update.busy_seconds + 1e-3
    assert update.busy_seconds >= 0.1  # two rounds
    assert logged["curves/denoiser_wait_seconds"] > 0
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    before = update.busy_seconds
    _, update, _ = fit(made(), 8, ckpt_path=tmp_path / "last.ckpt")
    assert update.busy_seconds >= before + 0.1


def test_a_child_is_logged_under_its_name(make_trainer, tmp_path):
    from tests.callbacks.test_red import Parent, parent_callbacks

    callbacks = [*parent_callbacks(), Monitor("restorations.1")]
    trainer = make_trainer(
        max_steps=2, callbacks=callbacks, logger=loggers.CSVLogger(tmp_path), log_every_n_steps=2
    )
    trainer.fit(Parent())
    assert "restorations.1/gap" in trainer.callback_metrics
    with pytest.raises(ValueError, match=r"at submodule='restorations'.*\['restorations.0'"):
        Monitor("restorations").restoration(Parent())


def test_the_bar_shows_psnr_and_gap_and_stops(make_trainer, capsys):
    model = DeepRED(network=TinyNet, problem=noisy_problem())
    callbacks = [REDUpdate(smooth, every_n_steps=2), Monitor(), RestorationBar()]
    trainer = make_trainer(
        max_steps=20, callbacks=callbacks, enable_progress_bar=True, log_every_n_steps=5
    )
    trainer.fit(model)
    shown = capsys.readouterr().err
    assert "step 20 of 20: PSNR average" in shown and "gap" in shown
    assert shown.count("PSNR average") == 4  # a line for each measurement, none told twice
    assert "Epoch" not in shown


def test_the_bar_of_a_timed_fit_counts_without_an_end(make_trainer, capsys):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 15

    model = DeepImagePrior(network=TinyNet, problem=noisy_problem())
    trainer = make_trainer(
        max_steps=-1,
        max_time={"minutes": 5},
        callbacks=[Monitor(), RestorationBar(), Stop()],
        enable_progress_bar=True,
        log_every_n_steps=10,
    )
    trainer.fit(model)
    shown = capsys.readouterr().err
    assert "step 10: PSNR average" in shown
    assert "step 9 " not in shown and "of -1" not in shown


def test_logging_can_be_turned_off(make_trainer):
    _, trainer = fitted(make_trainer, noisy_problem(), log_every_n_steps=0)
    assert not trainer.callback_metrics


def test_the_bar_stops_when_a_fit_fails(make_trainer):
    def fails(x):
        raise OSError

    bar = RestorationBar()
    trainer = make_trainer(
        max_steps=20, callbacks=[REDUpdate(fails), bar], enable_progress_bar=True
    )
    with pytest.raises(RuntimeError):
        trainer.fit(DeepRED(network=TinyNet, problem=noisy_problem()))
    assert bar._progress is None


def test_measuring_leaves_the_fit_alone(make_trainer):
    states = []
    for every in (1, 100):
        model, _ = fitted(make_trainer, noisy_problem(), log_every_n_steps=every)
        states.append(model.state_dict())
    for name, value in states[0].items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, states[1][name])
