"""Restorations as a part of something larger, as notebooks/03_embedding.ipynb shows them."""

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningDataModule, LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from deepred_pl import DeepRED, InverseProblem, REDUpdate, restore
from deepred_pl.noise import GaussianNoise
from deepred_pl.operators import Blur, gaussian_kernel
from tests.helpers import picture, smooth

TRUE_WIDTH = 1.5


class Known(nn.Module):
    """A network that gives the true image, but for an offset that it learns."""

    def __init__(self, channels):
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(1))

    def forward(self, z):
        return picture(1, 33, 47) + self.offset


class SemiBlind(LightningModule):
    """Learns the width of a blur beside a restoration."""

    def __init__(self, y=None, width=0.8):
        super().__init__()
        problem = None
        if y is not None:
            problem = InverseProblem(y, Blur.gaussian(9, width, "reflect"), GaussianNoise(1))
        self.restoration = DeepRED(
            network=Known, lam=1e-6, mu=1e-6, input_noise_std=0, result="out", problem=problem
        )
        self.log_width = nn.Parameter(torch.tensor(width).log())

    def training_step(self, batch, batch_idx):
        self.restoration.problem.operator.kernel = gaussian_kernel(9, self.log_width.exp())
        return self.restoration.training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)

    def train_dataloader(self):
        return self.restoration.train_dataloader()


def trainer_of(make_trainer, steps):
    update = REDUpdate(smooth, every_n_steps=5, submodule="restoration")
    return make_trainer(max_steps=steps, callbacks=[update])


@pytest.mark.parametrize("start", [0.8, 3.0])
def test_a_parent_learns_the_width_of_a_blur(make_trainer, tmp_path, start):
    y = Blur.gaussian(9, TRUE_WIDTH, "reflect")(picture(1, 33, 47))
    whole, stopped, resumed = (SemiBlind(y, start) for _ in range(3))
    trainer_of(make_trainer, 80).fit(whole)
    assert whole.log_width.exp().item() == pytest.approx(TRUE_WIDTH, rel=0.02)
    assert abs(whole.restoration.network.offset.item()) < 0.01
    half = trainer_of(make_trainer, 40)
    half.fit(stopped)
    half.save_checkpoint(tmp_path / "half.ckpt")
    trainer_of(make_trainer, 80).fit(resumed, ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(resumed.log_width, whole.log_width)
    assert torch.equal(resumed.restoration.x, whole.restoration.x)
    alone = SemiBlind.load_from_checkpoint(tmp_path / "half.ckpt")  # without a measurement
    assert torch.equal(alone.log_width, stopped.log_width)
    assert torch.equal(alone.restoration.restored, stopped.restoration.restored)


class Restored(LightningDataModule):
    """Restores pictures before a network learns from them; once."""

    def __init__(self, folder):
        super().__init__()
        self.file, self.fits = folder / "restored.npy", 0

    def prepare_data(self):
        if not self.file.exists():
            self.fits += 1
            tiny = {"trainer.max_steps": 3, "model.network.width": 4, "data.noise.sigma": 4}
            image = (255 * picture(1, 40, 41)[0, 0]).byte().numpy()
            np.save(self.file, restore(image, ["denoising", "methods/quick"], tiny))

    def train_dataloader(self):
        image = torch.from_numpy(np.load(self.file) / 255).float()[None, None]
        return DataLoader(TensorDataset(image))


class Mean(LightningModule):
    """Learns a picture's mean."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.rand(()))

    def training_step(self, batch, batch_idx):
        return (self.mean - batch[0].mean()) ** 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def test_a_datamodule_restores_what_it_feeds_once_and_leaves_the_others_seed(
    make_trainer, tmp_path
):
    data, drawn = Restored(tmp_path), []
    for _ in range(2):
        torch.manual_seed(0)
        model = Mean()
        make_trainer(max_epochs=3).fit(model, datamodule=data)
        drawn.append(torch.rand(1))
    assert data.fits == 1  # the second time it was there
    assert torch.equal(*drawn)
    assert model.mean.item() == pytest.approx(np.load(data.file).mean() / 255, abs=1e-3)
