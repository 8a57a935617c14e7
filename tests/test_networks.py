import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deepred_pl import DeepImagePrior, InverseProblem, fast_conv
from deepred_pl.denoisers.bm3d import deblur
from deepred_pl.metrics import psnr
from deepred_pl.networks import (
    DeepDecoder,
    ImageParameter,
    MeasurementNet,
    SkipNet,
    bounded,
)
from deepred_pl.noise import GaussianNoise
from deepred_pl.operators import Blur, Downsample
from tests.helpers import TinyNet, noisy_problem, picture


def reference(net: SkipNet, z: torch.Tensor) -> torch.Tensor:
    """The published network written out with plain functions; sides that are odd halve upwards."""

    def norm(x):
        mean = x.mean((0, 2, 3), keepdim=True)
        variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
        return (x - mean) / (variance + 1e-5).sqrt()

    def conv(block, x, stride=1):
        weight = block[0].weight
        side = weight.shape[-1] // 2
        x = F.conv2d(F.pad(x, (side,) * 4, mode="reflect") if side else x, weight, stride=stride)
        x = norm(x)
        return torch.where(x > 0, x, 0.2 * x)

    def scale(level, x):
        if level == len(net.down):
            return x
        deeper = conv(net.down[level][1], conv(net.down[level][0], x, stride=2))
        deeper = F.interpolate(scale(level + 1, deeper), x.shape[-2:], mode="bilinear")
        joined = norm(torch.cat([conv(net.skip[level], x), deeper], 1))
        up = net.up[level]
        return conv(up.after[2], conv([up.mix], joined))

    return 1 / (1 + torch.exp(-F.conv2d(scale(0, z), net.head.weight, net.head.bias)))


@pytest.mark.parametrize("reformulated", [True, False])
@pytest.mark.parametrize("size", [(16, 24), (33, 47)])
def test_skipnet_is_the_published_network(monkeypatch, reformulated, size):
    if reformulated and not fast_conv.multiplies_sparse():
        pytest.skip("this torch has no sparse products")
    monkeypatch.setattr(fast_conv, "pays_off", lambda x: reformulated)  # whatever the size
    torch.manual_seed(0)
    net = SkipNet(3, width=6, skip_width=4, scales=3).double()
    z = torch.rand(1, 32, *size, dtype=torch.float64)
    out, expected = net(z), reference(net, z)
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=0)
    weights = {name: p for name, p in net.named_parameters() if p.ndim == 4}
    direction = torch.randn(1, 3, *size)
    got = torch.autograd.grad(out, list(weights.values()), direction)
    should = torch.autograd.grad(expected, list(weights.values()), direction.double())
    for name, a, b in zip(weights, got, should, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * b.abs().max(), rtol=0, msg=name)


def test_skipnet_has_the_published_number_of_parameters():
    count = sum(p.numel() for p in SkipNet(3).parameters())
    assert round(count / 1e6, 2) == 2.22


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [(33, 47), (64, 33), (50, 51)])
def test_skipnet_takes_any_size_and_number_of_channels(channels, size):
    out = SkipNet(channels, width=4)(torch.rand(1, 32, *size))
    assert out.shape == (1, channels, *size)
    assert out.dtype == torch.float32
    assert out.min() >= 0 and out.max() <= 1


@pytest.mark.parametrize("scales", [1, 2, 3, 5])
def test_smallest_side_is_the_smallest_that_works(scales):
    net = SkipNet(1, width=4, scales=scales)
    side = net.smallest_side
    assert net(torch.rand(1, 32, side, side + 4)).shape[-2:] == (side, side + 4)
    with pytest.raises((RuntimeError, ValueError)):
        net(torch.rand(1, 32, side - 1, side + 4))


@pytest.mark.parametrize("wrong", [{"width": 0}, {"scales": 0}, {"skip_width": 0}])
def test_sizes_below_one_are_refused(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        SkipNet(3, **wrong)


def test_output_stays_float32_under_autocast():
    net = SkipNet(1, width=4, scales=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(torch.rand(1, 32, 9, 9)).dtype == torch.float32


# The Deep Decoder


def upsampled(image, shape):
    """Bilinear with half-pixel centres and edges held, of (C, H, W), in NumPy."""
    for axis, size in ((1, shape[0]), (2, shape[1])):
        old = image.shape[axis]
        place = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
        low = np.floor(place).astype(int)
        high = np.minimum(low + 1, old - 1)
        weight = (place - low).reshape([-1 if i == axis else 1 for i in range(3)])
        image = (1 - weight) * image.take(low, axis) + weight * image.take(high, axis)
    return image


def decoded(net, z, shapes):
    """The formula of the paper, B ← cn(relu(U B C)) and sigmoid(B C) at the end, in NumPy."""
    b = z[0].numpy()
    for mix, shape in zip(net.mix, shapes, strict=True):
        b = upsampled(np.einsum("oi,ihw->ohw", mix.weight.detach().numpy()[:, :, 0, 0], b), shape)
        b = np.maximum(b, 0)
        spread = b.var((1, 2), keepdims=True) + 1e-5
        b = (b - b.mean((1, 2), keepdims=True)) / np.sqrt(spread)
    weight, bias = (p.detach().numpy() for p in (net.head.weight, net.head.bias))
    return 1 / (1 + np.exp(-np.einsum("oi,ihw->ohw", weight[:, :, 0, 0], b) - bias[:, None, None]))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(33, 47), (20, 9)])
def test_deep_decoder_is_the_papers_formula(channels, size):
    torch.manual_seed(0)
    net = DeepDecoder(channels, width=6, scales=3).double()
    z = net.prepare(InverseProblem(picture(channels, *size))).double()
    halves = [size]
    for _ in range(3):
        halves.append(tuple(math.ceil(side / 2) for side in halves[-1]))
    assert z.shape == (1, 6, *halves[3]) and z.min() >= 0 and z.max() <= 1
    want = decoded(net, z, [halves[2], halves[1], halves[0], halves[0]])
    np.testing.assert_allclose(net(z)[0].detach().numpy(), want, atol=1e-6)


def test_deep_decoder_has_the_published_number_of_parameters():
    # Heckel & Hand count 100 224 for k = 128 and 6 layers: 6 · 128² of the mixing, 6 · 2 · 128 of
    # the normalisation and 3 · 128 of the head; ours has the head's 3 biases too.
    assert sum(p.numel() for p in DeepDecoder(3).parameters()) == 100_224 + 3


def test_deep_decoder_has_a_smallest_side():
    net = DeepDecoder(1, width=4, scales=2)
    with pytest.raises(ValueError, match="at least 5×5 pixels"):
        DeepImagePrior(lambda c: net, problem=noisy_problem(1, 4, 9))
    with pytest.raises(ValueError, match="at least 1"):
        DeepDecoder(3, width=0)


# The image itself, and the measurement as input


def test_image_parameter_starts_at_the_first_guess_and_leaves_its_output_alone():
    problem = noisy_problem(3, 9, 11)
    net = ImageParameter(3)
    z = net.prepare(problem)
    out = net(z)
    assert torch.equal(out, problem.first_guess())
    with torch.no_grad():
        net.image += 1  # as an optimizer does
    assert torch.equal(out, problem.first_guess())
    net(z).sum().backward()
    assert torch.equal(net.image.grad, torch.ones_like(net.image))


@pytest.mark.parametrize("channels", [1, 3])
def test_bm3d_deblurring_undoes_a_blur_of_any_shape(channels):
    kernel = torch.zeros(5, 7)
    kernel[0] = kernel[:, 1] = 1.0  # turned by 180° it would be another
    truth, noise = picture(channels, 49, 64), GaussianNoise(2**0.5)
    y = noise.sample(Blur(kernel)(truth), torch.Generator().manual_seed(0))
    problem = InverseProblem(y, Blur(kernel), noise, truth)
    net = ImageParameter(channels, start=deblur)
    deblurred = net(net.prepare(problem))
    assert deblurred.min() >= 0 and deblurred.max() <= 1
    assert psnr(deblurred, truth) > psnr(y, truth) + 8


def test_bm3d_deblurring_needs_a_circular_blur_and_noise():
    y = picture(1, 33, 47)
    blur = Blur.uniform(3)
    for problem in (
        InverseProblem(y, None, GaussianNoise(1)),
        InverseProblem(y, Blur.uniform(3, "reflect"), GaussianNoise(1)),
        InverseProblem(y, blur),
    ):
        with pytest.raises(ValueError, match="needs a Blur with a circular boundary and a noise"):
            deblur(problem)


def test_measurement_net_is_fed_the_measurement():
    problem = noisy_problem(2, 9, 11)
    net = MeasurementNet(2, width=4, scales=2)
    assert torch.equal(net.prepare(problem), problem.y)
    assert net(problem.y).shape == (1, 2, 9, 11)
    with pytest.raises(ValueError, match="MeasurementNet is for denoising"):
        net.prepare(InverseProblem(picture(2, 9, 11), Downsample(2)))


@pytest.mark.parametrize("network", [ImageParameter, lambda c: DeepDecoder(c, width=4, scales=2)])
def test_a_module_that_prepared_its_input_is_loaded_from_its_state(network):
    problem = noisy_problem(1, 9, 11)
    model = DeepImagePrior(network, problem=problem, input_noise_std=0)
    torch.optim.SGD(model.network.parameters(), lr=0.1).step(model.training_step)
    other = DeepImagePrior(network, input_noise_std=0)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.restored, model.restored)
    other.build(noisy_problem(1, 9, 11))
    assert torch.equal(other.training_step(), model.training_step())


@pytest.mark.parametrize("limits", [(0, 1), (0, 25), (-3, 8), (-40, 40), (-2, 1)])
def test_wider_limits_start_alike_and_are_reached(limits):
    t = torch.linspace(-3000, 3000, 60001, dtype=torch.float64, requires_grad=True)
    y = bounded(t, *limits)
    assert (y.diff() >= 0).all()
    assert y.min().item() == pytest.approx(limits[0], abs=1e-3)
    assert y.max().item() == pytest.approx(limits[1], abs=1e-3)
    slope = torch.autograd.grad(y[30000], t)[0][30000]
    assert (y[30000].item(), slope.item()) == pytest.approx((0.5, 0.25))
    if limits == (0, 1):
        torch.testing.assert_close(y, torch.sigmoid(t))


@pytest.mark.parametrize("network", [TinyNet, functools.partial(DeepDecoder, width=4, scales=2)])
def test_a_network_gets_the_problems_limits(network):
    problem = InverseProblem(picture(1, 9, 11), limits=(-2, 5))
    model = DeepImagePrior(network, problem=problem)
    model.network.head.weight.data.mul_(1000)
    out = model.network(model.z)
    assert out.max() > 4.9 and out.min() < -1.9
