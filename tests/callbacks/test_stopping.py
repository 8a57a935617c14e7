"""Stopping without a ground truth, against NumPy on the networks' outputs."""

import numpy as np
import pytest
import torch
from torch import nn

from deepred_pl import DeepImagePrior, DeepRED, InverseProblem, REDUpdate
from deepred_pl.callbacks import AutoStop, LastCheckpoint, Writer
from deepred_pl.lightning import Callback
from deepred_pl.noise import GaussianNoise
from tests.helpers import RUN, Outs, TinyNet, noisy_problem, picture, result_of, smooth


class Script(nn.Module):
    """Gives outputs of a known course: a level, and a spread around it, per step."""

    def __init__(self, channels, levels, spreads):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.levels, self.spreads, self.calls = levels, spreads, 0

    def prepare(self, problem):
        return torch.zeros(problem.image_shape)

    def forward(self, z):
        generator = torch.Generator().manual_seed(self.calls)
        level, spread = self.levels[self.calls], self.spreads[self.calls]
        self.calls += 1
        return level + spread * torch.randn(z.shape, generator=generator) + 0 * self.weight


class StopAt(Callback):
    """Ends the fit at a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step == self.step


def windows_of(outs, length):
    """All windows that slide by a fifth, (windows, length, ...)."""
    hop = length // 5
    return np.stack([outs[i : i + length] for i in range(0, len(outs) - length + 1, hop)])


def scripted(levels, spreads, problem=None):
    return DeepImagePrior(
        lambda c: Script(c, levels, spreads),
        input_noise_std=0,
        problem=problem or noisy_problem(1, 9, 11),
    )


def test_the_window_of_least_variance_is_returned_and_the_fit_stops(make_trainer, tmp_path):
    # The spread falls to step 60 and rises again, as of a network that learns the noise.
    spreads = [0.01 + 0.01 * abs(step - 60) / 60 for step in range(400)]
    model, outs = scripted([0.5] * 400, spreads), Outs()
    stop = AutoStop(window=20, patience=100)
    make_trainer(max_steps=400, callbacks=[outs, stop, Writer()]).fit(model)
    windows = windows_of(outs.outs, 20)
    best = windows.var(1).mean((1, 2, 3, 4)).argmin()
    assert stop.best_step == 20 + 4 * best and 60 <= stop.best_step <= 80
    assert model.step == stop.best_step + 100 and stop.stopped
    np.testing.assert_allclose(model.restored, windows[best].mean(0), atol=1e-6)
    result = result_of(tmp_path / RUN)
    assert result["stop_reason"] == f"auto_stop: variance, best at step {stop.best_step}"


def test_the_best_window_is_returned_of_a_fit_that_ran_to_its_end_too(make_trainer):
    spreads = [0.05] * 20 + [0.01] * 20 + [0.05] * 20
    model, outs, stop = scripted([0.5] * 60, spreads), Outs(), AutoStop(window=20)
    make_trainer(max_steps=60, callbacks=[outs, stop]).fit(model)
    assert (model.step, stop.stopped, stop.best_step) == (60, False, 40)
    np.testing.assert_allclose(model.restored, np.mean(outs.outs[20:40], 0), atol=1e-6)


def test_the_discrepancy_rule_stops_where_the_residual_is_the_noises(make_trainer):
    truth = torch.full((1, 1, 30, 31), 0.5)
    noise = GaussianNoise(25)
    y = noise.sample(truth, torch.Generator().manual_seed(0))
    y = 0.5 + (y - y.mean()) * 0.97 * 25 / 255 / y.std()  # a little quieter than it could be
    # The level comes nearer to the truth; within 0.024 the residual is that of the noise.
    levels = [0.5 + 0.2 * 0.97**step for step in range(200)]
    problem = InverseProblem(y, noise=noise, ground_truth=truth)
    model, outs = scripted(levels, [0.0] * 200, problem), Outs()
    stop = AutoStop("discrepancy", window=10)
    make_trainer(max_steps=200, callbacks=[outs, stop]).fit(model)
    means = windows_of(outs.outs, 10).mean(1)
    residuals = ((means - y.double().numpy()) ** 2).mean((1, 2, 3, 4))
    assert stop.stopped and residuals[-1] <= (25 / 255) ** 2 < residuals[-2]
    np.testing.assert_allclose(model.restored, means[-1], atol=1e-6)


@pytest.mark.parametrize("cut", [8, 14, 20, 33])
def test_a_resumed_fit_chooses_the_same_window(make_trainer, tmp_path, cut):
    def fit(steps, folder, ckpt_path=None):
        model = DeepRED(network=TinyNet, problem=noisy_problem())
        stop = AutoStop(window=10, patience=14)
        make_trainer(
            max_steps=steps,
            callbacks=[REDUpdate(smooth, every_n_steps=4), stop, LastCheckpoint()],
            enable_checkpointing=True,
            default_root_dir=tmp_path / folder,
        ).fit(model, ckpt_path=ckpt_path)
        return model, stop, tmp_path / folder / RUN / "checkpoints" / "last.ckpt"

    whole, stopped, _ = fit(60, "whole")
    assert stopped.stopped and whole.step > 33
    resumed, again, _ = fit(60, "resumed", fit(cut, "cut")[2])
    assert (again.best_step, again.stopped) == (stopped.best_step, True)
    assert resumed.step == whole.step
    assert torch.equal(resumed.restored, whole.restored)


def test_the_choice_is_in_the_checkpoint(make_trainer, tmp_path):
    model = DeepImagePrior(TinyNet, problem=noisy_problem())
    callbacks = [AutoStop(window=10), LastCheckpoint()]
    make_trainer(max_steps=12, callbacks=callbacks, enable_checkpointing=True).fit(model)
    saved = tmp_path / RUN / "checkpoints" / "last.ckpt"
    other = DeepImagePrior.load_from_checkpoint(saved, network=TinyNet, map_location="cpu")
    assert torch.equal(other.restored, model.restored)
    assert not torch.equal(other.restored, other.average.clamp(0, 1))


def test_a_window_longer_than_the_run_switches_the_rule_off_with_one_warning(make_trainer):
    model = DeepImagePrior(TinyNet, problem=noisy_problem())
    with pytest.warns(UserWarning, match="AutoStop is off: its window of 100") as warned:
        make_trainer(max_steps=99, callbacks=[AutoStop()]).fit(model)
    assert sum("AutoStop" in str(w.message) for w in warned) == 1
    assert model.step == 99 and model.chosen is None


@pytest.mark.parametrize(
    "wrong", [{"window": 5}, {"window": 12}, {"patience": 0}, {"rule": "psnr"}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AutoStop(**wrong)


def test_the_discrepancy_rule_needs_a_noise_model(make_trainer):
    model = DeepImagePrior(TinyNet, problem=InverseProblem(picture(1, 9, 9)))
    with pytest.raises(ValueError, match="needs a noise model"):
        make_trainer(max_steps=200, callbacks=[AutoStop("discrepancy")]).fit(model)


def test_a_resumed_rule_keeps_its_window(make_trainer, tmp_path):
    def fit(window, ckpt_path=None):
        model = DeepImagePrior(TinyNet, problem=noisy_problem())
        callbacks = [AutoStop(window=window), LastCheckpoint()]
        trainer = make_trainer(max_steps=20, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(model, ckpt_path=ckpt_path)

    fit(20)
    with pytest.raises(ValueError, match="AutoStop has rule and window"):
        fit(10, tmp_path / RUN / "checkpoints" / "last.ckpt")


def test_a_choice_ends_with_its_fit(make_trainer, tmp_path):
    model = DeepImagePrior(TinyNet, problem=noisy_problem())
    make_trainer(max_steps=12, callbacks=[AutoStop(window=10)]).fit(model)
    assert model.chosen is not None
    plain = DeepImagePrior(TinyNet, problem=noisy_problem())
    make_trainer(max_steps=2).fit(plain)
    chosen = model.state_dict()
    make_trainer(max_steps=3).fit(model)
    assert model.chosen is None
    model.load_state_dict(chosen)
    assert torch.equal(model.restored, chosen["chosen"].clamp(0, 1))
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model.restored, plain.restored)


# The error at held-out values


def held_out_problem(truth, sigma=25, share=0.2):
    noise = GaussianNoise(sigma)
    y = noise.sample(truth, torch.Generator().manual_seed(0))
    return InverseProblem(y, noise=noise, ground_truth=truth), share


def test_the_window_of_the_least_held_out_error_is_returned_once_it_has_surely_risen(make_trainer):
    whole, share = held_out_problem(torch.full((1, 1, 30, 31), 0.5))
    problem = whole.hold_out(share)
    # The level is at the truth at step 60, and leaves it again.
    levels = [0.5 + 0.1 * abs(step - 60) / 60 for step in range(400)]
    model, outs, stop = scripted(levels, [0.0] * 400, problem), Outs(), AutoStop("holdout", 20)
    make_trainer(max_steps=400, callbacks=[outs, stop]).fit(model)
    means = windows_of(outs.outs, 20).mean(1)[:, 0, 0]
    held = problem.held_out.bool().numpy()[0, 0]
    errors = (means[:, held] - whole.y.double().numpy()[0, 0][held]) ** 2  # (windows, values)
    best = errors.mean(1).argmin()
    rise = errors - errors[best]
    surely = rise.mean(1) > 3 * rise.std(1, ddof=1) / np.sqrt(rise.shape[1])
    first = next(i for i in range(best, len(surely)) if surely[i])
    assert stop.stopped and not stop.released
    assert (stop.best_step, model.step) == (20 + 4 * best, 20 + 4 * first)
    np.testing.assert_allclose(model.restored[0, 0], means[best], atol=1e-6)


def test_the_last_steps_use_the_held_out_values_if_the_error_has_not_risen(make_trainer, tmp_path):
    whole, share = held_out_problem(picture(3, 33, 47))
    problem = whole.hold_out(share)
    model = DeepImagePrior(TinyNet, problem=problem)
    stop, seen = AutoStop("holdout", window=10), []

    class Look(Outs):
        def on_train_batch_end(self, trainer, model, *args):
            seen.append(model.problem.held_out is None)

    make_trainer(max_steps=40, callbacks=[stop, Look(), Writer()]).fit(model)
    assert seen == [False] * 19 + [True] * 21  # from half of the steps
    assert torch.equal(problem.y, whole.y) and stop.released and not stop.stopped
    assert torch.equal(model.restored, model.average.clamp(0, 1))
    result = result_of(tmp_path / RUN)
    assert result["stop_reason"] == "max_steps" and 10 < result["held_out_error"] < 100


@pytest.mark.parametrize("cut", [14, 33, 38])
def test_a_resumed_fit_has_released_what_the_whole_one_had(make_trainer, tmp_path, cut):
    def fit(steps, folder, ckpt_path=None):
        whole, share = held_out_problem(picture(3, 33, 47))
        model = DeepRED(network=TinyNet, problem=whole.hold_out(share))
        stop = AutoStop("holdout", window=10)
        make_trainer(
            max_steps=steps,
            callbacks=[REDUpdate(smooth, every_n_steps=4), stop, LastCheckpoint(), *extra],
            enable_checkpointing=True,
            default_root_dir=tmp_path / folder,
        ).fit(model, ckpt_path=ckpt_path)
        return model, stop, tmp_path / folder / RUN / "checkpoints" / "last.ckpt"

    extra = []
    whole, stopped, _ = fit(40, "whole")
    extra = [StopAt(cut)]
    _, _, saved = fit(40, "cut")
    extra = []
    resumed, again, _ = fit(40, "resumed", saved)
    assert again.released and stopped.released and again.best_step == stopped.best_step
    assert torch.equal(resumed.restored, whole.restored)


def test_the_rule_needs_held_out_values(make_trainer):
    model = DeepImagePrior(TinyNet, problem=noisy_problem())
    with pytest.raises(ValueError, match="needs held-out values, but this problem has none"):
        make_trainer(max_steps=200, callbacks=[AutoStop("holdout")]).fit(model)


def test_a_run_shorter_than_the_window_uses_all_values(make_trainer):
    whole, share = held_out_problem(picture(3, 33, 47))
    model = DeepImagePrior(TinyNet, problem=whole.hold_out(share))
    with pytest.warns(UserWarning, match="AutoStop is off"):
        make_trainer(max_steps=5, callbacks=[AutoStop("holdout")]).fit(model)
    assert torch.equal(model.problem.y, whole.y) and model.chosen is None
