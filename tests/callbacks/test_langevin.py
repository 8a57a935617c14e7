"""Langevin dynamics, against formulas of its own."""

import numpy as np
import pytest
import torch
from PIL import Image

from deepred_pl import DeepImagePrior, InverseProblem
from deepred_pl.callbacks import Langevin, LastCheckpoint, Writer
from deepred_pl.lightning import Callback
from deepred_pl.operators import Mask
from tests.helpers import RUN, Cut, Outs, Scissors, TinyNet, noisy_problem, picture


def still(parameters):
    """An optimizer that does not move, so that only Langevin's noise is left."""
    return torch.optim.SGD([{"params": list(parameters), "lr": 1e-30}])


def test_convolution_weights_get_noise_of_the_learning_rate_and_nothing_else_moves(make_trainer):
    class Rate(Callback):  # the noise follows the rate of the step
        def on_train_batch_start(self, trainer, model, *args):
            trainer.optimizers[0].param_groups[0]["lr"] = 0.01

        def on_before_optimizer_step(self, trainer, model, optimizer):
            optimizer.zero_grad()

    model = DeepImagePrior(TinyNet, still, problem=noisy_problem())
    before = {name: p.detach().clone() for name, p in model.network.named_parameters()}
    steps = 40
    make_trainer(max_steps=steps, callbacks=[Rate(), Langevin(noise=3.0)]).fit(model)
    moves = []
    for name, p in model.network.named_parameters():
        if p.ndim == 4:
            moves.append((p.detach() - before[name]).flatten())
        else:
            assert torch.equal(p, before[name])
    moved = torch.cat(moves)
    # 40 independent steps of std 3 · 0.01 each
    want = 3 * 0.01 * steps**0.5
    assert moved.std().item() == pytest.approx(want, rel=4 / (2 * moved.numel()) ** 0.5)
    assert moved.mean().item() == pytest.approx(0, abs=4 * want / moved.numel() ** 0.5)


def test_mean_and_std_are_those_of_the_outputs_behind_the_burn_in(make_trainer, tmp_path):
    model = DeepImagePrior(TinyNet, problem=noisy_problem(3, 12, 13))
    outs, langevin = Outs(), Langevin(burn_in=0.3)
    callbacks = [langevin, outs, Writer()]
    make_trainer(max_steps=20, callbacks=callbacks).fit(model)
    samples = np.stack(outs.outs[6:])
    np.testing.assert_allclose(model.restored, samples.mean(0), atol=1e-6)
    np.testing.assert_allclose(langevin.std, samples.std(0), atol=1e-5)
    written = np.load(tmp_path / RUN / "uncertainty.npy", allow_pickle=False)
    np.testing.assert_allclose(written, samples.std(0)[0].transpose(1, 2, 0), atol=1e-5)
    picture = np.asarray(Image.open(tmp_path / RUN / "uncertainty.png"))
    grey = samples.std(0)[0].mean(0)
    np.testing.assert_allclose(picture, 255 * grey / grey.max(), atol=1)


def test_known_pixels_have_no_uncertainty(make_trainer):
    y, known = picture(3, 12, 13), picture(1, 12, 13) > 0.5
    model = DeepImagePrior(TinyNet, problem=InverseProblem(y, Mask(known)))
    langevin = Langevin()
    make_trainer(max_steps=10, callbacks=[langevin]).fit(model)
    kept = known.expand_as(y)
    assert (langevin.std[kept] == 0).all()
    assert (langevin.std[~kept] > 1e-5).all()


def test_without_the_noise_the_fit_is_another(make_trainer):
    def fit(*callbacks):
        model = DeepImagePrior(TinyNet, problem=noisy_problem())
        make_trainer(max_steps=5, callbacks=list(callbacks)).fit(model)
        return model.out

    plain, noisy = fit(), fit(Langevin())
    assert not torch.allclose(plain, noisy, atol=1e-4)
    assert torch.equal(noisy, fit(Langevin()))  # a function of the seed
    assert not torch.equal(noisy, fit(Langevin(noise=1.0)))


@pytest.mark.parametrize("cut", [2, 9])
def test_a_fit_that_was_cut_off_has_the_same_samples(make_trainer, tmp_path, cut):
    def fit(last, ckpt_path=None):
        model, langevin = DeepImagePrior(TinyNet, problem=noisy_problem()), Langevin(burn_in=0.25)
        callbacks = [langevin, last]
        trainer = make_trainer(max_steps=16, callbacks=callbacks, enable_checkpointing=True)
        trainer.fit(model, ckpt_path=ckpt_path)
        return model, langevin

    with pytest.raises(Cut):
        fit(Scissors(cut))
    resumed, again = fit(LastCheckpoint(), tmp_path / RUN / "checkpoints" / "last.ckpt")
    whole, langevin = fit(LastCheckpoint())
    assert again._samples.count == 12
    assert torch.equal(resumed.restored, whole.restored) and torch.equal(again.std, langevin.std)


@pytest.mark.parametrize("burn_in", [-0.1, 1.0, 7000, float("nan")])
def test_burn_in_is_a_fraction(burn_in):
    with pytest.raises(ValueError, match=r"fraction of the run in \[0, 1\)"):
        Langevin(burn_in=burn_in)


def test_other_mistakes_are_refused(make_trainer):
    with pytest.raises(ValueError, match="noise must be > 0"):
        Langevin(noise=0)
    model = DeepImagePrior(TinyNet, problem=noisy_problem())
    trainer = make_trainer(max_steps=-1, max_time={"seconds": 5}, callbacks=[Langevin()])
    with pytest.raises(ValueError, match="fraction of the trainer's max_steps"):
        trainer.fit(model)
