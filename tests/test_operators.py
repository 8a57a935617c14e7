import pytest
import torch

from deepred_pl.operators import Identity
from tests.conftest import picture


@pytest.mark.parametrize("channels", [1, 3])
def test_identity_is_its_own_adjoint_and_first_guess(channels):
    x, y = picture(channels), picture(channels).flip(-1)
    operator = Identity()
    assert torch.equal(operator(x), x)
    assert (operator(x) * y).sum() == (x * operator.adjoint(y)).sum()
    assert operator.image_shape(tuple(y.shape)) == tuple(x.shape)
    assert torch.equal(operator.first_guess(y), y)
