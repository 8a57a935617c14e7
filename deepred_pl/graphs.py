"""The network's passes as CUDA graphs: their kernels are launched at once instead of one by one.

A graph works in memory of its own, where every pass overwrites the one before. So a pass through
the network must be followed by its gradient before the next, as in the θ-steps of a fit. Graphs are
kept here and not in the network, which can be copied and pickled at any time.
"""

import gc
from typing import Any

import torch
from torch import Tensor, nn

DEVICE = "cuda"  # tests emulate graphs on another

_captured: dict[nn.Module, Any] = {}


class _Whole(nn.Module):
    """A network in a module of its own, whose `forward` torch replaces by the graph."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor) -> Tensor:
        return self.network(z)


def capture(network: nn.Module, z: Tensor) -> None:
    """Capture the network's passes for inputs like z, in the present autocast, which `run` replays.

    `release` must follow at the end of the fit.

    Raises:
        RuntimeError: It cannot be captured, for example because it reads values from the GPU.
    """
    # The gradients come from another stream than the capture's, which is no mistake here.
    quiet = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", None)
    if quiet is not None:
        quiet(False)
    stream = torch.cuda.current_stream(z.device) if z.is_cuda else None
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # a cached weight would never change
    try:
        gc.collect()  # an earlier graph that is collected during a capture would spoil it
        _captured[network] = torch.cuda.make_graphed_callables(_Whole(network), (z.clone(),))
    finally:
        torch.set_autocast_cache_enabled(cached)
        if stream is not None:  # a capture that fails leaves its own stream as the current one
            torch.cuda.set_stream(stream)


def release(network: nn.Module) -> None:
    """Free the graph and its memory; `run` calls the network again."""
    if _captured.pop(network, None) is not None:
        gc.collect()  # torch's graphed functions refer to themselves


def run(network: nn.Module, z: Tensor) -> Tensor:
    """T_θ(z), by the network's graph if it was captured and gradients are on."""
    captured = _captured.get(network)
    if captured is None or not torch.is_grad_enabled():
        return network(z)
    return captured(z).clone()  # the next pass overwrites it
