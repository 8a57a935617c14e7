"""The reformulated convolutions are torch's own, in float64 to the last digits."""

import pytest
import torch
import torch.nn.functional as F

from deepred_pl import fast_conv

pytestmark = pytest.mark.skipif(
    not fast_conv.multiplies_sparse(), reason="this torch has no sparse products"
)

SIZES = [
    ((4, 5), (8, 10)),
    ((4, 5), (7, 9)),
    ((17, 24), (33, 47)),
    ((1, 2), (2, 3)),
    ((3, 1), (5, 2)),
]


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def upsampled(x, size):
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def assert_same(function, reference, *inputs):
    """The same values, and the same gradients for a random direction."""
    inputs = [i.clone().requires_grad_() for i in inputs]
    got, expected = function(*inputs), reference(*inputs)
    torch.testing.assert_close(got, expected)
    direction = tensor(*expected.shape)
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, direction),
        torch.autograd.grad(expected, inputs, direction),
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (1, 1), (5, 2)])
@pytest.mark.parametrize("channels", [1, 3, 8])
@pytest.mark.parametrize("size", [(5, 6), (12, 7)])
def test_a_convolution_is_torchs(memory_format, kernel, stride, channels, size):
    assert_same(
        lambda x, weight: fast_conv.conv2d(x, weight, stride),
        lambda x, weight: F.conv2d(x, weight, stride=stride),
        tensor(1, channels, *size).to(memory_format=memory_format),
        tensor(4, channels, kernel, kernel),
    )


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("low, high", SIZES)
@pytest.mark.parametrize("channels", [1, 5])
def test_a_convolution_of_the_upsampled_is_torchs(memory_format, low, high, channels):
    assert_same(
        lambda x, weight: fast_conv.conv2d_upsampled(x, weight, high),
        lambda x, weight: F.conv2d(F.pad(upsampled(x, high), (1, 1, 1, 1), "reflect"), weight),
        tensor(1, channels, *low).to(memory_format=memory_format),
        tensor(4, channels, 3, 3),
    )


@pytest.mark.parametrize("low, high", SIZES)
def test_the_moments_of_the_upsampled_are_torchs(low, high):
    assert_same(
        lambda x: torch.stack(fast_conv.upsampled_moments(x, high)),
        lambda x: torch.stack(
            [upsampled(x, high).mean((0, 2, 3)), upsampled(x, high).var((0, 2, 3), correction=0)]
        ),
        100 + tensor(1, 3, *low),  # far from 0, where a difference of squares would be lost
    )


def test_memory_that_nobody_wrote_does_not_show():
    x, weight = tensor(1, 3, 4, 5), tensor(2, 3, 3, 3)
    expected = fast_conv.conv2d_upsampled(x, weight, (8, 10))
    torch.use_deterministic_algorithms(True)  # which fills fresh memory with NaN
    try:
        got = fast_conv.conv2d_upsampled(x, weight, (8, 10))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(got, expected)


def test_torchs_own_are_taken_under_autocast_and_for_small_images():
    x = torch.zeros(1, 8, 64, 64)
    assert fast_conv.pays_off(x)
    assert not fast_conv.pays_off(x[:, :1])
    assert not fast_conv.pays_off(x.bfloat16())
    assert not fast_conv.pays_off(x.expand(2, -1, -1, -1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not fast_conv.pays_off(x)


@pytest.mark.parametrize("size", [(8, 10), (7, 9)])
def test_a_gradient_taken_under_autocast_is_in_full_precision(size):
    x, weight = tensor(1, 3, 4, 5).float(), tensor(4, 3, 3, 3).float()

    def both(x, weight):
        upsampled = fast_conv.conv2d_upsampled(x, weight, size)
        return upsampled.sum() + fast_conv.conv2d(x, weight).square().sum()

    inputs = x.requires_grad_(), weight.requires_grad_()
    expected = torch.autograd.grad(both(*inputs), inputs)
    loss = both(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = torch.autograd.grad(loss, inputs)
    torch.testing.assert_close(got, expected, atol=0, rtol=0)
