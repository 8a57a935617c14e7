import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from deepred_pl import DeepImagePrior, DeepRED, InverseProblem, REDUpdate
from deepred_pl.callbacks import Panels
from deepred_pl.lightning import Callback, LightningModule, loggers
from deepred_pl.operators import Downsample
from tests.helpers import TinyNet, noisy_problem, picture, smooth

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
    logger = loggers.TensorBoardLogger(tmp_path)
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
        parts = {1: [0], 3: [0, 1, 2], 5: [2]}[channels]  # of five the middle one
        kept = expected[0, parts].clamp(0, 1).movedim(0, -1).numpy()
        last = pictures[f"panels/{name}"][7].reshape(12, 13, -1)
        assert np.abs(last - 255 * kept).max() <= 0.51, name


def test_dip_without_a_true_image_has_what_there_is(make_trainer, tmp_path):
    problem = InverseProblem(picture(1, 9, 9))
    _, pictures = fitted(make_trainer, tmp_path, problem, Panels(), kind=DeepImagePrior)
    assert set(pictures) == {"panels/measurement", "panels/out", "panels/average"}
    assert len(pictures["panels/out"]) == 7  # a tenth of so few steps is one


class Constant(nn.Module):
    """An image that takes no time."""

    def __init__(self, channels, height=97, width=131):
        super().__init__()
        self.image = nn.Parameter(torch.rand(1, channels, height, width))

    def forward(self, z):
        return self.image


def constant():
    """A restoration with all panels, whose pictures do not compress: they are noise."""
    truth = torch.rand(1, 3, 97, 131)
    problem = InverseProblem(torch.rand(1, 3, 97, 131), ground_truth=truth)
    return DeepRED(network=Constant, problem=problem, input_noise_std=0)


def blank(x):
    """A denoiser whose answer keeps x and u noisy."""
    return 1 - x


def size(folder):
    return sum(path.stat().st_size for path in Path(folder).glob("events*"))


@pytest.mark.parametrize("every, looks", [(None, 10), (1, 100), (400, 1), (90, 5)])
def test_a_log_stays_small(make_trainer, tmp_path, every, looks, monkeypatch):
    monkeypatch.setattr("deepred_pl.callbacks.panels.MOST_BYTES", 400_000)
    logger = loggers.TensorBoardLogger(tmp_path)
    callbacks = [REDUpdate(blank), Panels(every)]
    make_trainer(max_steps=400, callbacks=callbacks, logger=logger).fit(constant())
    pictures = shown(logger.log_dir)
    assert len(pictures["panels/out"]) == looks and 400 in pictures["panels/out"]
    height, width = pictures["panels/out"][400].shape[:2]
    assert abs(width / height - 131 / 97) < 0.3
    overhead = 300 * sum(map(len, pictures.values()))  # of an event and a PNG
    assert size(logger.log_dir) <= 400_000 + overhead
    if looks > 1:  # and what there is is used
        assert size(logger.log_dir) > 100_000


def test_a_fit_without_a_known_end_shows_its_end_too(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr("deepred_pl.callbacks.panels.TIMED", 20)

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 33

    logger = loggers.TensorBoardLogger(tmp_path)
    time = {"minutes": 5}
    callbacks = [Stop(), REDUpdate(blank), Panels()]
    make_trainer(max_steps=-1, max_time=time, callbacks=callbacks, logger=logger).fit(constant())
    assert list(shown(logger.log_dir)["panels/out"]) == [*range(2, 21, 2), 33]


def test_two_share_what_a_log_may_take(make_trainer, tmp_path, monkeypatch):
    class Two(LightningModule):
        def __init__(self):
            super().__init__()
            self.a, self.b = constant(), constant()
            self.configure_optimizers = lambda: torch.optim.Adam(self.parameters())
            self.train_dataloader = self.a.train_dataloader

        def training_step(self, batch, batch_idx):
            return self.a.training_step() + self.b.training_step()

    monkeypatch.setattr("deepred_pl.callbacks.panels.MOST_BYTES", 400_000)
    logger = loggers.TensorBoardLogger(tmp_path)
    both = [REDUpdate(blank, submodule=name) for name in "ab"]
    both += [Panels(submodule=name) for name in "ab"]
    make_trainer(max_steps=20, callbacks=both, logger=logger).fit(Two())
    pictures = shown(logger.log_dir)
    assert {"a/out", "b/out", "a/measurement", "b/measurement"} <= set(pictures)
    assert size(logger.log_dir) <= 400_000 + 300 * sum(map(len, pictures.values()))


def test_an_accumulating_parent_has_all_looks(make_trainer, tmp_path):
    class Parent(LightningModule):
        def __init__(self):
            super().__init__()
            self.a = DeepRED(network=TinyNet, problem=noisy_problem())
            self.configure_optimizers = lambda: torch.optim.Adam(self.parameters())
            self.train_dataloader = self.a.train_dataloader

        def training_step(self, batch, batch_idx):
            return self.a.training_step()

    logger = loggers.TensorBoardLogger(tmp_path)
    callbacks = [REDUpdate(smooth, submodule="a"), Panels(submodule="a")]
    settings = {"max_steps": 20, "accumulate_grad_batches": 4, "logger": logger}
    make_trainer(callbacks=callbacks, **settings).fit(Parent())
    assert list(shown(logger.log_dir)["a/out"]) == list(range(2, 21, 2))


def test_a_measurement_of_another_shape_is_shown_as_an_image(make_trainer, tmp_path):
    truth = picture(2, 12, 16)
    operator = Downsample(2)
    problem = InverseProblem(operator(truth), operator, ground_truth=truth)
    _, pictures = fitted(make_trainer, tmp_path, problem, Panels(7))
    assert pictures["panels/measurement"][0].shape[:2] == (12, 16)
    assert pictures["panels/out"][7].shape[:2] == (12, 16)


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
