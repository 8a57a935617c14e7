"""Padding and upsampling are torch's, and their compiled gradients have a fixed order of sums."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from deepred_pl.resize import _ReflectionPad, _Upsampling, reflection_pad, upsample
from tests.helpers import TinyNet

SIZES = [
    ((4, 5), (8, 10)),
    ((4, 5), (7, 9)),
    ((17, 24), (33, 48)),
    ((1, 2), (2, 3)),
    ((3, 1), (5, 1)),
    ((5, 7), (5, 14)),
]
channels_last = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last]
)


def tensor(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, dtype=dtype, generator=generator)


def gradient(function, x):
    """The gradient for a random direction."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out = function(x)
    direction = tensor(*out.shape, dtype=out.dtype).contiguous(memory_format=torch.channels_last)
    return torch.autograd.grad(out, x, direction)[0]


def padded(x):
    return F.pad(x, (1, 1, 1, 1), mode="reflect")


def close(got, expected):
    tolerance = {"atol": 0.05, "rtol": 0.02} if expected.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(got, expected, **tolerance)


# On a CPU the public functions call torch's where that is faster; on a GPU they call these.
@channels_last
@pytest.mark.parametrize("pad", [reflection_pad, _ReflectionPad.apply])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (1, 3, 2, 5), (2, 3, 4, 7), (1, 3, 33, 47)])
def test_padding_is_torchs(memory_format, pad, dtype, shape):
    x = tensor(*shape, dtype=dtype).contiguous(memory_format=memory_format)
    assert torch.equal(pad(x), padded(x))
    close(gradient(pad, x), gradient(padded, x))
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(pad, x[..., :4, :4].requires_grad_())


@channels_last
@pytest.mark.parametrize("enlarge", [upsample, _Upsampling.apply])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("low", "high"), SIZES)
def test_upsampling_is_torchs(memory_format, enlarge, dtype, low, high):
    def torchs(x):
        return F.interpolate(x, high, mode="bilinear", align_corners=False)

    def ours(x):
        return enlarge(x, high)

    for number, channels in ((1, 1), (1, 3), (2, 3)):
        x = tensor(number, channels, *low, dtype=dtype).contiguous(memory_format=memory_format)
        close(ours(x), torchs(x))
        close(gradient(ours, x), gradient(torchs, x))
    if dtype == torch.float64:
        few = x[:1, :1, :3, :3].requires_grad_()
        assert torch.autograd.gradcheck(ours, few, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "function",
    [
        reflection_pad,
        _ReflectionPad.apply,
        lambda x: upsample(x, (11, 14)),
        lambda x: _Upsampling.apply(x, (11, 14)),
    ],
)
def test_both_keep_channels_last_and_the_type_also_under_autocast(function, dtype):
    def format_and_type(x):
        return x.is_contiguous(memory_format=torch.channels_last), x.dtype

    x = tensor(1, 8, 6, 7, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert format_and_type(function(x)) == (True, dtype)
        assert format_and_type(gradient(function, x)) == (True, dtype)


def test_the_compiled_gradient_adds_up_in_a_fixed_order():
    called = {"forward": set(), "backward": set()}

    def keep(part):
        def compiler(graph, inputs):
            called[part] |= {str(node.target) for node in graph.graph.nodes}
            return graph

        return compiler

    backend = aot_autograd(
        fw_compiler=keep("forward"),
        bw_compiler=keep("backward"),
        decompositions=select_decomp_table(),
    )
    torch._dynamo.reset()
    network = TinyNet(3).to(memory_format=torch.channels_last)
    z = torch.rand(1, 32, 23, 32).movedim(-1, 1)  # one side doubles exactly
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.compile(network, backend=backend, fullgraph=True)(z)
    out.square().mean().backward()
    torch._dynamo.reset()
    assert "aten.convolution_backward.default" in called["backward"]
    for name in called["forward"] | called["backward"]:
        assert "index_put" not in name and "scatter_add" not in name
        assert "reflection_pad2d" not in name and "upsample_bilinear2d" not in name
