"""Known linear forward operators A of y = A x + noise."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Operator(nn.Module, ABC):
    """A linear map from images to measurements; calling it applies A.

    Subclasses keep kernels, masks or angles as buffers or parameters.
    """

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """A x, of the measurement's shape, for x of shape (1, C, H, W)."""

    @abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y, (1, C, H, W), so that ⟨A x, y⟩ = ⟨x, Aᵀ y⟩."""

    @abstractmethod
    def image_shape(self, measurement_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape (1, C, H, W) of the images whose measurement has `measurement_shape`."""

    @abstractmethod
    def first_guess(self, y: Tensor) -> Tensor:
        """A first image from y, (1, C, H, W): where x and the average start."""


class Identity(Operator):
    """A = I: denoising.

    >>> import torch
    >>> y = torch.rand(1, 3, 33, 47)
    >>> torch.equal(Identity()(y), y)
    True
    """

    def forward(self, x: Tensor) -> Tensor:
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        return y

    def image_shape(self, measurement_shape: tuple[int, ...]) -> tuple[int, ...]:
        return measurement_shape

    def first_guess(self, y: Tensor) -> Tensor:
        return y
