import csv

import numpy as np
import pytest
import torch
from pytorch_lightning.loggers import CSVLogger

from deepred_pl import DeepImagePrior, DeepRED, InverseProblem, REDUpdate
from deepred_pl.callbacks import Monitor, RestorationBar
from deepred_pl.callbacks.monitor import measure
from deepred_pl.model import find_restoration
from tests.conftest import TinyNet, noisy_problem, picture, smooth


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
    data_term = ((out - y) ** 2).mean()
    # Round 3 collected f(x) of the x that round 2 left, which is still there after step 5.
    matched, f_x = before.x.double().numpy(), after.f_x.double().numpy()
    np.testing.assert_allclose(f_x, smooth(before.x).double().numpy(), atol=1e-6)
    assert curves["objective"] == pytest.approx(
        data_term + 0.5 * (matched * (matched - f_x)).mean(), rel=1e-4
    )
    assert curves["data_term"] == pytest.approx(data_term, rel=1e-4)
    assert curves["gap"] == pytest.approx(np.sqrt(((x - out) ** 2).sum()), rel=1e-4)
    for name, image in {"out": out, "average": average, "x": x}.items():
        psnr = -10 * np.log10(((image - truth) ** 2).mean())
        assert curves[f"psnr_{name}"] == pytest.approx(psnr, abs=1e-3)
    # What clipping to [0, 1] leaves of the noise, by drawing it.
    noise = np.random.default_rng(0).normal(0, 25 / 255, (20_000, *out.shape))
    left = ((np.clip(out + noise, 0, 1) - out) ** 2).mean()
    assert curves["residual_to_sigma"] == pytest.approx(np.sqrt(data_term / left), rel=1e-3)
    assert (curves["lam"], curves["mu"]) == (0.5, 0.5)


def test_dip_has_its_own_curves(make_trainer):
    model, _ = fitted(make_trainer, noisy_problem(), DeepImagePrior)
    assert set(measure(model)) == {"data_term", "psnr_out", "psnr_average", "residual_to_sigma"}


def test_without_truth_or_noise_level_there_are_no_such_curves(make_trainer):
    model, _ = fitted(make_trainer, InverseProblem(picture(1, 9, 9)))
    assert set(measure(model)) == {"data_term", "objective", "gap", "lam", "mu"}


def test_curves_are_logged_every_n_steps_through_the_logger(make_trainer, tmp_path):
    logger = CSVLogger(tmp_path)
    _, trainer = fitted(make_trainer, noisy_problem(), logger=logger, log_every_n_steps=3)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        logged = list(csv.DictReader(file))
    assert [row["step"] for row in logged] == ["2", "5"]  # Lightning counts steps from 0
    assert {"curves/objective", "curves/psnr_average", "curves/denoiser_wait"} <= set(logged[0])
    assert "curves/psnr_average" in trainer.callback_metrics  # for callbacks that monitor a metric


def test_a_child_is_logged_under_its_name(make_trainer, tmp_path):
    from tests.callbacks.test_red import Parent, parent_callbacks

    callbacks = [*parent_callbacks(), Monitor("restorations.1")]
    trainer = make_trainer(
        max_steps=2, callbacks=callbacks, logger=CSVLogger(tmp_path), log_every_n_steps=2
    )
    trainer.fit(Parent())
    assert "restorations.1/gap" in trainer.callback_metrics
    with pytest.raises(ValueError, match=r"at submodule='restorations'.*\['restorations.0'"):
        find_restoration(Parent(), "restorations")


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
    model = DeepImagePrior(network=TinyNet, problem=noisy_problem())
    trainer = make_trainer(
        max_steps=-1,
        max_time={"seconds": 1},
        callbacks=[Monitor(), RestorationBar()],
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
