"""Trained networks as denoisers."""

import pytest
import torch
from torch import nn

from deepred_pl import DeepRED, REDUpdate
from deepred_pl.denoisers import Learned
from tests.helpers import TinyNet, noisy_problem, picture


class Shrink(nn.Module):
    """Takes 3 channels; differs between training and evaluation."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, 3, 1)
        self.drop = nn.Dropout(0.9)

    def forward(self, x):
        return self.drop(0.5 * self.mix(x))


class Told(nn.Module):
    def forward(self, x, sigma):
        return x * (1 - sigma.view(-1, 1, 1, 1))


@pytest.fixture
def files(tmp_path):
    torch.manual_seed(0)
    net = Shrink().eval()
    torch.jit.script(net).save(tmp_path / "net.pt")
    x = torch.rand(1, 3, 9, 11)
    torch.export.save(torch.export.export(net, (x,)), tmp_path / "net.pt2")
    return net, tmp_path


@pytest.mark.parametrize("name", ["net.pt", "net.pt2"])
def test_a_file_denoises_like_the_module_in_it(files, name):
    net, folder = files
    x = picture(3, 9, 11)
    with torch.no_grad():
        want = net(x)
    torch.testing.assert_close(Learned(folder / name)(x), want)
    torch.testing.assert_close(Learned(str(folder / name))(x), want)


def test_a_module_is_put_into_evaluation_and_has_no_gradients():
    torch.manual_seed(0)
    net = Shrink().train()
    denoised = Learned(module=net)(picture(3, 9, 11))
    torch.testing.assert_close(denoised, 0.5 * net.mix(picture(3, 9, 11)).detach())
    assert not denoised.requires_grad


def test_sigma_is_told_on_the_unit_scale():
    x = picture(1, 9, 11)
    torch.testing.assert_close(Learned(module=Told(), sigma=51)(x), 0.8 * x)


def test_it_serves_deepred(make_trainer, files):
    model = DeepRED(network=TinyNet, problem=noisy_problem(3, 9, 11))
    update = REDUpdate(Learned(files[1] / "net.pt2"), every_n_steps=2)
    make_trainer(max_steps=2, callbacks=[update]).fit(model)  # one round: f(x₀)
    want = files[0](model.problem.first_guess()).detach()
    torch.testing.assert_close(model.f_x, want, atol=1e-6, rtol=0)


class Half(nn.Module):
    def forward(self, x):
        return x[..., ::2, ::2]


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1, keepdim=True)


@pytest.mark.parametrize(
    ("denoiser", "message"),
    [
        (Learned(module=Half()), r"returns \(1, 1, 9, 11\) like its input, got \(1, 1, 5, 6\)"),
        (
            Learned(module=Shrink()),
            r"takes \(x\) with x of 1 channels and 9×11 pixels, but it",
        ),
        (Learned(module=Told()), r"takes \(x\).*missing 1 required positional argument: 'sigma'"),
        (Learned(module=Half(), sigma=5), r"takes \(x, sigma\).*it failed"),
    ],
)
def test_a_misfit_is_found_before_the_fit(make_trainer, denoiser, message):
    model = DeepRED(network=TinyNet, problem=noisy_problem(1, 9, 11))
    with pytest.raises(ValueError, match=message):
        make_trainer(max_steps=4, callbacks=[REDUpdate(denoiser)]).fit(model)
    assert model.step == 0


def test_a_module_that_gives_nan_is_found_before_the_fit(make_trainer):
    class Broken(nn.Module):
        def forward(self, x):
            return x * float("nan")

    model = DeepRED(network=TinyNet, problem=noisy_problem(3, 9, 11))
    with pytest.raises(ValueError, match="finite values, got NaN"):
        make_trainer(max_steps=4, callbacks=[REDUpdate(Learned(module=Broken()))]).fit(model)
    with pytest.raises(ValueError, match=r"expected a torch\.nn\.Module, got function"):
        Learned(module=lambda x: x)


def test_a_misfit_in_the_number_of_channels_is_found_before_the_fit(make_trainer):
    model = DeepRED(network=TinyNet, problem=noisy_problem(3, 9, 11))
    with pytest.raises(ValueError, match=r"returns \(1, 3, 9, 11\) like its input, got \(1, 1, 9"):
        make_trainer(max_steps=4, callbacks=[REDUpdate(Learned(module=Mean()))]).fit(model)


@pytest.mark.parametrize("name", ["text.pt", "text.pt2", "weights.pt"])
def test_a_file_that_holds_no_module_is_refused(tmp_path, name):
    (tmp_path / name).write_text("text")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="expected a TorchScript file or an exported program"):
        Learned(tmp_path / name)


def test_other_mistakes_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="found none at"):
        Learned(tmp_path / "nowhere.pt")
    with pytest.raises(ValueError, match="got neither"):
        Learned()
    with pytest.raises(ValueError, match="got both"):
        Learned(tmp_path / "net.pt", module=Half())
    with pytest.raises(ValueError, match="grey levels"):
        Learned(module=Half(), sigma=300)
