import numpy as np
import pytest
import torch

from deepred_pl.moments import RunningMoments, together


@pytest.mark.parametrize("shape", [(1, 1, 5, 7), (1, 3, 4, 4)])
def test_mean_and_variance_are_numpys(shape):
    images = torch.rand(17, *shape, generator=torch.Generator().manual_seed(0)) + 100
    moments = RunningMoments()
    for i, image in enumerate(images):
        if i == 6:  # as if a fit were cut off and went on
            state, moments = moments.state_dict(), RunningMoments()
            moments.load_state_dict(state)
        moments.add(image)
    array = images.double().numpy()
    assert moments.count == 17
    np.testing.assert_allclose(moments.mean, array.mean(0), rtol=1e-6)
    np.testing.assert_allclose(moments.variance, array.var(0), rtol=2e-3)


def test_parts_together_are_all_their_images():
    images = torch.rand(5, 4, 1, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    parts = []
    for part in images:
        parts.append(RunningMoments())
        for image in part:
            parts[-1].add(image)
    mean, variance = together(parts)
    array = images.double().numpy().reshape(20, 1, 3, 5, 7)
    np.testing.assert_allclose(mean, array.mean(0), rtol=1e-5)
    np.testing.assert_allclose(variance, array.var(0), rtol=1e-4, atol=1e-7)


def test_parts_of_a_checkpoint_may_be_on_another_device():
    parts = [RunningMoments() for _ in range(2)]
    for part, device in zip(parts, ("cpu", "meta"), strict=True):
        part.add(torch.zeros(1, 1, 2, 3, device=device))
    mean, variance = together(parts)
    assert mean.device.type == variance.device.type == "meta"
