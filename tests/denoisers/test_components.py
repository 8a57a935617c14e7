"""Principal components against a transcription with NumPy's singular value decomposition."""

import numpy as np
import pytest
import torch

from deepred_pl.denoisers import BM3D, NonLocalMeans, PrincipalComponents
from tests.helpers import picture


def cube(bands, height=37, width=44, rank=3, noise=0.02, seed=0):
    """Bands that are mixtures of few images, and noise that varies fourfold, (1, C, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.cat([picture(1, height + i, width)[:, :, i:] for i in range(rank)], dim=1)
    spectra = torch.rand(bands, rank, generator=generator)
    clean = torch.einsum("bm,nmhw->nbhw", spectra / spectra.sum(1, keepdim=True), maps)
    sigmas = noise * torch.linspace(0.5, 2, bands)
    white = torch.randn(clean.shape, generator=generator)
    return clean, clean + sigmas.view(1, -1, 1, 1) * white, 255 * sigmas


class Half:
    """Halves an image, and keeps what it was given."""

    def __init__(self):
        self.given = []

    def __call__(self, x):
        self.given.append(x)
        return x / 2


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("components", [1, 3])
def test_against_a_singular_value_decomposition(components, weighted):
    _, x, sigmas = cube(9)
    half = Half()
    denoiser = PrincipalComponents(half, components, sigmas.tolist() if weighted else None)
    restored = denoiser(x)
    scale = (sigmas / sigmas.square().mean().sqrt()).double().numpy() if weighted else np.ones(9)
    flat = x[0].double().numpy().reshape(9, -1) / scale[:, None]
    mean = flat.mean(axis=1, keepdims=True)
    u, s, vt = np.linalg.svd(flat - mean, full_matrices=False)
    low_rank = (u[:, :components] * s[:components]) @ vt[:components]
    expected = (mean + low_rank / 2) * scale[:, None]
    np.testing.assert_allclose(restored[0].numpy().reshape(9, -1), expected, atol=2e-5)
    assert restored.shape == x.shape and restored.dtype == x.dtype
    assert [given.shape for given in half.given] == [(1, 1, 37, 44)] * components  # as grey images


def test_all_components_change_nothing_by_themselves():
    _, x, _ = cube(5)
    torch.testing.assert_close(PrincipalComponents(lambda z: z, 5)(x), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [NonLocalMeans, BM3D])
def test_mixed_bands_are_denoised_better_together(kind):
    clean, x, sigmas = cube(12, 48, 64)
    sigma = float(sigmas.square().mean().sqrt())

    def error(image):
        return float((image - clean).square().mean())

    together = PrincipalComponents(kind(sigma=sigma), 3, sigmas.tolist())
    assert together.sigma == sigma
    assert error(together(x)) < 0.5 * min(error(kind(sigma=sigma)(x)), error(x))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"components": 0}, "components must be"),
        ({"components": 2, "channel_sigmas": [1, 0, 3]}, "channel_sigmas"),
        ({"components": 4}, "at least as many channels as components, 4, got 3"),
        ({"components": 2, "channel_sigmas": [1, 2]}, "for 3 channels, got 2"),
    ],
)
def test_impossible_arguments_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        PrincipalComponents(NonLocalMeans(sigma=3), **arguments).check(torch.rand(1, 3, 9, 9))
