import io

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deepred_pl import DeepImagePrior, DeepRED, InverseProblem, REDUpdate
from deepred_pl.callbacks import Panels
from tests.conftest import TinyNet, noisy_problem, picture, smooth

ALL = {"measurement", "out", "average", "x", "u, rescaled", "error × 5"}


def shown(folder):
    """The pictures of a run by name and step, (H, W) or (H, W, 3), as TensorBoard reads them."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    pictures = {}
    for tag in events.Tags()["images"]:
        for event in events.Images(tag):
            image = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
            pictures.setdefault(tag, {})[event.step] = image
    return pictures


def fitted(make_trainer, tmp_path, problem, panels, steps=7, kind=DeepRED, **settings):
    model = kind(network=TinyNet, problem=problem)
    logger = TensorBoardLogger(tmp_path)
    callbacks = [REDUpdate(smooth, every_n_steps=2), panels]
    make_trainer(max_steps=steps, callbacks=callbacks, logger=logger, **settings).fit(model)
    return model, shown(logger.log_dir)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_the_panels_are_the_images_of_the_fit(make_trainer, tmp_path, channels):
    problem = noisy_problem(channels, 12, 13)
    model, pictures = fitted(make_trainer, tmp_path, problem, Panels(every_n_steps=3))
    assert set(pictures) == {f"panels/{name}" for name in ALL}
    assert list(pictures["panels/measurement"]) == [0]
    u = model.u.double()
    for name, expected in {
        "out": model.out,
        "average": model.average,
        "x": model.x,
        "u, rescaled": 0.5 + 0.5 * u / u.abs().max(),
        "error × 5": 5 * (model.average.clamp(0, 1) - problem.ground_truth).abs(),
    }.items():
        assert list(pictures[f"panels/{name}"]) == [3, 6, 7]  # the last is the end
        kept = expected[0, : 3 if channels >= 3 else 1].clamp(0, 1).movedim(0, -1).numpy()
        last = pictures[f"panels/{name}"][7].reshape(12, 13, -1)
        assert np.abs(last - 255 * kept).max() <= 0.51, name


def test_dip_without_a_true_image_has_what_there_is(make_trainer, tmp_path):
    problem = InverseProblem(picture(1, 9, 9))
    _, pictures = fitted(make_trainer, tmp_path, problem, Panels(), kind=DeepImagePrior)
    assert set(pictures) == {"panels/measurement", "panels/out", "panels/average"}
    assert len(pictures["panels/out"]) == 7  # a tenth of so few steps is one


@pytest.mark.parametrize("every, looks", [(None, 10), (1, 400), (400, 1)])
def test_a_log_stays_small(make_trainer, tmp_path, every, looks, monkeypatch):
    monkeypatch.setattr("deepred_pl.callbacks.panels.MOST_BYTES", 100_000)
    problem = InverseProblem(torch.rand(1, 3, 97, 131))  # noise does not compress

    class Constant(torch.nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.image = torch.nn.Parameter(torch.rand(1, channels, 97, 131))

        def forward(self, z):
            return self.image

    model = DeepImagePrior(network=Constant, problem=problem, input_noise_std=0)
    logger = TensorBoardLogger(tmp_path)
    make_trainer(max_steps=400, callbacks=[Panels(every)], logger=logger).fit(model)
    pictures = shown(logger.log_dir)
    assert len(pictures["panels/out"]) == looks
    height, width = pictures["panels/out"][400].shape[:2]
    assert abs(width / height - 131 / 97) < 0.3
    pngs = sum(image.size for panel in pictures.values() for image in panel.values())
    assert pngs <= 100_000


def test_where_nobody_looks_nothing_is_made(make_trainer, tmp_path):
    model = DeepRED(network=TinyNet, problem=noisy_problem())
    panels = Panels(every_n_steps=1)
    panels._show = None  # would fail
    make_trainer(max_steps=2, callbacks=[REDUpdate(smooth), panels]).fit(model)
    _, pictures = fitted(make_trainer, tmp_path, noisy_problem(), Panels(0))
    assert pictures == {}


def test_a_negative_number_of_steps_is_refused():
    with pytest.raises(ValueError, match="every_n_steps must be at least 0, got -1"):
        Panels(-1)
