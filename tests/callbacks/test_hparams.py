import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from deepred_pl import DeepImagePrior, DeepRED, REDUpdate
from deepred_pl.callbacks import Writer
from deepred_pl.denoisers import TotalVariation
from deepred_pl.lightning import loggers
from deepred_pl.losses import TotalVariationPenalty
from deepred_pl.networks import ImageParameter
from tests.helpers import TinyNet, noisy_problem, smooth


def entry(folder):
    """What TensorBoard's HParams page reads: the settings, and the final numbers."""
    events = EventAccumulator(str(folder)).Reload()
    metadata = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(metadata).session_start_info
    settings = {
        name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()
    }
    finals = [tag for tag in events.Tags()["scalars"] if tag.startswith("final/")]
    return settings, {tag.removeprefix("final/"): events.Scalars(tag)[-1].value for tag in finals}


def fit(make_trainer, folder, model, *callbacks, labels=None):
    logger = loggers.TensorBoardLogger(folder, default_hp_metric=False)
    writer = Writer()
    writer.labels = labels or {}
    make_trainer(max_steps=3, callbacks=[*callbacks, writer], logger=logger).fit(model)
    return entry(logger.log_dir)


def test_methods_can_be_told_apart_and_have_the_same_columns(make_trainer, tmp_path):
    update = REDUpdate(TotalVariation(0.1), every_n_steps=3, rounds_per_denoising=2)
    red = DeepRED(network=TinyNet, problem=noisy_problem(height=12, width=13), lam=0.25, seed=3)
    settings, final = fit(make_trainer, tmp_path, red, update, labels={"image": "house"})
    assert settings["method"] == "DeepRED" and settings["denoiser"] == "TotalVariation"
    assert (settings["set/lam"], settings["set/k"], settings["set/seed"]) == (0.25, 6, 3)
    assert settings["image"] == "house" and settings["noise"] == "GaussianNoise"
    assert set(final) == {"psnr", "ssim", "residual_to_sigma", "steps", "seconds"}
    truth = red.problem.ground_truth
    psnr = -10 * (red.restored - truth).square().mean().log10()
    assert final["psnr"] == pytest.approx(float(psnr), abs=1e-3) and final["steps"] == 3
    dip = DeepImagePrior(
        TinyNet, problem=noisy_problem(), regularizer=TotalVariationPenalty(weight=0.1)
    )
    others, _ = fit(make_trainer, tmp_path, dip, REDUpdate(smooth))
    assert set(others) == set(settings)
    assert others["method"] == "DIP + TotalVariation" and others["denoiser"] == "none"


def test_without_a_true_image_what_is_known_is_kept(make_trainer, tmp_path):
    problem = noisy_problem()
    problem.ground_truth = None
    _, final = fit(make_trainer, tmp_path, DeepImagePrior(TinyNet, problem=problem))
    assert set(final) == {"residual_to_sigma", "steps", "seconds"}


@pytest.mark.parametrize("sigma", [(1.0, 2.0), None, "strong", lambda: 3])
def test_a_denoiser_may_have_any_sigma(make_trainer, tmp_path, sigma):
    class Odd:
        def __call__(self, x):
            return smooth(x)

    denoiser = Odd()
    denoiser.sigma = sigma
    model = DeepRED(network=TinyNet, problem=noisy_problem())
    settings, _ = fit(make_trainer, tmp_path, model, REDUpdate(denoiser))
    assert settings["denoiser"] == "Odd" and settings["set/denoiser_sigma"] == 0


@pytest.mark.parametrize(
    ("network", "x_update", "method"),
    [
        (TinyNet, "fixed_point", "DeepRED"),
        (ImageParameter, "fixed_point", "RED"),
        (ImageParameter, "pnp", "Plug-and-Play"),
    ],
)
def test_methods_have_their_names(make_trainer, tmp_path, network, x_update, method):
    model = DeepRED(network=network, problem=noisy_problem(), input_noise_std=0)
    settings, _ = fit(make_trainer, tmp_path, model, REDUpdate(smooth, x_update=x_update))
    assert (settings["method"], settings["image"]) == (method, "unnamed")
