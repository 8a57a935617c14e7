"""Which settings are chosen for an image."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch

from deepred_pl import choose
from deepred_pl.choose import as_options, seconds_of, seconds_per_step, task_of
from deepred_pl.cli import RestorationCLI, settings_of
from deepred_pl.images import write_image
from deepred_pl.jpeg import JPEG
from deepred_pl.noise import GaussianNoise, PoissonNoise
from deepred_pl.operators import (
    Blur,
    Downsample,
    Identity,
    Mask,
    Operator,
    Radon,
    UnknownBlur,
    without,
)
from deepred_pl.problem import InverseProblem
from deepred_pl.restore import restore
from tests.helpers import picture

EACH = {"32-true": 0.1, "bf16-mixed": 0.2}  # seconds per step


@pytest.fixture
def chosen(tmp_path, monkeypatch):
    """Choose the settings of an image as of this configuration, by a clock of its own."""
    times, now = dict(EACH), [0.0]
    monkeypatch.setattr(choose, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def pretend(assemble, problem, settings):
        now[0] += 1
        width = settings.get("model.network", {}).get("init_args", {}).get("width", 32)
        return times[settings.get("trainer.precision", "32-true")] * (width / 32) ** 2

    monkeypatch.setattr(choose, "seconds_per_step", pretend)

    def call(y, config="denoising", *options, effort="default", name="y.png", **seconds):
        times.update(seconds)
        write_image(tmp_path / "y.tif", y) if name == "y.png" else None
        path = tmp_path / ("y.tif" if name == "y.png" else name)
        options = [f"--data.measurement={path}", "--trainer.accelerator=cpu", *options]
        first = [f"--config={config}"]
        given = {option[2:].partition("=")[0] for option in options}

        def assemble(extra):
            return RestorationCLI([*first, *extra, *options], run=False)

        return choose.choose(assemble, given, effort)

    return call


def noisy(sigma, channels=3, height=64, width=80):
    image = picture(channels, height, width)
    return GaussianNoise(sigma).sample(image, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("effort, seconds", [("90s", 90), ("5m", 300), ("1.5h", 5400)])
def test_a_time_is_in_seconds_and_an_effort_is_none(effort, seconds):
    assert seconds_of(effort) == seconds
    assert all(seconds_of(name) is None for name in ("fast", "default", "best"))


@pytest.mark.parametrize("effort", ["", "5", "m", "0m", "-5m", "5 m", "5d", "1e3s", "Fast"])
def test_another_effort_is_refused(effort):
    with pytest.raises(ValueError, match="fast, default, best or a time such as 90s"):
        seconds_of(effort)


@pytest.mark.parametrize(
    "operator, task",
    [
        (None, "denoising"),
        (Identity(), "denoising"),
        (Blur.uniform(3), "deblurring_uniform"),
        (Downsample(2), "super_resolution"),
        (Mask(np.ones((4, 4))), "inpainting"),
        (Radon(4), "tomography"),
        (JPEG(), "jpeg"),
        (UnknownBlur(), "deblurring_blind"),
    ],
)
def test_each_operator_has_a_task(operator, task):
    assert task_of(operator) == task


def test_an_operator_without_a_task_is_refused():
    class Sums(Operator):
        def forward(self, x):
            return x.sum(-1, keepdim=True)

        def image_shape(self, measurement_shape):
            return (*measurement_shape[:-1], 8)

    with pytest.raises(ValueError, match="no configuration is known for Sums; name one"):
        task_of(Sums())


@pytest.mark.parametrize("boundary", ["reflect", "unknown"])
def test_missing_values_behind_a_blur_are_no_noise(boundary):
    y = Blur.uniform(9, boundary="reflect")(picture(1, 96, 128))
    y = GaussianNoise(1.5).sample(y, torch.Generator().manual_seed(0))
    missing = torch.zeros_like(y, dtype=torch.bool)
    missing[..., 40:43, 50:53] = True
    operator = without(Blur.uniform(9, boundary=boundary), missing)
    problem = InverseProblem(torch.where(missing, 0, y), operator, GaussianNoise(1))
    assert 1.2 < choose._estimated_sigma(problem) < 2


@pytest.mark.parametrize("sigma, scale", [(50, 1), (25, 1), (10, 0.16), (5, 0.04)])
def test_weights_and_the_noise_on_z_fall_with_the_noises_variance(chosen, sigma, scale):
    settings = chosen(noisy(sigma), "denoising", f"--data.noise.sigma={sigma}").settings
    assert settings["model.lam"] == settings["model.mu"] == pytest.approx(0.5 * scale, rel=1e-3)
    assert settings["model.input_noise_std"] == pytest.approx(0.1 * scale, rel=1e-3)
    assert "data.noise" not in settings


def test_noise_that_is_stated_much_too_strong_is_mentioned(chosen):
    image = noisy(20, 3, 96, 112)
    said = chosen(image, "denoising", "--data.noise.sigma=26").assumed["data.noise"]
    assert re.fullmatch(r"white noise of 26 grey levels, though .* seems to be (19|2[0-2]).*", said)
    assert "data.noise" not in chosen(image, "denoising", "--data.noise.sigma=20").assumed


def test_the_noise_is_estimated_where_it_can_be(chosen):
    choice = chosen(noisy(15))
    assert "white noise of 1" in choice.assumed["data.noise"]
    small = Downsample(2)(picture(3, 128, 160))
    loud = GaussianNoise(20).sample(small, torch.Generator().manual_seed(0))
    quiet = chosen(small, "super_resolution", "--data.operator.factor=2")
    assert quiet.assumed == {"data.noise": "no noise"}
    assert "model.weighting" not in quiet.settings
    settings = chosen(loud, "super_resolution", "--data.operator.factor=2").settings
    assert settings["data.noise"]["init_args"]["sigma"] == pytest.approx(20, rel=0.2)
    assert settings["model.weighting"] == "discrepancy"


def test_a_constant_channel_does_not_state_that_there_is_no_noise(chosen):
    y = noisy(15)
    y[:, 2] = 0.5
    sigma = chosen(y).settings["data.noise"]["init_args"]["sigma"]
    assert 13 < sigma < 17  # one for all channels


@pytest.mark.parametrize("dtype, white", [("uint16", 4000), ("float32", 300.0)])
def test_the_range_of_few_bits_or_large_floats_is_chosen(chosen, tmp_path, dtype, white):
    stored = (noisy(10)[0].movedim(0, -1).clamp(0, 1).numpy() * white).astype(dtype)
    tifffile.imwrite(tmp_path / "cells.tif", stored, photometric="rgb")
    choice = chosen(None, name="cells.tif")
    low, high = choice.settings["data.intensity_range"]
    assert low == 0 and white <= high < 1.1 * white
    assert 8 < choice.settings["data.noise"]["init_args"]["sigma"] < 13
    full = (stored * (60000 / white)).astype("uint16")
    tifffile.imwrite(tmp_path / "cells.tif", full, photometric="rgb")
    assert "data.intensity_range" not in chosen(None, name="cells.tif").settings


def test_what_is_given_is_not_chosen(chosen):
    given = {
        "model.lam": 3,
        "model.input_noise_std": 0.05,
        "trainer.max_steps": 77,
        "trainer.precision": "32-true",
        "model.network.width": 8,
        "data.hold_out": 0,
        "data.noise.sigma": 12,
    }
    settings = chosen(noisy(10), "denoising", *as_options(given), effort="5m").settings
    assert not settings.keys() & given.keys() and "model.network" not in settings
    assert settings["model.lr_scheduler"]["init_args"]["total_steps"] == 77


def test_small_images_get_more_noise_on_z_in_inpainting(chosen, tmp_path):
    known = torch.ones(1, 1, 64, 80)
    known[..., 30:33, :] = 0
    write_image(tmp_path / "mask.png", known)
    mask = f"--data.operator.mask={tmp_path / 'mask.png'}"
    settings = chosen(picture(3, 64, 80), "inpainting", mask).settings
    assert settings["model.input_noise_std"] == 0.2  # twice that of 256×256 pixels
    given = chosen(picture(3, 64, 80), "inpainting", mask, "--model.input_noise_std=0.3")
    assert "model.input_noise_std" not in given.settings


def test_steps_and_width_follow_the_effort(chosen):
    def steps(effort):
        settings = chosen(noisy(10), effort=effort).settings
        total = settings["model.lr_scheduler"]["init_args"]["total_steps"]
        assert total == settings["trainer.max_steps"]
        return total, settings["model.network"]["init_args"]["width"]

    assert (steps("fast"), steps("default"), steps("best")) == ((300, 32), (600, 32), (600, 64))
    # 0.1 s each, less a second for each of two measured times, and two to end
    assert steps("60s") == (560, 32)
    assert steps("20m") == (2987, 64)  # four times as slow, and measured too
    with pytest.raises(ValueError, match=r"10s is too short: it leaves 10 s .* needs 19 s"):
        steps("10s")


def test_bfloat16_is_chosen_where_it_is_faster(chosen):
    assert "trainer.precision" not in chosen(noisy(10)).settings
    assert chosen(noisy(10), **{"bf16-mixed": 0.05}).settings["trainer.precision"] == "bf16-mixed"


def test_values_are_held_out_where_no_noise_model_keeps_the_fit_from_overfitting(chosen):
    small = Downsample(2)(picture(3, 128, 160))
    settings = chosen(small, "super_resolution", "--data.operator.factor=2").settings
    assert settings["data.hold_out"] == 0.02
    assert settings["trainer.callbacks+"][0]["init_args"] == {"rule": "holdout"}
    tiny = chosen(small[..., :20, :40], "super_resolution", "--data.operator.factor=2")
    assert "data.hold_out" not in tiny.settings
    assert "too few values" in tiny.assumed["data.hold_out"]
    assert "data.hold_out" not in chosen(noisy(10)).settings


def test_a_blurred_jpegs_noise_is_not_white(chosen, tmp_path):
    from PIL import Image

    blurred = Blur.gaussian(9, 1.2)(picture(3, 64, 80))[0].movedim(0, -1)
    Image.fromarray((blurred.clamp(0, 1) * 255).byte().numpy()).save(tmp_path / "y.jpg", quality=80)
    options = ["--data.operator.size=9"]
    choice = chosen(None, "deblurring_uniform", *options, name="y.jpg")
    assert choice.settings["model.fidelity"] == "likelihood"
    assert "not white" in choice.assumed["model.fidelity"]
    stated = [*options, "--model.fidelity=likelihood"]
    settings = chosen(blurred.movedim(-1, 0)[None], "deblurring_uniform", *stated).settings
    assert (
        settings["model.lam"] == choice.settings["model.lam"] and "model.fidelity" not in settings
    )


def test_chosen_settings_are_valid_on_the_command_line(chosen):
    choice = chosen(noisy(10, 3, 64, 80), effort="best", **{"bf16-mixed": 0.05})
    settings = settings_of(["--config=denoising", *as_options(choice.settings)])
    model = settings["model"]["init_args"]
    assert model["lam"] == choice.settings["model.lam"]
    assert model["network"]["init_args"]["width"] == 64
    assert settings["trainer"]["precision"] == "bf16-mixed"


def test_the_time_of_a_step_is_measured_whatever_the_number_of_steps(tmp_path):
    write_image(tmp_path / "y.tif", noisy(25, 1, 40, 48))
    tiny = ["--model.network.width=4", "--model.network.scales=2", "--trainer.accelerator=cpu"]
    options = ["--config=denoising", f"--data.measurement={tmp_path / 'y.tif'}", *tiny]
    for steps in (5, 5000):

        def assemble(extra, steps=steps):
            return RestorationCLI([*options, *extra, f"--trainer.max_steps={steps}"], run=False)

        problem = choose.set_up(assemble([]).datamodule)
        assert 1e-4 < seconds_per_step(assemble, problem, {}) < 10
    assert not any(tmp_path.glob("lightning_logs"))


# In Python


SMALL = {
    "model.network.width": 4,
    "model.network.scales": 2,
    "trainer.max_steps": 12,
    "trainer.accelerator": "cpu",
    "trainer.precision": 32,
}


def test_restore_chooses_for_the_operator_and_reports():
    y = Blur.gaussian(9, 1.2)(noisy(2, 3, 48, 64)).clamp(0, 1)[0]
    blur = Blur.gaussian(9, 1.2, boundary="reflect")
    restored, report = restore(y, overrides=SMALL, operator=blur, effort="fast", report=True)
    assert restored.shape == y.shape and restored.dtype == y.dtype
    assert report["result"]["fidelity"] == "backprojection" and report["result"]["steps"] == 12
    assert "white noise of " in report["assumed"]["data.noise"]
    assert report["chosen"]["model.lr_scheduler"]["init_args"]["total_steps"] == 12
    photo = PoissonNoise(40).sample(picture(1, 48, 64), torch.Generator().manual_seed(0))
    counted = restore(photo[0].clamp(0, 1), overrides=SMALL, noise=PoissonNoise(40))
    assert counted.shape == (1, 48, 64)


def test_restore_chooses_for_tiles():
    y = noisy(20, 3, 48, 80).clamp(0, 1)[0]
    restored, report = restore(y, overrides=SMALL, tile=48, report=True)
    assert restored.shape == y.shape and report["result"]["steps"] == 24


def test_restore_takes_an_effort_or_a_task():
    with pytest.raises(ValueError, match="effort='5m' chooses settings that the task"):
        restore(picture()[0], "denoising", effort="5m")
