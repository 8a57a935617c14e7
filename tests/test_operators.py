"""Operators against SciPy, scikit-image, Pillow and the definition of the adjoint."""

import math

import numpy as np
import pytest
import scipy.ndimage
import scipy.signal
import skimage.transform
import torch
from PIL import Image
from torch import nn

from deepred_pl import InverseProblem
from deepred_pl.noise import GaussianNoise
from deepred_pl.operators import (
    Adapted,
    Blur,
    Downsample,
    Identity,
    Mask,
    Radon,
    gaussian_kernel,
    without,
)
from deepred_pl.tiles import Region
from tests.helpers import picture

BOUNDARIES = {"circular": "wrap", "replicate": "nearest", "reflect": "mirror", "zero": "constant"}


def lopsided(rows=5, columns=7):
    """A kernel that equals none of its mirror images."""
    return torch.from_numpy(np.random.default_rng(0).random((rows, columns))).float()


def some_known(channels, height, width):
    return Mask(
        torch.from_numpy(np.random.default_rng(1).random((1, channels, height, width)) > 0.4)
    )


OPERATORS = {
    "identity": (lambda c: Identity(), (33, 47)),
    **{f"blur {b}": (lambda c, b=b: Blur(lopsided(), b), (33, 47)) for b in BOUNDARIES},
    "blur, large": (lambda c: Blur.gaussian(25, 1.6), (33, 47)),
    **{f"down {f}": (lambda c, f=f: Downsample(f), (f * 11, f * 6)) for f in (2, 3, 4, 8)},
    "down lanczos3": (lambda c: Downsample(3, "lanczos3"), (33, 48)),
    "down bicubic": (lambda c: Downsample(2, "bicubic"), (34, 46)),
    "down box": (lambda c: Downsample(5, "box"), (35, 45)),
    "mask": (lambda c: some_known(1, 33, 47), (33, 47)),
    "mask of channels": (lambda c: some_known(c, 33, 47), (33, 47)),
    "radon": (lambda c: Radon(7), (33, 33)),
    "radon, even": (lambda c: Radon([0.0, 30.0, 45.5, 90.0, 170.0]), (34, 34)),
    "radon of a circle": (lambda c: Radon(6, circle=True), (33, 33)),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATORS)
def test_the_adjoint_is_exact(name, channels):
    make, size = OPERATORS[name]
    operator, x = make(channels), picture(channels, *size)
    a_x = operator(x)
    y = torch.randn(a_x.shape, generator=torch.Generator().manual_seed(0)) + 0.5
    at_y = operator.adjoint(y)
    assert at_y.shape == x.shape == operator.image_shape(tuple(y.shape))
    left, right = (a_x.double() * y).sum(), (x.double() * at_y).sum()
    assert left.item() == pytest.approx(right.item(), rel=1e-4)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_first_guess_is_an_image_of_the_right_size(name):
    make, size = OPERATORS[name]
    truth = picture(3, *size)
    problem = InverseProblem(make(3)(truth), make(3), ground_truth=truth)
    guess = problem.first_guess()
    assert guess.shape == truth.shape and guess.isfinite().all()
    assert guess.min() >= 0 and guess.max() <= 1
    if "radon" not in name:  # from a handful of angles there is little to see
        assert ((guess - truth) ** 2).mean() < truth.var()  # better than its mean
    assert problem.as_image().shape == truth.shape


def test_identity_does_nothing():
    x = picture()
    assert torch.equal(Identity()(x), x) and torch.equal(Identity().first_guess(x), x)


# Blur


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(33, 47), (6, 31), (5, 7)])
@pytest.mark.parametrize(("boundary", "mode"), BOUNDARIES.items())
def test_blur_is_scipys_convolution(boundary, mode, size, channels):
    kernel = lopsided()
    x = picture(channels, *size)
    k = (kernel / kernel.sum()).double().numpy()
    want = [scipy.ndimage.convolve(c, k, mode=mode) for c in x[0].double().numpy()]
    got = Blur(kernel, boundary)(x)[0].numpy()
    np.testing.assert_allclose(got, np.stack(want), atol=2e-6)


def test_uniform_and_gaussian_kernels():
    np.testing.assert_allclose(Blur.uniform(9).kernel.numpy(), np.full((9, 9), 1 / 81), rtol=1e-6)
    point = np.zeros((25, 25))
    point[12, 12] = 1
    want = scipy.ndimage.gaussian_filter(point, 1.6, radius=12)
    np.testing.assert_allclose(Blur.gaussian(25, 1.6).kernel.numpy(), want, atol=1e-7)


def test_a_kernel_is_read_from_array_and_picture(tmp_path):
    kernel = (lopsided() * 255).round()
    np.save(tmp_path / "kernel.npy", kernel.numpy())
    Image.fromarray(kernel.byte().numpy()).save(tmp_path / "kernel.png")
    Image.fromarray(kernel.byte().numpy()).convert("RGB").save(tmp_path / "rgb.png")
    for name in ("kernel.npy", "kernel.png", "rgb.png"):
        got = Blur.from_file(tmp_path / name, boundary="reflect")
        np.testing.assert_allclose(got.kernel.numpy(), kernel / kernel.sum(), rtol=1e-5)
        assert got.boundary == "reflect"


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (torch.ones(0, 5), "rows × columns"),
        (torch.ones(3), "rows × columns"),
        (-torch.ones(3, 3), "positive sum"),
        (torch.zeros(3, 3), "positive sum"),
        (torch.full((3, 3), math.nan), "finite"),
    ],
)
def test_a_kernel_that_is_none_is_refused(kernel, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Blur(kernel)
    np.save(tmp_path / "kernel.npy", kernel.numpy())
    with pytest.raises(ValueError, match=rf"{message}|expected (one|an) image.*kernel\.npy"):
        Blur.from_file(tmp_path / "kernel.npy")


def test_kernel_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found none at .*kernel\.npy"):
        Blur.from_file(tmp_path / "kernel.npy")
    np.save(tmp_path / "kernel.npy", np.array([["text"]]))
    with pytest.raises(ValueError, match=r"integers or floats.*kernel\.npy"):
        Blur.from_file(tmp_path / "kernel.npy")
    Image.fromarray((picture(3, 5, 5)[0].movedim(0, -1) * 255).byte().numpy()).save(
        tmp_path / "photo.png"
    )
    with pytest.raises(ValueError, match="grey image"):
        Blur.from_file(tmp_path / "photo.png")


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_kernel_larger_than_the_image_is_refused(boundary):
    with pytest.raises(ValueError, match=r"no larger than the image, 33×7, got 9×9"):
        InverseProblem(picture(3, 33, 7), Blur.uniform(9, boundary))
    with pytest.raises(ValueError, match="no larger than the image"):
        Blur.uniform(9, boundary)(picture(3, 7, 33))


def test_blur_arguments_out_of_range_are_refused():
    for size in (0, 4, -3):
        with pytest.raises(ValueError, match="must be odd"):
            Blur.uniform(size)
        with pytest.raises(ValueError, match="must be odd"):
            Blur.gaussian(size)
    with pytest.raises(ValueError, match="width must be > 0"):
        Blur.gaussian(5, 0)
    with pytest.raises(ValueError, match=r"'circular', 'replicate', 'reflect', 'zero'"):
        Blur(torch.ones(3, 3), "mirror")


def test_a_kernel_or_its_width_can_be_learned():
    truth = picture(1, 33, 47)
    y = Blur.gaussian(9, 1.2)(truth)
    blur = Blur(nn.Parameter(torch.full((9, 9), 1 / 81)))
    assert [name for name, _ in blur.named_parameters()] == ["kernel"]
    problem = InverseProblem(y, blur)
    problem.data_term(truth).backward()
    assert blur.kernel.grad.abs().sum() > 0

    width, problem = nn.Parameter(torch.tensor(2.0)), InverseProblem(y, Blur.uniform(9))
    optimizer = torch.optim.Adam([width], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        problem.operator.kernel = gaussian_kernel(9, width)
        problem.data_term(truth).backward()
        optimizer.step()
    assert width.item() == pytest.approx(1.2, abs=0.02)


# Downsample


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("kernel", "filter_"),
    [
        ("lanczos3", Image.Resampling.LANCZOS),
        ("bicubic", Image.Resampling.BICUBIC),
        ("box", Image.Resampling.BOX),
    ],
)
def test_downsampling_is_pillows_resize_inside(kernel, filter_, factor, channels):
    x = picture(channels, 13 * factor, 11 * factor)
    want = [np.asarray(Image.fromarray(c).resize((11, 13), filter_)) for c in x[0].float().numpy()]
    got = Downsample(factor, kernel)(x)[0].numpy()
    inside = (..., slice(4, -4), slice(4, -4))  # at the border Pillow renormalises its weights
    np.testing.assert_allclose(got[inside], np.stack(want)[inside], atol=1e-5)


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_lanczos2_is_the_windowed_sinc_behind_replicated_borders(factor):
    x = picture(1, 7 * factor, 5 * factor)
    offsets = np.arange(-2 * factor, 2 * factor) + 0.5 * (factor % 2 == 0)
    t = offsets[np.abs(offsets) < 2 * factor] / factor
    weights = np.sinc(t) * np.sinc(t / 2)
    weights /= weights.sum()
    want = x[0, 0].double().numpy()
    for axis in (0, 1):
        padded = np.pad(
            want, [(2 * factor, 2 * factor) if a == axis else (0, 0) for a in (0, 1)], "edge"
        )
        # A block's middle lies (factor − 1) / 2 pixels behind its first one.
        starts = [
            2 * factor + i * factor + round((factor - 1) / 2 + offsets_0)
            for i in range(x.shape[2 + axis] // factor)
            for offsets_0 in [t[0] * factor]
        ]
        want = np.stack(
            [
                np.tensordot(weights, padded.take(range(s, s + len(t)), axis), (0, axis))
                for s in starts
            ],
            axis,
        )
    np.testing.assert_allclose(Downsample(factor)(x)[0, 0].numpy(), want, atol=1e-6)


def test_box_is_the_mean_of_blocks():
    x = picture(3, 35, 45)
    want = skimage.transform.downscale_local_mean(x[0].numpy(), (1, 5, 5))
    np.testing.assert_allclose(Downsample(5, "box")(x)[0].numpy(), want, atol=1e-6)


def test_bicubic_first_guess_is_pillows():
    y = picture(1, 9, 12)
    want = Image.fromarray(y[0, 0].numpy()).resize((48, 36), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(
        Downsample(4).first_guess(y)[0, 0].numpy(), np.asarray(want), atol=1e-5
    )


def test_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match=r"multiples of the factor 4, got 33×47"):
        Downsample(4)(picture())
    x = picture()
    assert torch.equal(Downsample(4).admissible(x), x[..., 0:32, 1:45])
    assert torch.equal(Downsample(4).admissible(x[..., :32, :44]), x[..., :32, :44])
    with pytest.raises(ValueError, match="larger than the image, 5×47"):
        Downsample(8).admissible(picture(3, 5, 47))


@pytest.mark.parametrize("factor", [1, 0, -2])
def test_a_factor_below_two_is_refused(factor):
    with pytest.raises(ValueError, match="at least 2"):
        Downsample(factor)


def test_an_unknown_resampling_kernel_is_refused():
    with pytest.raises(ValueError, match=r"'lanczos2', 'lanczos3', 'bicubic', 'box'.*'nearest'"):
        Downsample(2, "nearest")


# Mask


def test_unknown_pixels_count_for_nothing():
    x, mask = picture(3, 9, 11), (picture(1, 9, 11) > 0.4).float()
    y = torch.where(mask.bool(), x, 0.77)  # as a scratched photograph: anything
    problem = InverseProblem(y, Mask(mask))
    assert torch.equal(problem.y, x * mask)
    out = picture(3, 9, 11).flip(-1)
    known = mask.bool().expand_as(x).numpy()
    want = ((out - x).double().numpy()[known] ** 2).mean()
    assert problem.data_term(out).item() == pytest.approx(want, rel=1e-5)
    assert problem.residual(out).item() == pytest.approx(want, rel=1e-5)
    changed = torch.where(mask.bool(), out, 1 - out)
    assert torch.equal(problem.data_term(changed), problem.data_term(out))


def test_holes_are_filled_from_around():
    mask = torch.ones(1, 1, 33, 47)
    mask[..., 10:20, 15:30] = 0
    constant = InverseProblem(torch.full((1, 3, 33, 47), 0.3), Mask(mask)).first_guess()
    assert torch.allclose(constant, torch.tensor(0.3), atol=1e-6)
    ramp = torch.linspace(0, 1, 47).expand(1, 1, 33, 47)
    assert (InverseProblem(ramp, Mask(mask)).first_guess() - ramp).abs().max() < 0.2
    one = torch.zeros(1, 1, 33, 47)
    one[..., 3, 4] = 1
    y = torch.full((1, 1, 33, 47), 0.6)
    assert torch.allclose(InverseProblem(y, Mask(one)).first_guess(), y)


def test_a_mask_is_read_from_a_picture(tmp_path):
    known = picture(1, 33, 47)[0, 0] > 0.4
    picture_of_it = Image.fromarray((known.byte() * 255).numpy())
    for name in ("mask.png", "mask.jpg", "mask.tif"):
        picture_of_it.convert("RGB").save(tmp_path / name)
        got = Mask(tmp_path / name).mask
        assert got.shape == (1, 1, 33, 47)
        assert (got[0, 0].bool() == known).float().mean() > 0.98  # JPEG loses a few
    assert torch.equal(Mask(str(tmp_path / "mask.png")).mask[0, 0].bool(), known)


def test_a_mask_of_zeros_and_ones_is_read_too(tmp_path):
    known = (picture(1, 33, 47)[0, 0] > 0.4).numpy()
    Image.fromarray(known.astype(np.uint8)).save(tmp_path / "mask.png")
    np.save(tmp_path / "bool.npy", known)
    np.save(tmp_path / "int.npy", known.astype(np.int64))
    for name in ("mask.png", "bool.npy", "int.npy"):
        assert (Mask(tmp_path / name).mask[0, 0].bool().numpy() == known).all()


def test_a_mask_of_two_axes_serves():
    known = picture(1, 33, 47)[0, 0] > 0.4
    for mask in (known, known.numpy(), known.numpy().astype(np.float64)):
        assert torch.equal(Mask(mask).mask, known.float()[None, None])


def test_random_missing_pixels():
    shape, generator = (1, 3, 33, 47), torch.Generator().manual_seed(0)
    drawn = Mask(keep_fraction=0.3).drawn(shape, generator)
    assert drawn.mask.shape == (1, 1, 33, 47)
    assert drawn.mask.sum() == round(0.3 * 33 * 47)
    again = Mask(keep_fraction=0.3).drawn(shape, torch.Generator().manual_seed(0))
    assert torch.equal(drawn.mask, again.mask)
    given = Mask(torch.ones(1, 1, 33, 47), keep_fraction=0.3)  # a mask goes before
    assert given.drawn(shape, generator) is given
    with pytest.raises(ValueError, match=r"give the mask \(data.operator.mask\)"):
        InverseProblem(picture(), Mask(keep_fraction=0.3))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(1, 1, 4, 4), "no known pixel"),
        (torch.full((1, 1, 4, 4), 0.5), "16 other values"),
        (torch.ones(3, 4, 4), r"\(1, 1, H, W\)"),
    ],
)
def test_a_mask_that_is_none_is_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        Mask(mask)


def test_masks_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"33×47 pixels and 1 or 3 channels, got 33×46 pixels"):
        InverseProblem(picture(), Mask(torch.ones(1, 1, 33, 46)))
    with pytest.raises(ValueError, match=r"33×47 pixels and 1 channel, got 33×47 pixels and 3"):
        InverseProblem(picture(1), Mask(torch.ones(1, 3, 33, 47)))
    Image.fromarray((picture(1)[0, 0] * 255).byte().numpy()).save(tmp_path / "photo.png")
    with pytest.raises(ValueError, match=r"black-and-white.*photo\.png is grey"):
        Mask(tmp_path / "photo.png")
    with pytest.raises(ValueError, match="Mask needs mask"):
        Mask()
    for fraction in (0, -0.1, 1.1):
        with pytest.raises(ValueError, match=r"\(0, 1\]"):
            Mask(keep_fraction=fraction)


# Radon


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("circle", [False, True])
@pytest.mark.parametrize("side", [33, 46])
def test_projections_are_scikit_images(side, circle, channels):
    x = picture(channels, side, side)
    rows, columns = np.mgrid[:side, :side] - side // 2
    x = x * torch.from_numpy(rows**2 + columns**2 <= (side // 2) ** 2)
    angles = [0.0, 17.3, 45.0, 90.0, 133.0, 179.0]
    want = [
        skimage.transform.radon(c, angles, circle=circle, preserve_range=True)
        for c in x[0].double().numpy()
    ]
    got = Radon(angles, circle)(x)[0].numpy()
    assert got.shape[1] == (side if circle else math.ceil(math.sqrt(2) * side))
    np.testing.assert_allclose(got, np.stack(want) / got.shape[1], atol=2e-5)


def test_a_number_of_angles_spreads_evenly():
    np.testing.assert_allclose(Radon(4).angles.numpy(), [0, 45, 90, 135])


def test_back_projection_recovers_the_image():
    x = picture(3, 48, 48)
    guess = InverseProblem(Radon(90)(x), Radon(90)).first_guess()
    assert -10 * math.log10(((guess - x) ** 2).mean()) > 20


def test_operators_stay_exact_where_a_caller_computes_in_bfloat16():
    x = picture(3, 48, 48)
    for operator in (Radon(6), Downsample(4), Blur.uniform(5)):
        with torch.autocast("cpu", torch.bfloat16):
            inside = operator(x)
        assert inside.dtype == torch.float32 and torch.equal(inside, operator(x))


def test_angles_can_be_learned():
    x = Blur.gaussian(9, 2)(picture(1, 33, 33)).double()

    def radon_at(angle):
        return Radon(nn.Parameter(torch.tensor([angle], dtype=torch.float64)))

    y = radon_at(3.0)(x).detach()

    def misfit(angle):
        radon = radon_at(angle)
        return ((radon(x) - y) ** 2).mean(), radon

    value, radon = misfit(8.0)
    value.backward()
    slope = (misfit(8.0001)[0] - misfit(7.9999)[0]) / 0.0002
    assert radon.angles.grad.item() == pytest.approx(slope.item(), rel=1e-3)
    assert slope > 0  # downhill is towards 3


def test_an_image_that_is_not_square_is_refused_or_padded():
    with pytest.raises(ValueError, match=r"square image, got 33×47; pad it"):
        Radon(5)(picture())
    padded = Radon(5).admissible(picture())
    assert padded.shape == (1, 3, 47, 47)
    assert torch.equal(padded[..., 7:40, :], picture()) and padded.sum() == picture().sum()


@pytest.mark.parametrize("angles", [0, -3, [], [math.nan], torch.zeros(2, 2)])
def test_angles_that_are_none_are_refused(angles):
    with pytest.raises(ValueError, match="at least one angle"):
        Radon(angles)


def test_sinograms_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="with 5 angles, got 47×6"):
        InverseProblem(torch.rand(1, 1, 47, 6), Radon(5))
    with pytest.raises(ValueError, match=r"data\.operator\.circle to true"):
        InverseProblem(torch.rand(1, 1, 48, 5), Radon(5))
    assert InverseProblem(torch.rand(1, 1, 48, 5), Radon(5, circle=True)).image_shape[-1] == 48


# Operators of others


class OtherBlur:
    """In NumPy, so nothing to differentiate; (1, C, H, W) to a vector (1, N)."""

    def A(self, x):
        self.shape = x.shape
        return torch.from_numpy(
            scipy.ndimage.uniform_filter1d(x.numpy(), 3, mode="wrap").reshape(1, -1)
        )

    def A_adjoint(self, y):
        return torch.from_numpy(
            scipy.ndimage.uniform_filter1d(y.numpy().reshape(self.shape), 3, mode="wrap")
        )


def test_any_object_with_an_adjoint_serves():
    truth, physics = picture(3, 9, 11), OtherBlur()
    y = physics.A(truth)
    problem = InverseProblem(y, physics, ground_truth=truth)
    ours = InverseProblem(Blur(torch.ones(1, 3))(truth), Blur(torch.ones(1, 3)))
    assert isinstance(problem.operator, Adapted) and problem.image_shape == (1, 3, 9, 11)
    gradients = []
    for each in (problem, ours):
        out = truth.flip(-1).requires_grad_()
        each.data_term(out).backward()
        gradients.append(out.grad)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    assert (problem.first_guess() - truth).square().mean() < truth.var()


def test_a_sinogram_is_not_taken_for_an_image():
    x, radon = picture(1, 33, 33), Radon(33, circle=True)  # of the image's shape
    problem = InverseProblem(radon(x), radon)
    assert torch.equal(problem.as_image(), problem.first_guess())


def test_what_is_no_operator_is_refused():
    for operator in (torch.ones(3, 3), lambda x: x):
        with pytest.raises(ValueError, match=r"methods A and A_adjoint, got (Tensor|function)"):
            InverseProblem(picture(), operator)


def test_a_double_kernel_is_made_float():
    assert Blur(torch.ones(3, 3, dtype=torch.float64)).kernel.dtype == torch.float32


def test_a_module_of_others_moves_and_is_saved_with_the_problem():
    class Physics(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(0.5))

        def A(self, x):
            return self.gain * x

        A_adjoint = A

    problem = InverseProblem(picture() / 2, Physics())
    assert dict(problem.named_parameters()).keys() == {"operator.physics.gain"}
    torch.testing.assert_close(problem.first_guess(), picture(), atol=1e-5, rtol=1e-5)


# Kernels and masks as people have them


@pytest.mark.parametrize("shape", [(8, 8), (7, 4), (2, 5)])
def test_an_even_kernel_has_the_centre_of_scipy_ndimage(shape):
    kernel = np.random.default_rng(0).random(shape)
    x = picture(1, 33, 47)[0, 0].numpy()
    want = scipy.ndimage.convolve(x.astype(np.float64), kernel / kernel.sum(), mode="mirror")
    got = Blur(kernel, "reflect")(torch.from_numpy(x)[None, None])[0, 0]
    np.testing.assert_allclose(got.numpy(), want, atol=1e-5)


def test_a_kernel_of_scipys_mode_same_takes_a_row_and_a_column_of_zeros_at_the_start():
    kernel = np.random.default_rng(0).random((8, 8))
    x = picture(1, 33, 47)[0, 0].numpy()
    want = scipy.signal.convolve2d(x, kernel / kernel.sum(), "same")
    got = Blur(np.pad(kernel, ((1, 0), (1, 0))), "zero")(torch.from_numpy(x)[None, None])[0, 0]
    np.testing.assert_allclose(got.numpy(), want, atol=1e-5)


def test_zeros_around_a_kernel_are_cut_off_so_that_it_fits():
    kernel = np.zeros((64, 64))
    kernel[30:35, 31:34] = np.arange(15).reshape(5, 3)
    blur, x = Blur(kernel, "reflect"), picture(3, 9, 11)
    assert tuple(blur.kernel.shape) == (5, 3)
    want = scipy.ndimage.convolve(x[0, 0].double().numpy(), kernel / kernel.sum(), mode="mirror")
    np.testing.assert_allclose(blur(x)[0, 0].numpy(), want, atol=1e-5)
    kernel[0, 0] = 1
    with pytest.raises(ValueError, match=r"65×65 values around its centre that are not 0"):
        Blur(kernel)(x)


def test_arguments_of_numpy():
    x = picture(1, 12, 18)
    angles = np.arange(0, 180, 45.0)
    square = picture(1, 12, 12)
    torch.testing.assert_close(Radon(angles)(square), Radon(angles.tolist())(square))
    for factor in (np.int64(3), 3.0, torch.tensor(3)):
        torch.testing.assert_close(Downsample(factor)(x), Downsample(3)(x))
    assert Mask([[1, 0], [0, 1]]).mask.sum() == 2
    for factor in (2.5, (2, 4)):
        with pytest.raises(ValueError, match="one whole number for both sides"):
            Downsample(factor)


def mask_file(path, pixels):
    Image.fromarray(pixels).save(path)
    return Mask(path).mask


def test_masks_in_colour_are_known_where_they_are_bright(tmp_path):
    known = np.ones((9, 11), bool)
    known[2:4, 3:8] = False
    red = np.full((9, 11, 3), 255, np.uint8)
    red[~known] = 255, 0, 0
    voc = Image.fromarray(known.astype(np.uint8)).convert("P")
    voc.putpalette([0, 0, 0, 128, 0, 0] + [0] * 750)
    voc.save(tmp_path / "voc.png")
    green = np.full((9, 11, 3), (0, 255, 0), np.uint8)
    green[~known] = 255, 0, 0
    alpha = np.dstack([np.zeros((9, 11, 3), np.uint8), 255 * known.astype(np.uint8)])
    for mask in (
        mask_file(tmp_path / "red.png", red),
        Mask(tmp_path / "voc.png").mask,
        mask_file(tmp_path / "green.png", green),
        mask_file(tmp_path / "alpha.png", alpha),
    ):
        assert tuple(mask.shape) == (1, 1, 9, 11)
        np.testing.assert_array_equal(mask[0, 0].bool().numpy(), known)


def test_a_sparse_mask_per_channel_is_no_picture_of_labels(tmp_path):
    known = np.random.default_rng(0).random((60, 70, 3)) < 0.02
    mask = mask_file(tmp_path / "mask.png", 255 * known.astype(np.uint8))
    np.testing.assert_array_equal(mask[0].movedim(0, -1).bool().numpy(), known)


def test_labels_in_several_colours_are_no_mask(tmp_path):
    labels = np.zeros((9, 11, 3), np.uint8)
    labels[2:4], labels[5:7] = (128, 0, 0), (0, 128, 0)
    with pytest.raises(ValueError, match=r"got 3 colours in .*save it in black and white"):
        mask_file(tmp_path / "labels.png", labels)


def test_a_mask_per_channel_says_how_much_of_each_is_known(tmp_path):
    known = np.random.default_rng(0).random((20, 30, 3)) < [0.9, 0.5, 0.2]
    mask = mask_file(tmp_path / "mask.png", 255 * known.astype(np.uint8))
    np.testing.assert_array_equal(mask[0].movedim(0, -1).bool().numpy(), known)
    shares = ", ".join(f"{share:.1%}" for share in known.mean((0, 1)))
    assert f"{shares} known" in str(Mask(known))


def test_a_mask_of_bytes_is_refused_with_a_threshold_that_works():
    grey = 255 * (picture(1, 9, 11)[0, 0].numpy() > 0.4).astype(np.uint8)
    with pytest.raises(ValueError, match=r"threshold it first, as in mask > 127\.5"):
        Mask(grey)
    grey.setflags(write=False)
    assert Mask(grey > 127.5).mask.sum() == (grey > 0).sum()


# Measurements in which values are missing


@pytest.mark.parametrize(
    "operator", [Identity(), Blur.uniform(3, "reflect"), Downsample(3), Radon(20)]
)
def test_missing_values_of_any_measurement_are_not_observed(operator):
    x = picture(1, 33, 33)
    y = operator(x)
    gone = torch.zeros_like(y).bool()
    gone[..., 3:5, 2] = True
    partly = without(operator, gone)
    torch.testing.assert_close(partly(x), torch.where(gone, 0.0, y))
    assert partly.first_guess(torch.where(gone, 0.0, y)).shape == x.shape
    problem = InverseProblem(torch.where(gone, 9.0, y), partly)
    assert problem.residual(x) < 1e-10


def test_a_problem_with_missing_values_can_be_cut():
    operator, x = Blur.uniform(3, "reflect"), picture(3, 40, 40)
    gone = picture(1, 40, 40) > 0.7
    problem = InverseProblem(operator(x), without(operator, gone), GaussianNoise(5))
    part = problem.part(Region(10, 0, 20, 40))
    inside = part.operator.observed
    assert not inside[..., 0, :].any() and not inside[..., -1, :].any()  # next to the cuts
    torch.testing.assert_close(inside[0, 0, 1:-1].bool(), ~gone[0, 0, 11:29])
    assert part.residual(x[..., 10:30, :]) < 1e-10


def test_a_part_in_which_nothing_was_measured_is_refused():
    x, gone = picture(3, 40, 40), torch.zeros(1, 3, 40, 40).bool()
    gone[..., :21, :] = True
    problem = InverseProblem(x, without(Blur.uniform(3, "reflect"), gone))
    with pytest.raises(ValueError, match=r"no value was measured in the region \[0, 0, 20, 40\]"):
        problem.part(Region(0, 0, 20, 40))


@pytest.mark.parametrize(
    ("operator", "gain"),
    [
        (Identity(), 1),
        (Blur.uniform(5, "reflect"), 25),
        (Downsample(4, "box"), 16),
        (Mask(picture(1, 48, 48) > 0.4), 1),
        (Radon([0.0, 90.0], circle=True), 48),
    ],
)
def test_how_much_brighter_a_point_can_be_than_its_measurement(operator, gain):
    assert operator.largest_gain(operator(picture(1, 48, 48))) == pytest.approx(gain, rel=1e-4)


@pytest.mark.parametrize("length, angle", [(12, 0), (12, 90), (9.5, 30), (21, 135), (1, 0)])
def test_a_motions_kernel_has_the_moments_of_a_line(length, angle):
    kernel = Blur.motion(length, angle).kernel.double()
    rows, columns = (torch.arange(n).double() - n // 2 for n in kernel.shape)
    assert kernel.sum() == pytest.approx(1, abs=1e-6) and (kernel >= 0).all()
    assert (kernel.sum(1) @ rows).abs() < 1e-6 and (kernel.sum(0) @ columns).abs() < 1e-6
    turn, spread = np.deg2rad(angle), length**2 / 12
    # Shares of a pixel add 1/6 to the variance along an axis, on average over positions.
    for got, part in (
        (kernel.sum(0) @ columns**2, np.cos(turn)),
        (kernel.sum(1) @ rows**2, np.sin(turn)),
    ):
        if abs(part) < 1e-9:
            assert got < 1e-9
        elif length > 1:
            assert float(got) == pytest.approx(spread * part**2 + 1 / 6, rel=0.02)
    mixed = float(rows @ kernel @ columns)  # rows count downwards
    assert mixed == pytest.approx(-spread * np.sin(turn) * np.cos(turn), abs=0.02 * length)
