import pytest
import torch
import torch.nn.functional as F

from deepred_pl.networks import SkipNet


def reference(net: SkipNet, z: torch.Tensor) -> torch.Tensor:
    """The published network written out with plain functions, for sides that halve evenly."""

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
        deeper = F.interpolate(scale(level + 1, deeper), scale_factor=2, mode="bilinear")
        joined = norm(torch.cat([conv(net.skip[level], x), deeper], 1))
        return conv(net.up[level][2], conv(net.up[level][1], joined))

    return 1 / (1 + torch.exp(-F.conv2d(scale(0, z), net.head.weight, net.head.bias)))


def test_skipnet_is_the_published_network():
    torch.manual_seed(0)
    net = SkipNet(3, width=6, skip_width=4, scales=3).double()
    z = torch.rand(1, 32, 16, 24, dtype=torch.float64)
    torch.testing.assert_close(net(z).double(), reference(net, z), atol=1e-6, rtol=0)


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
