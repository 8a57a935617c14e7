"""Collapses and NaN: the fit recovers."""

from contextlib import suppress

import pytest
import torch

from deepred_pl import DeepImagePrior, DeepRED, REDUpdate
from deepred_pl.callbacks import AutoStop, CollapseGuard, Langevin, LastCheckpoint, Writer
from deepred_pl.lightning import Callback
from deepred_pl.metrics import psnr
from deepred_pl.networks import ImageParameter
from tests.helpers import RUN, Cut, Scissors, TinyNet, noisy_problem, result_of, smooth

STEPS = 100


class Disturb(Callback):
    """Spoils the network after the given steps."""

    def __init__(self, at, spoil):
        self.at, self.spoil = at, spoil

    @torch.no_grad()
    def on_train_batch_start(self, trainer, model, *args):
        if model.step in self.at:
            self.spoil(model)


def collapse(model):
    model.network.head.weight.zero_()
    model.network.head.bias.fill_(-8.0)  # a black image, in a sigmoid's flat part


def poison(model):
    next(iter(model.network.parameters())).fill_(float("nan"))


def spike(model):
    model.network.head.bias.add_(0.2)


def fit(make_trainer, kind=DeepRED, at=(), spoil=poison, steps=STEPS, guard=None, **red):
    model = kind(network=TinyNet, problem=noisy_problem(3, 16, 17), average_decay=0.95)
    guard = guard or CollapseGuard()
    update = REDUpdate(smooth, **{"every_n_steps": 5, **red})
    trainer = make_trainer(max_steps=steps, callbacks=[Disturb(at, spoil), guard, update, Writer()])
    trainer.fit(model)
    return model, guard


@pytest.mark.parametrize("red", [{}, {"every_n_steps": 1, "rounds_per_denoising": 4}])
@pytest.mark.parametrize("kind", [DeepImagePrior, DeepRED])
@pytest.mark.parametrize("spoil", [collapse, poison])
def test_a_forced_failure_is_survived(make_trainer, tmp_path, kind, spoil, red):
    at = (62,)
    model, guard = fit(make_trainer, kind, at, spoil, **red)
    untouched, _ = fit(make_trainer, kind, **red)
    assert guard.rollbacks == 1
    truth = model.problem.ground_truth
    assert psnr(model.restored, truth) > psnr(untouched.restored, truth) - 1
    assert all(p.isfinite().all() for p in model.network.parameters())
    if kind is DeepRED:
        for image in (model.x, model.u, model.f_x):
            assert image.isfinite().all()


def test_the_count_is_in_the_result(make_trainer, tmp_path):
    fit(make_trainer, at=(31, 62), spoil=poison)
    assert result_of(tmp_path / RUN)["rollbacks"] == 2


@pytest.mark.parametrize("kind", [DeepImagePrior, DeepRED])
def test_an_ordinary_fit_and_a_small_spike_are_left_alone(make_trainer, kind):
    assert fit(make_trainer, kind)[1].rollbacks == 0
    assert fit(make_trainer, kind, at=(59,), spoil=spike)[1].rollbacks == 0


def test_a_guarded_fit_is_the_same_as_an_unguarded_one(make_trainer):
    guarded, _ = fit(make_trainer)
    model = DeepRED(network=TinyNet, problem=noisy_problem(3, 16, 17), average_decay=0.95)
    make_trainer(max_steps=STEPS, callbacks=[REDUpdate(smooth, every_n_steps=5)]).fit(model)
    assert torch.equal(guarded.restored, model.restored) and torch.equal(guarded.u, model.u)


def test_network_optimizer_images_and_job_go_back_to_the_last_good_round(make_trainer):
    class Snapshots(Callback):
        """The state at the looks: before the collapse, and behind the return."""

        def __init__(self):
            self.states = {}

        def on_train_batch_end(self, trainer, model, *args):
            optimizer = trainer.optimizers[0]
            tensors = {n: t for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
            state = {n: t.clone() for n, t in tensors.items()}
            for i, p in enumerate(model.network.parameters()):
                state[f"adam {i}"] = optimizer.state[p]["exp_avg"].clone()
                state[f"adam steps {i}"] = optimizer.state[p]["step"].clone()
            self.states[model.step] = state

    class Look(CollapseGuard):
        """Records right behind the guard's look, before REDUpdate goes on."""

        def on_train_batch_end(self, trainer, model, *batch):
            super().on_train_batch_end(trainer, model, *batch)
            looks.on_train_batch_end(trainer, model)

    looks = Snapshots()
    model = DeepRED(network=TinyNet, problem=noisy_problem(3, 16, 17), average_decay=0.95)
    callbacks = [Disturb((62,), poison), Look(), REDUpdate(smooth, every_n_steps=5)]
    make_trainer(max_steps=71, callbacks=callbacks).fit(model)
    # The check of step 65 finds the NaN, and is judged at step 70.
    assert not looks.states[65]["out"].isfinite().all()
    good, back = looks.states[60], looks.states[70]
    assert good.keys() == back.keys()
    for name, value in good.items():
        assert torch.equal(value, back[name]), name


class After(Callback):
    """The state at the end of a step; listed last."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, model, *args):
        if model.step == self.step:
            tensors = model.state_dict().items()
            self.state = {n: t.clone() for n, t in tensors if isinstance(t, torch.Tensor)}


def test_the_round_behind_a_return_denoises_the_x_that_was_returned_to(make_trainer):
    class Before(CollapseGuard):
        """What the guard left to the round that follows."""

        def on_train_batch_end(self, trainer, model, *batch):
            super().on_train_batch_end(trainer, model, *batch)
            if model.step == 70:
                self.state = {n: getattr(model, n).clone() for n in ("x_pending", "out", "u")}

    model = DeepRED(network=TinyNet, problem=noisy_problem(3, 16, 17), average_decay=0.95)
    guard, after = Before(), After(70)
    update = REDUpdate(smooth, every_n_steps=5)
    make_trainer(max_steps=75, callbacks=[Disturb((62,), poison), guard, update, after]).fit(model)
    f_x = smooth(guard.state["x_pending"])
    v = guard.state["out"] + guard.state["u"]
    torch.testing.assert_close(after.state["f_x"], f_x, atol=1e-6, rtol=0)
    torch.testing.assert_close(after.state["x"], ((f_x + v) / 2).clamp(0, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("spoil", [collapse, poison])
def test_what_was_chosen_goes_back_too(make_trainer, spoil):
    def fitted(callback):
        model = DeepImagePrior(
            network=TinyNet, problem=noisy_problem(3, 16, 17), average_decay=0.95
        )
        callbacks = [Disturb((62,), spoil), callback, CollapseGuard()]
        make_trainer(max_steps=STEPS, callbacks=callbacks).fit(model)
        assert callbacks[-1].rollbacks == 1
        return model

    langevin = Langevin(noise=0.1, burn_in=0.25)
    model = fitted(langevin)
    # The outputs between the last good look, at step 60, and the return at 80 are no samples.
    assert langevin._samples.count == STEPS - STEPS // 4 - 20
    assert torch.equal(model.chosen, langevin._samples.mean)
    assert model.restored.isfinite().all() and langevin.std.isfinite().all()
    stop = AutoStop(window=10, patience=STEPS)
    assert fitted(stop).restored.isfinite().all()
    assert stop.best_step not in range(61, 81)


def test_a_failure_behind_the_last_look_is_mended_before_anything_is_written(make_trainer):
    model, guard = fit(make_trainer, at=(STEPS + 1,), steps=STEPS + 3)
    assert guard.rollbacks == 1 and model.restored.isfinite().all()


def test_a_state_of_nan_is_refused(make_trainer):
    model = DeepImagePrior(network=TinyNet, problem=noisy_problem())
    with torch.no_grad():
        poison(model)
    with pytest.raises(RuntimeError, match="expected a finite state to continue from"):
        make_trainer(max_steps=5, callbacks=[CollapseGuard()]).fit(model)


def test_nan_again_and_again_ends_the_run_with_a_clear_error(make_trainer):
    with pytest.raises(RuntimeError, match=r"NaN in 4 checks in a row.*lower learning rate"):
        fit(make_trainer, at=range(60, STEPS), spoil=poison)
    # With good looks between them, NaN is survived as often as it comes.
    _, guard = fit(make_trainer, at=(32, 47, 62, 77, 92), spoil=poison)
    assert guard.rollbacks == 5


def test_nan_in_the_first_round_is_survived(make_trainer):
    model, guard = fit(make_trainer, at=(2,), spoil=poison)
    assert guard.rollbacks == 1 and model.restored.isfinite().all()


def test_the_count_survives_a_resume(make_trainer, tmp_path):
    def part(steps, ckpt_path=None):
        guard = CollapseGuard()
        model = DeepRED(network=TinyNet, problem=noisy_problem(3, 16, 17), average_decay=0.95)
        callbacks = [
            Disturb((32,), poison),
            guard,
            REDUpdate(smooth, every_n_steps=5),
            LastCheckpoint(),
        ]
        trainer = make_trainer(max_steps=steps, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(model, ckpt_path=ckpt_path)
        return guard

    assert part(43).rollbacks == 1
    assert part(60, tmp_path / RUN / "checkpoints" / "last.ckpt").rollbacks == 1


def test_it_must_stand_before_the_update(make_trainer):
    model = DeepRED(network=TinyNet, problem=noisy_problem())
    trainer = make_trainer(max_steps=3, callbacks=[REDUpdate(smooth), CollapseGuard()])
    with pytest.raises(ValueError, match="CollapseGuard before REDUpdate"):
        trainer.fit(model)


@pytest.mark.parametrize("wrong", [{"drop": 0}, {"drop": float("nan")}, {"patience": 0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        CollapseGuard(**wrong)


def test_an_image_that_sets_out_from_its_first_guess_is_no_collapse(make_trainer):
    # Without a network, out and average are one image at first, and part fast.
    model = DeepRED(network=ImageParameter, problem=noisy_problem(3, 16, 17), input_noise_std=0)
    guard = CollapseGuard()
    update = REDUpdate(lambda x: 0.5 * x, every_n_steps=10, x_update="pnp")
    make_trainer(max_steps=100, callbacks=[guard, update]).fit(model)
    assert (model.out - model.problem.y).abs().mean() > 0.05
    assert guard.rollbacks == 0


def test_a_check_is_judged_at_the_next_one_or_at_the_end(make_trainer, monkeypatch):
    # By hand: the checks of steps 10, 20, … with drop = 6. 12 dB come while the average is fresh;
    # 29.5 dB are 5.3 below the usual 34.8; 27, 20 and 22 dB are more than 6 below the usual 34.2,
    # 34.7 and 32.2. A check that rolls back is not judged itself.
    levels = [35, 12, 35, 34, 29.5, 36, 27, 37, 36, 35, 35, 36, 20, 33, 34, 33, 31, 22]
    fed, rolled_back = iter([35.0, *levels]), []  # the first is that of the start
    monkeypatch.setattr(
        "deepred_pl.callbacks.guard.stability", lambda model: torch.tensor(next(fed))
    )

    class Guard(CollapseGuard):
        def _roll_back_all(self, model, why):
            super()._roll_back_all(model, why)
            rolled_back.append(model.step)

    model = DeepImagePrior(network=TinyNet, problem=noisy_problem(3, 16, 17), average_decay=0.95)
    make_trainer(max_steps=200, callbacks=[Guard()]).fit(model)
    assert rolled_back == [80, 150, 200]
    assert next(fed, None) is None


def test_a_checkpoint_holds_no_collapse_that_was_not_judged(make_trainer, tmp_path):
    def part(steps, *others, ckpt_path=None):
        model = DeepRED(network=TinyNet, problem=noisy_problem(3, 16, 17), average_decay=0.95)
        guard, update = CollapseGuard(), REDUpdate(smooth, every_n_steps=5)
        callbacks = [Disturb((58,), collapse), guard, update, *others]
        trainer = make_trainer(max_steps=steps, callbacks=callbacks, enable_checkpointing=True)
        with suppress(Cut):
            trainer.fit(model, ckpt_path=ckpt_path)
        return guard, psnr(model.restored, model.problem.ground_truth)

    whole = part(100, LastCheckpoint(60))
    cut, _ = part(100, Scissors(60))
    assert cut.rollbacks == 1
    rest = part(100, ckpt_path=tmp_path / RUN.replace("0", "1") / "checkpoints" / "last.ckpt")
    assert whole[0].rollbacks == rest[0].rollbacks == 1
    assert rest[1] == whole[1]


@pytest.mark.parametrize("steps", [38, 55, 58])
def test_a_resumed_fit_judges_as_one_that_was_not_stopped(make_trainer, tmp_path, steps):
    def part(steps, ckpt_path=None):
        guard = CollapseGuard()
        model = DeepRED(network=TinyNet, problem=noisy_problem(3, 16, 17), average_decay=0.95)
        update = REDUpdate(smooth, every_n_steps=5)
        trainer = make_trainer(
            max_steps=steps, callbacks=[guard, update, LastCheckpoint()], enable_checkpointing=True
        )
        trainer.fit(model, ckpt_path=ckpt_path)
        return guard, model

    whole, model = part(63)
    part(steps)
    rest, resumed = part(63, tmp_path / "lightning_logs/version_1/checkpoints/last.ckpt")
    assert rest.state_dict() == whole.state_dict()
    assert torch.equal(resumed.restored, model.restored)


def test_the_copies_use_their_memory_again(make_trainer):
    class Where(Callback):
        def __init__(self, guard):
            self.guard, self.places = guard, []

        def on_train_batch_end(self, trainer, model, *args):
            copies = {**self.guard._good._copies, **self.guard._candidate._copies}
            if model.step % 10 == 0 and model.step >= 40:
                self.places.append({copy.data_ptr() for copy in copies.values()})

    guard = CollapseGuard()
    where = Where(guard)
    model = DeepRED(network=TinyNet, problem=noisy_problem(3, 16, 17))
    callbacks = [guard, REDUpdate(smooth), where]
    make_trainer(max_steps=80, callbacks=callbacks).fit(model)
    first, *others = where.places[0] | where.places[1], *where.places[2:]
    assert all(places <= first for places in others)
