"""The network's passes as CUDA graphs: their kernels are launched at once instead of one by one.

A graph works in memory of its own, where every pass overwrites the one before. So a pass through
the network must be followed by its gradient before the next, as in the θ-steps of a fit. Graphs are
kept here and not in the network, which can be copied and pickled at any time.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

DEVICE = "cuda"  # which has them

_captured: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()


class _Whole(nn.Module):
    """A network in a module of its own, whose `forward` torch replaces by the graph."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, z: Tensor) -> Tensor:
        return self.network(z)


def capture(network: nn.Module, z: Tensor) -> None:
    """Capture the network's passes for inputs like z, in the present autocast, which `run` replays.

    Raises:
        RuntimeError: It cannot be captured, for example because it reads values from the GPU.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # a cached weight would never change
    try:
        _captured[network] = torch.cuda.make_graphed_callables(_Whole(network), (z.clone(),))
    finally:
        torch.set_autocast_cache_enabled(before)


def release(network: nn.Module) -> None:
    """Forget the graph; `run` calls the network again."""
    _captured.pop(network, None)


def run(network: nn.Module, z: Tensor) -> Tensor:
    """T_θ(z), by the network's graph if it was captured and gradients are on."""
    captured = _captured.get(network)
    if captured is None or not torch.is_grad_enabled():
        return network(z)
    return captured(z).clone()  # the next pass overwrites it
