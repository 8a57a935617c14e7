"""Tiles against the definition of what they are: covering, aligned, and parts of one problem."""

import math

import numpy as np
import pytest
import torch

from deepred_pl import InverseProblem
from deepred_pl.noise import GaussianNoise, PoissonNoise
from deepred_pl.operators import Adapted, Blur, Downsample, Identity, Mask, Observed, Radon
from deepred_pl.tiles import Region, Tiling, blend, cut
from tests.helpers import picture

SIZES = [(1, 1), (5, 70), (64, 64), (65, 64), (97, 131), (200, 33), (384, 256)]


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("tile, overlap", [(64, 0), (64, 16), (64, 63), (33, 8), (1, 0)])
def test_tiles_cover_the_image_and_share_what_they_should(height, width, tile, overlap):
    if tile == 1 and height * width > 5000:
        return
    regions = cut(height, width, tile, overlap)
    seen = np.zeros((height, width), int)
    for top, left, h, w in regions:
        assert (h, w) == (min(tile, height), min(tile, width))
        assert top >= 0 and left >= 0 and top + h <= height and left + w <= width
        seen[top : top + h, left : left + w] += 1
    assert seen.min() == 1 or min(overlap, tile) > tile // 2
    assert seen.min() >= 1
    for starts, length in (
        (sorted({r.top for r in regions}), min(tile, height)),
        (sorted({r.left for r in regions}), min(tile, width)),
    ):
        gaps = np.diff(starts)
        assert (length - gaps >= overlap).all()
        assert gaps.size == 0 or gaps.max() - gaps.min() <= 1  # spread evenly


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_tiles_begin_and_end_where_the_small_image_has_pixels(factor):
    regions = cut(120, 264, 50, 13, factor)
    assert all(side % factor == 0 for region in regions for side in region)
    assert regions[0].height >= 50
    assert max(r.top + r.height for r in regions) == 120
    assert max(r.left + r.width for r in regions) == 264


@pytest.mark.parametrize("overlap", [-1, 64, 100])
def test_an_overlap_that_cannot_be_is_refused(overlap):
    with pytest.raises(ValueError, match=r"overlap .* less than the tile's 64 pixels, got"):
        cut(200, 200, 64, overlap)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("tile, overlap", [(64, 0), (64, 16), (40, 30)])
def test_the_tiles_of_an_image_give_it_back(channels, height, width, tile, overlap):
    image = torch.rand(1, channels, height, width)
    tiling = Tiling(cut(height, width, tile, overlap), overlap)
    blended = blend((region.of(image) for region in tiling.regions), tiling)
    torch.testing.assert_close(blended, image)


@pytest.mark.parametrize("margin", [(0, 0), (5, 9), (12, 12)])
def test_what_is_wrong_beside_a_cut_is_not_seen(margin):
    image = torch.rand(1, 3, 97, 131)
    tiles = []
    tiling = Tiling(cut(97, 131, 64, 26), 26, margin)
    for region in tiling.regions:
        part = region.of(image).clone()
        rows, columns = margin
        if region.top > 0:
            part[..., :rows, :] = 1e3
        if region.top + region.height < 97:
            part[..., part.shape[-2] - rows :, :] = 1e3
        if region.left > 0:
            part[..., :columns] = 1e3
        if region.left + region.width < 131:
            part[..., part.shape[-1] - columns :] = 1e3
        tiles.append(part)
    torch.testing.assert_close(blend(tiles, tiling), image)


def test_two_tiles_are_faded_into_each_other():
    overlap, width = 16, 48  # two tiles of 32 that share 16
    regions = cut(8, width, 32, overlap)
    images = [torch.zeros(1, 1, 8, 32), torch.ones(1, 1, 8, 32)]
    blended = blend(images, Tiling(regions, overlap))
    d = np.arange(overlap) + 0.5
    expected = np.concatenate([np.zeros(16), np.sin(np.pi / 2 * d / overlap) ** 2, np.ones(16)])
    np.testing.assert_allclose(blended[0, 0].numpy(), np.tile(expected, (8, 1)), atol=1e-6)
    assert np.abs(np.diff(expected)).max() < math.pi / 2 / overlap  # no seam
    d = np.arange(8) + 0.5  # what is left between two margins of 4
    expected[16:32] = np.concatenate([np.zeros(4), np.sin(np.pi / 2 * d / 8) ** 2, np.ones(4)])
    blended = blend(images, Tiling(regions, overlap, (0, 4)))
    np.testing.assert_allclose(blended[0, 0].numpy(), np.tile(expected, (8, 1)), atol=1e-6)


BOUNDARIES = ["replicate", "reflect", "zero"]
CUTTABLE = {
    "identity": lambda c: Identity(),
    "mask": lambda c: Mask(torch.rand(1, c, 120, 144) > 0.5),
    "grey mask": lambda c: Mask(torch.rand(120, 144) > 0.5),
    **{f"blur, {b}": lambda c, b=b: Blur(torch.rand(5, 9), b) for b in BOUNDARIES},
    **{
        f"downsample {f}, {k}": lambda c, f=f, k=k: Downsample(f, k)
        for f in (2, 3, 4, 8)
        for k in ("lanczos2", "lanczos3", "bicubic", "box")
    },
}
REGIONS = [(0, 0, 120, 144), (0, 0, 72, 72), (24, 48, 72, 72), (48, 24, 72, 120)]


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", CUTTABLE)
def test_a_part_sees_of_its_image_what_the_whole_sees(name, channels, region):
    operator, region = CUTTABLE[name](channels), Region(*region)
    x = picture(channels, 120, 144)
    whole = InverseProblem(operator(x), operator, GaussianNoise(3), x, "luminance")
    part = whole.part(region)
    assert part.image_shape == (1, channels, region.height, region.width)
    assert torch.equal(part.ground_truth, region.of(x)) and part.metric_on == "luminance"
    assert part.noise is whole.noise
    assert float(part.residual(region.of(x))) < 1e-11
    if operator.factor == 1:  # the picture of a part, and its PSNR, also next to cuts
        assert torch.equal(part.as_image(), region.of(whole.as_image()))
    if region.height == 120:  # the whole
        assert not isinstance(part.operator, Observed)
        torch.testing.assert_close(part.y, whole.y)


@pytest.mark.parametrize("name", ["blur, reflect", "downsample 4, lanczos2", "downsample 3, box"])
def test_no_more_is_left_out_beside_a_cut_than_must_be(name):
    operator, region = CUTTABLE[name](1), Region(24, 48, 48, 48)
    x, factor = torch.rand(1, 1, 96, 120), operator.factor
    inside = Region(*(side // factor for side in region)).of(operator(x))
    wrong = (operator.cropped(region)(region.of(x)) - inside).abs() > 1e-4
    rows, columns = operator.reach()
    kept = wrong[..., rows : wrong.shape[-2] - rows, columns : wrong.shape[-1] - columns]
    assert not kept.any()
    for depth, lines in ((rows, wrong[0, 0]), (columns, wrong[0, 0].T)):
        if depth:  # its innermost line is needed
            assert lines[depth - 1].any() or lines[-depth].any()


def test_what_is_observed_in_part_has_an_adjoint_and_a_first_guess():
    mask = torch.ones(1, 1, 12, 15)
    mask[..., :3, :] = 0
    operator = Observed(Downsample(2), mask)
    x, y = torch.rand(1, 3, 24, 30), torch.rand(1, 3, 12, 15)
    left, right = (operator(x) * y).sum(), (x * operator.adjoint(y)).sum()
    torch.testing.assert_close(left, right)
    guess = operator.first_guess(operator(picture(3, 24, 30)))
    assert guess.shape == (1, 3, 24, 30)
    assert guess[..., :4, :].mean() > 0.1  # filled from below, not black


class Half:
    def A(self, x):
        return 0.5 * x

    A_adjoint = A


@pytest.mark.parametrize(
    "operator, said",
    [
        (Radon(8), "Radon.* mixes the whole image"),
        (Blur.uniform(5), "mixes the whole image.* another boundary than 'circular'"),
        (Adapted(Half()), "Adapted.* mixes the whole image"),
    ],
)
def test_an_operator_that_mixes_the_whole_image_is_refused(operator, said):
    assert operator.reach() is None
    problem = InverseProblem(operator(picture(1, 48, 48)), operator)
    with pytest.raises(ValueError, match=said):
        problem.split(24)


@pytest.mark.parametrize(
    "region, said",
    [
        ((0, 0, 97, 10), r"within 96×120 pixels, got \[0, 0, 97, 10\]"),
        ((-4, 0, 8, 8), "within 96×120"),
        ((0, 0, 0, 8), "within 96×120"),
        ((2, 0, 32, 32), "multiples of the factor 4"),
        ((4, 4, 16, 16), "smaller than what Downsample"),
    ],
)
def test_a_region_that_cannot_be_is_refused(region, said):
    operator = Downsample(4)
    problem = InverseProblem(operator(picture(3, 96, 120)), operator)
    with pytest.raises(ValueError, match=said):
        problem.part(Region(*region))


def test_tiles_no_larger_than_a_blur_mixes_are_refused():
    blur = Blur.uniform(25, "reflect")
    problem = InverseProblem(picture(1, 96, 96), blur, GaussianNoise(2))
    with pytest.raises(ValueError, match="must be larger than 27 pixels, got 24"):
        problem.split(24)


def test_no_tile_comes_twice():
    regions = cut(264, 64, 64, 61, 4)  # tiles less than a pixel of the small image apart
    assert len(set(regions)) == len(regions)


def test_a_part_without_light_has_no_noise_to_go_by():
    y = torch.zeros(1, 1, 64, 64)
    y[..., 32:] = 0.5
    problem = InverseProblem(y, noise=PoissonNoise(30))
    assert problem.part(Region(0, 16, 64, 32)).noise is problem.noise  # half of it is dark
    with pytest.raises(ValueError, match=r"\[0, 0, 64, 32\] .* is black.* use larger tiles"):
        problem.part(Region(0, 0, 64, 32))
    gaussian = InverseProblem(y, noise=GaussianNoise(5))
    assert gaussian.part(Region(0, 0, 64, 32)).noise is gaussian.noise


def test_a_part_without_a_known_pixel_says_so():
    mask = torch.ones(64, 64)
    mask[:32] = 0
    problem = InverseProblem(torch.rand(1, 1, 64, 64), Mask(mask))
    with pytest.raises(ValueError, match=r"no pixel is known in the region \[0, 0, 32, 64\]"):
        problem.part(Region(0, 0, 32, 64))
