"""Methods as compositions, against independent implementations of the same objective."""

from functools import partial

import numpy as np
import pytest
import skimage.data
import torch
from scipy.stats import norm
from skimage.restoration import denoise_nl_means

from deepred_pl import DeepRED, InverseProblem, REDUpdate
from deepred_pl.denoisers import NonLocalMeans
from deepred_pl.metrics import psnr
from deepred_pl.networks import ImageParameter
from deepred_pl.noise import GaussianNoise
from deepred_pl.operators import Blur, Identity
from deepred_pl.optim import WarmupCosine


def nlm(image, sigma):
    level = sigma / 255
    return denoise_nl_means(
        image, patch_size=5, patch_distance=6, h=0.6 * level, sigma=level, fast_mode=True
    )


def completed(y, clean, sigma):
    """y with clipped values replaced by their mean before that: truncated normal distributions."""

    def excess(t):
        return np.exp(norm.logpdf(t) - norm.logcdf(t))

    s = sigma / 255
    below, above = clean - s * excess(-clean / s), clean + s * excess((clean - 1) / s)
    return np.where(y == 0, below, np.where(y == 1, above, y))


def red_by_fixed_points(y, kernel, sigma, lam, iterations=100):
    """argmin of ‖k ∗ x − y‖² + λ xᵀ(x − f(x)): (KᵀK + λ) x ← Kᵀy + λ f(x), in Fourier space."""
    padded = np.zeros_like(y)
    height, width = kernel.shape
    padded[:height, :width] = kernel
    padded = np.roll(padded, (-(height // 2), -(width // 2)), (0, 1))
    transfer = np.fft.fft2(padded)
    x = y
    for _ in range(iterations):
        measured = np.fft.ifft2(transfer * np.fft.fft2(x)).real
        right = np.conj(transfer) * np.fft.fft2(completed(y, measured, sigma))
        right += lam * np.fft.fft2(nlm(x, 10))
        x = np.fft.ifft2(right / (np.abs(transfer) ** 2 + lam)).real.clip(0, 1)
    return x


def gaussian(size, width):
    profile = np.exp(-0.5 * (np.arange(size) - size // 2) ** 2 / width**2)
    return np.outer(profile, profile) / profile.sum() ** 2


def fitted(trainer, problem, update, weight):
    """x of the network-free fit with λ = μ = weight."""
    model = DeepRED(
        network=ImageParameter,
        optimizer=partial(torch.optim.Adam, lr=0.02),
        lr_scheduler=partial(WarmupCosine, total_steps=trainer.max_steps, warmup_steps=10),
        lam=weight,
        mu=weight,
        input_noise_std=0,
        result="x",
        problem=problem,
    )
    trainer.callbacks.append(update)
    trainer.fit(model)
    return model.restored


# A mild blur: under one that takes frequencies away, RED with non-local means has no stable fixed
# point, and any loop drifts from it.
CASES = {
    "denoising": (Identity(), np.ones((1, 1)), 25.0, 2.5),
    "deblurring": (Blur.gaussian(7, 0.5), gaussian(7, 0.5), 5.0, 0.3),
}


@pytest.mark.parametrize("name", CASES)
def test_red_alone_ends_at_the_fixed_point_of_an_independent_loop(make_trainer, name):
    operator, kernel, sigma, lam = CASES[name]
    crop = skimage.data.camera()[100:228, 180:308] / 255
    truth = torch.from_numpy(crop)[None, None].float()
    noise = GaussianNoise(sigma)
    y = noise.sample(operator(truth), torch.Generator().manual_seed(0)).clamp(0, 1)
    want = red_by_fixed_points(y[0, 0].double().numpy(), kernel, sigma, lam)
    problem = InverseProblem(y, operator, noise, truth)
    restored = fitted(make_trainer(max_steps=1000), problem, REDUpdate(NonLocalMeans(10)), lam)
    want = torch.from_numpy(want)[None, None].float()
    ours, theirs = psnr(restored, truth).item(), psnr(want, truth).item()
    assert ours == pytest.approx(theirs, abs=0.1)
    assert psnr(restored, want.clamp(0, 1)) > 45
    assert theirs > psnr(y, truth).item() + 2  # or nothing was restored


def test_plug_and_play_ends_at_the_fixed_point_of_an_independent_loop(make_trainer):
    """x ← f(v), u ← u + out − x, out ← argmin ‖out − y‖² + μ ‖out − x + u‖²."""
    crop = skimage.data.camera()[100:164, 180:251] / 255
    truth = torch.from_numpy(crop)[None, None].float()
    noise = GaussianNoise(25)
    y = noise.sample(truth, torch.Generator().manual_seed(0)).clamp(0, 1)
    problem = InverseProblem(y, noise=noise, ground_truth=truth)
    target, mu = y[0, 0].double().numpy(), 1.0
    x, u, out = target, np.zeros_like(target), target
    for _ in range(200):
        x = nlm(out + u, 25).clip(0, 1)
        u = u + out - x
        out = (completed(target, out, 25) + mu * (x - u)) / (1 + mu)
    update = REDUpdate(NonLocalMeans(25), x_update="pnp")
    restored = fitted(make_trainer(max_steps=1500), problem, update, mu)
    want = torch.from_numpy(x)[None, None].float()
    ours, theirs = psnr(restored, truth).item(), psnr(want, truth).item()
    assert ours == pytest.approx(theirs, abs=0.1)
    assert psnr(restored, want) > 45
    assert theirs > psnr(y, truth).item() + 7
