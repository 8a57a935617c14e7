import math

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from deepred_pl import (
    DeepImagePrior,
    DeepRED,
    InverseProblem,
    REDUpdate,
    RestorationDataModule,
)
from deepred_pl.callbacks import LastCheckpoint, Writer
from deepred_pl.lightning import loggers
from deepred_pl.noise import GaussianNoise
from deepred_pl.report import compare, diagnosis, score
from tests.helpers import RUN, TinyNet, noisy_problem, picture, result_of, smooth


def run(make_trainer, model, data=None, steps=5, **settings):
    callbacks = [REDUpdate(smooth, every_n_steps=2), Writer(), LastCheckpoint()]
    trainer = make_trainer(
        max_steps=steps, callbacks=callbacks, enable_checkpointing=True, **settings
    )
    trainer.fit(model, data)
    return trainer


def test_a_run_leaves_its_pictures_figures_and_checkpoint(make_trainer, tmp_path):
    model = DeepRED(network=TinyNet, problem=noisy_problem(3, 12, 13), seed=3)
    run(make_trainer, model)
    result = result_of(tmp_path / RUN)
    truth = model.problem.ground_truth.double().numpy()
    for name in ("out", "average", "x"):
        mse = ((getattr(model, name).double().numpy() - truth) ** 2).mean()
        assert result["psnr"][name] == pytest.approx(-10 * math.log10(mse), abs=1e-3)
    assert result["psnr"]["restored"] == result["psnr"]["average"]
    assert 0 < result["ssim"]["measurement"] < 1
    assert result["metric_on"] == "rgb" and result["noise_sigma"] == pytest.approx(25)
    assert (result["steps"], result["seed"], result["stop_reason"]) == (5, 3, "max_steps")
    assert result["seconds"] > 0 and result["denoiser_wait_seconds"] >= 0
    restored = np.asarray(Image.open(tmp_path / RUN / "restored.png"))
    want = np.rint(model.restored[0].movedim(0, -1).numpy() * 255)
    np.testing.assert_array_equal(restored, want)
    assert Image.open(tmp_path / RUN / "comparison.png").size[1] > 12
    assert (tmp_path / RUN / "checkpoints" / "last.ckpt").is_file()


def test_without_a_ground_truth_metrics_are_null(make_trainer, tmp_path):
    np.save(tmp_path / "y.npy", picture(1, 12, 13)[0, 0].numpy())
    data = RestorationDataModule(measurement=tmp_path / "y.npy", noise=GaussianNoise(None))
    run(make_trainer, DeepImagePrior(network=TinyNet), data)
    result = result_of(tmp_path / RUN)
    assert set(result["psnr"].values()) == {None} and set(result["ssim"].values()) == {None}
    assert result["metric_on"] == "grey"
    assert tifffile.imread(tmp_path / RUN / "restored.tif").dtype == np.float32


def test_sixteen_bits_are_written_back(make_trainer, tmp_path):
    values = (picture(3, 12, 13)[0].movedim(0, -1).numpy() * 65535).astype(np.uint16)
    tifffile.imwrite(tmp_path / "y.tif", values)
    data = RestorationDataModule(measurement=tmp_path / "y.tif")
    run(make_trainer, DeepRED(network=TinyNet), data)
    assert tifffile.imread(tmp_path / RUN / "restored.tif").dtype == np.uint16


def test_a_perfect_measurement_does_not_stop_the_writing(make_trainer, tmp_path):
    data = RestorationDataModule(ground_truth="sample:camera")  # no noise: infinite PSNR
    run(make_trainer, DeepImagePrior(network=TinyNet), data, steps=1)
    assert result_of(tmp_path / RUN)["psnr"]["measurement"] is None


def test_every_run_without_a_logger_has_a_directory_of_its_own(make_trainer, tmp_path):
    others = tmp_path / "config.yaml", tmp_path / "lightning_logs" / "version_3" / "restored.png"
    for file in others:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("the user's")
    for version in (4, 5):
        run(make_trainer, DeepImagePrior(network=TinyNet, problem=noisy_problem()))
        directory = tmp_path / "lightning_logs" / f"version_{version}"
        assert result_of(directory)["steps"] == 5
    assert [file.read_text() for file in others] == ["the user's"] * 2


def test_a_directory_with_the_result_of_another_run_is_refused(make_trainer, tmp_path):
    """A logger whose directory is fixed; the same callback may write again, and a resumed run."""

    def fit(writer, ckpt_path=None, steps=2):
        logger = loggers.CSVLogger(tmp_path, name="", version="")
        trainer = make_trainer(max_steps=steps, logger=logger, callbacks=[writer])
        model = DeepImagePrior(network=TinyNet, problem=noisy_problem())
        trainer.fit(model, ckpt_path=ckpt_path)
        return trainer

    writer = Writer()
    fit(writer)
    fit(writer).save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="expected a run directory of its own"):
        fit(Writer())
    fit(Writer(), tmp_path / "last.ckpt", steps=3)
    assert result_of(tmp_path)["steps"] == 3


def test_a_directory_that_cannot_be_written_is_found_before_the_fit(make_trainer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    model = DeepRED(network=TinyNet, problem=noisy_problem())
    with pytest.raises(OSError, match=r"expected to write the run directory .*default_root_dir"):
        run(make_trainer, model, default_root_dir=tmp_path / "file" / "run")
    assert model.step == 0


@pytest.mark.parametrize("missing, told", [(0, False), (0.9, False), (1.2, True), (3, True)])
def test_what_is_missing_is_told_where_it_is_more_than_the_noise(missing, told):
    """The residual's variance is that of the noise, 1, and of what is missing."""
    generator, sigma = torch.Generator().manual_seed(0), 10 / 255
    truth = torch.full((1, 3, 120, 160), 0.5)
    y = truth + sigma * torch.randn(truth.shape, generator=generator)
    problem = InverseProblem(y, noise=GaussianNoise(10))
    restored = truth + missing * sigma * torch.randn(truth.shape, generator=generator)
    result = score(problem, restored)
    expected = (1 + missing**2) ** 0.5
    assert result["residual_to_sigma"] == pytest.approx(expected, rel=0.01)
    assert ("times the noise and looks like noise" in diagnosis(result)) == told
    assert score(InverseProblem(y), restored)["residual_to_sigma"] is None


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_the_comparison_shows_three_panels(make_trainer, channels):
    model = DeepRED(network=TinyNet, problem=noisy_problem(channels, 12, 30))
    model.step = 1  # something is restored
    shown = compare(model.problem, model.restored)
    assert shown.shape[:2] == (1, 3)
    scale = 256 // 12
    assert shown.shape[-2:] == (12 * scale + 28, 3 * (30 * scale + 8))
    assert shown.min() >= 0 and shown.max() <= 1
