import math

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from scipy.fft import dctn

from deepred_pl import InverseProblem
from deepred_pl.data import RestorationDataModule
from deepred_pl.image_format import ImageFormat
from deepred_pl.images import read_image, to_array, to_tensor
from deepred_pl.jpeg import JPEG, compress, read_jpeg
from deepred_pl.noise import GaussianNoise
from deepred_pl.restore import restore
from deepred_pl.tiles import Region, blend

SIZES = [(64, 96), (37, 53), (24, 40), (5, 3), (100, 16)]
KINDS = ["4:4:4", "4:2:2", "4:2:0", "grey"]
RATIO = {"4:4:4": (1, 1), "4:2:2": (1, 2), "4:2:0": (2, 2)}  # of chrominance, rows and columns
LEVEL = 1 / 255
EXIF_ORIENTATION = 274


def photo(kind: str, height: int, width: int) -> np.ndarray:
    array = skimage.data.astronaut()[60 : 60 + height, 160 : 160 + width]
    return array[..., 1] if kind == "grey" else array


def saved(path, array, kind, quality=30, **settings):
    subsampling = {} if kind == "grey" else {"subsampling": kind}
    Image.fromarray(array).save(path, quality=quality, **subsampling, **settings)
    return path


def transcribed(array: np.ndarray, kind: str) -> list[np.ndarray]:
    """The coefficients of each component, (blocks down, blocks across, 8, 8), by SciPy."""
    values = array.astype(float)
    if kind == "grey":
        planes = [values]
    else:
        r, g, b = np.moveaxis(values, -1, 0)
        luminance = 0.299 * r + 0.587 * g + 0.114 * b
        planes = [luminance, (b - luminance) / 1.772, (r - luminance) / 1.402]
    components = []
    for i, plane in enumerate(planes):
        rows, columns = RATIO[kind] if i else (1, 1)
        height, width = (
            -(-side // by) for side, by in zip(plane.shape, (rows, columns), strict=True)
        )
        # Columns are repeated up to whole blocks, then averaged; rows are averaged, then repeated.
        across = -(-width // 8) * 8 * columns
        plane = np.pad(
            plane, ((0, height * rows - plane.shape[0]), (0, across - plane.shape[1])), "edge"
        )
        plane = plane.reshape(height, rows, -1, columns).mean(axis=(1, 3))
        plane = np.pad(plane, ((0, -height % 8), (0, 0)), "edge")
        blocks = plane.reshape(plane.shape[0] // 8, 8, -1, 8).swapaxes(1, 2)
        components.append(dctn(blocks, axes=(2, 3), norm="ortho"))
    return components


def components_of(values: torch.Tensor, operator: JPEG) -> list[np.ndarray]:
    """Coefficients (1, K, rows, columns) as `transcribed`, and fill-in blocks after them."""
    parts, start = [], 0
    for rows, columns in operator.blocks:
        part = values[0, start : start + 64 * rows * columns]
        start += len(part)
        part = part.unflatten(0, (rows, columns, 8, 8)).permute(4, 0, 5, 1, 2, 3)
        parts.append(part.flatten(0, 1).flatten(1, 2).numpy())
    return parts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_operator_is_the_dct_of_scipy_behind_colour_transform_and_subsampling(tmp_path, kind, size):
    array = photo(kind, *size)
    _, operator = read_jpeg(saved(tmp_path / "a.jpg", array, kind))
    measured = components_of(operator(to_tensor(array)[0]), operator)
    expected = transcribed(array, kind)
    assert len(measured) == len(expected)
    for i, (found, wanted) in enumerate(zip(measured, expected, strict=True)):
        found = found[: wanted.shape[0], : wanted.shape[1]] * 255
        if i > 0:  # means of n pixels are multiplied by √n, and chrominance counts half
            found = found / (0.5 * math.sqrt(math.prod(RATIO[kind])))
        np.testing.assert_allclose(found, wanted, atol=2e-3)  # float32 sums of 64 values up to 255


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("quality", [10, 50, 90])
def test_coefficients_of_pillows_encoder_are_in_their_cells(tmp_path, kind, size, quality):
    """An encoder rounds twice before it quantizes: Y, Cb and Cr, and the means of chrominance."""
    array = photo(kind, *size)
    y, operator = read_jpeg(saved(tmp_path / "a.jpg", array, kind, quality))
    x = to_tensor(array)[0]
    outside = (operator(x) - y).abs() - operator.half_steps
    assert 255 * float(outside.max()) < 2.5
    assert operator.share_in_cells(x, y) > 0.95


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_first_guess_is_the_image_that_pillow_decodes(tmp_path, kind, size):
    path = saved(tmp_path / "a.jpg", photo(kind, *size), kind, quality=50)
    y, operator = read_jpeg(path)
    guess, decoded = operator.first_guess(y), read_image(path)[0]
    assert guess.shape == decoded.shape
    # Decoders clip Y, Cb and Cr, too.
    inner = ((guess > 0.02) & (guess < 0.98)).all(dim=1, keepdim=True).expand_as(guess)
    differences = 255 * (guess - decoded).abs()
    assert float(differences.mean()) < 0.7
    assert float(differences[inner].max()) < 4


@pytest.mark.parametrize("kind", KINDS)
def test_data_term_is_the_squared_distance_to_the_flat_part_of_the_cells(tmp_path, kind):
    """Of luminance to the middle 30 % of each cell, of chrominance to its middle."""
    y, operator = read_jpeg(saved(tmp_path / "a.jpg", photo(kind, 37, 53), kind))
    problem = InverseProblem(y, operator)
    x = torch.rand(problem.image_shape, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    term = problem.data_term(x)
    measured, half = operator(x.detach()).double().numpy(), operator.half_steps.double().numpy()
    rows, columns = operator.blocks[0]
    of_luminance = np.arange(half.shape[1])[:, None, None] < 64 * rows * columns
    half = np.where(np.isinf(half), half, np.where(of_luminance, 0.3, 0) * np.nan_to_num(half))
    beyond = np.maximum(np.abs(measured - y.double().numpy()) - half, 0)
    assert float(term.detach()) == pytest.approx(np.mean(beyond**2), rel=1e-5)
    (gradient,) = torch.autograd.grad(term, x)
    signs = np.sign(measured - y.double().numpy())
    weights = torch.from_numpy(2 * beyond * signs / beyond.size).float()
    torch.testing.assert_close(gradient, operator.adjoint(weights), atol=1e-8, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_adjoint_and_decoder(tmp_path, kind):
    y, operator = read_jpeg(saved(tmp_path / "a.jpg", photo(kind, 64, 96), kind))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(operator.image_shape(tuple(y.shape)), generator=generator)
    v = torch.randn(y.shape, generator=generator)
    inner = float((operator(x) * v).sum())
    assert inner == pytest.approx(float((x * operator.adjoint(v)).sum()), abs=1e-2)
    # Where all blocks are full, the decoder is a right inverse.
    torch.testing.assert_close(operator(operator.decoded(y)), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "least"), [((64, 96), 0.995), ((75, 91), 0.97)])
def test_result_compressed_again_has_the_coefficients_of_the_file(tmp_path, kind, size, least):
    """Seldom not, where values are rounded, or clipped to black and white, or blocks not full."""
    array = (50 + 0.6 * photo(kind, *size)).astype(np.uint8)
    path = saved(tmp_path / "a.jpg", array, kind, quality=40)
    y, operator = read_jpeg(path)
    noisy = array + np.random.default_rng(0).normal(0, 30, array.shape)
    noisy = to_tensor(noisy.clip(0, 255).astype(np.uint8))[0]
    assert operator.share_in_cells(noisy, y) < 0.9
    result = InverseProblem(y, operator).keep_known(noisy).clamp(0, 1)
    with Image.open(path) as original:
        tables = original.quantization
    pixels = to_array(result, ImageFormat()).squeeze()
    again, other = read_jpeg(saved(tmp_path / "b.jpg", pixels, kind, 50, qtables=tables))
    assert torch.equal(other.half_steps, operator.half_steps)  # 50 leaves tables as they are
    same = (again == y)[operator.half_steps.isfinite()]
    assert float(same.float().mean()) > least


def test_projection_onto_the_cells_moves_no_image_away_from_the_true_one(tmp_path):
    array = photo("4:4:4", 64, 64)
    y, operator = read_jpeg(saved(tmp_path / "a.jpg", array, "4:4:4"))
    truth = operator(to_tensor(array)[0])
    for seed in range(3):
        other = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        projected = operator(operator.keep_known(other, y))
        assert (projected - truth).norm() < (operator(other) - truth).norm()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    path = saved(tmp_path / "a.jpg", photo("4:2:0", 48, 80), "4:2:0", quality=90, exif=exif)
    y, operator = read_jpeg(path)
    upright = read_image(path)[0]
    guess = operator.first_guess(y)
    assert guess.shape == upright.shape == operator.image_shape(tuple(y.shape))
    assert float((guess - upright).abs().mean()) < LEVEL
    measured = operator(guess)
    torch.testing.assert_close(operator(operator.decoded(measured)), measured, atol=1e-5, rtol=0)
    assert operator.share_in_cells(guess, y) > 0.9
    part = InverseProblem(y, operator).part(Region(16, 0, 32, 48))
    torch.testing.assert_close(
        part.operator(guess[..., 16:48, :48]), measured[..., 1:3, :3], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("size", [(96, 128), (83, 125)])
def test_tiles_have_their_own_coefficients(tmp_path, size):
    array = photo("4:2:0", *size)
    y, operator = read_jpeg(saved(tmp_path / "a.jpg", array, "4:2:0"))
    x = to_tensor(array)[0]
    tiling, parts = InverseProblem(y, operator, ground_truth=x).split(48, 16)
    assert len(parts) > 3
    for part in parts:
        assert part.operator.share_in_cells(part.ground_truth, part.y) > 0.99
    blended = blend([part.ground_truth for part in parts], tiling)
    torch.testing.assert_close(blended, x)


def test_turned_image_is_not_cut_if_units_that_are_not_full_come_first(tmp_path):
    exif = Image.Exif()
    for orientation, cut in {3: False, 4: False, 5: True, 6: False, 7: False, 8: True}.items():
        exif[EXIF_ORIENTATION] = orientation
        path = saved(tmp_path / "a.jpg", photo("4:2:0", 50, 80), "4:2:0", exif=exif)
        problem, upright = InverseProblem(*read_jpeg(path)), read_image(path)[0]
        if not cut:
            with pytest.raises(ValueError, match="cannot be cut"):
                problem.split(32)
            continue
        tiling, parts = problem.split(32)
        for region, part in zip(tiling.regions, parts, strict=True):
            assert float((part.first_guess() - region.of(upright)).abs().mean()) < 2 * LEVEL


def test_step_is_the_mean_of_the_lowest_frequencies(tmp_path):
    path = saved(tmp_path / "a.jpg", photo("4:2:0", 24, 24), "4:2:0", quality=50)
    with Image.open(path) as picture:
        table = np.reshape(picture.quantization[0], (8, 8))
    assert table[0, 0] == 16 and table[0, 3] == 16  # in rows, as Annex K of the standard has it
    assert read_jpeg(path)[1].step == pytest.approx(table[:4, :4].mean())


def test_progressive_file_has_the_same_coefficients(tmp_path):
    array = photo("4:2:0", 37, 53)
    y, _ = read_jpeg(saved(tmp_path / "a.jpg", array, "4:2:0"))
    assert torch.equal(y, read_jpeg(saved(tmp_path / "b.jpg", array, "4:2:0", progressive=True))[0])


def test_dark_image_does_not_count_as_clipped(tmp_path):
    problem = InverseProblem(
        *read_jpeg(saved(tmp_path / "a.jpg", photo("grey", 24, 24) // 16, "grey"))
    )
    assert not problem.clipped().any()
    assert InverseProblem(problem.y, problem.operator).hold_out(0.5).held_out is not None


def test_other_files_are_refused(tmp_path):
    array = photo("4:4:4", 16, 16)
    Image.fromarray(array).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="expected a JPEG file, got PNG"):
        read_jpeg(tmp_path / "a.png")
    Image.fromarray(array).convert("CMYK").save(tmp_path / "c.jpg")
    with pytest.raises(ValueError, match="CMYK"):
        read_jpeg(tmp_path / "c.jpg")
    whole = saved(tmp_path / "a.jpg", array, "4:4:4").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="complete"):
        read_jpeg(tmp_path / "cut.jpg")
    with pytest.raises(FileNotFoundError):
        read_jpeg(tmp_path / "none.jpg")


def test_operator_without_a_file():
    with pytest.raises(ValueError, match=r"\[1, 100\]"):
        JPEG(quality=0)
    with pytest.raises(ValueError, match="read_jpeg"):
        JPEG()(torch.rand(1, 3, 16, 16))
    y, operator = compress(torch.rand(1, 1, 17, 9), 50)
    assert operator.image_shape(tuple(y.shape)) == (1, 1, 17, 9)
    with pytest.raises(ValueError, match="expected coefficients"):
        InverseProblem(torch.zeros(1, 64, 2, 2), operator)


def test_datamodule(tmp_path):
    path = saved(tmp_path / "a.jpg", photo("4:2:0", 40, 56), "4:2:0")
    data = RestorationDataModule(measurement=path, operator=JPEG())
    data.setup()
    y, _ = read_jpeg(path)
    assert torch.equal(data.problem.y, y)
    assert "40×56 pixels, 3 channels" in data.reading
    assert data.image_format.dtype == "uint8"
    simulated = RestorationDataModule("sample:camera", operator=JPEG(20), crop=40)
    simulated.setup()
    assert simulated.problem.image_shape == (1, 1, 40, 40)
    assert (
        simulated.problem.operator.share_in_cells(
            simulated.problem.ground_truth, simulated.problem.y
        )
        > 0.95
    )
    array = RestorationDataModule(operator=JPEG())
    array.measurement = photo("4:2:0", 40, 56)
    with pytest.raises(ValueError, match="in its file"):
        array.setup()
    others = {"noise": GaussianNoise(2), "hold_out": 0.1, "intensity_range": [0, 200]}
    for settings in ({name: value} for name, value in others.items()):
        with pytest.raises(ValueError, match="cannot be used"):
            RestorationDataModule(measurement=path, operator=JPEG(), **settings).setup()


def test_restore_takes_the_file(tmp_path):
    for kind, shape in {"4:2:0": (40, 56, 3), "grey": (40, 56)}.items():
        path = saved(tmp_path / "a.jpg", photo(kind, 40, 56), kind)
        settings = {"trainer.max_steps": 2, "model.network.width": 4, "model.network.scales": 2}
        restored, about = restore(path, operator=JPEG(), overrides=settings, report=True)
        assert restored.shape == shape and restored.dtype == np.uint8
        assert about["result"]["share_in_cells"] > 0.9
        assert about["chosen"]["red.denoiser"]["init_args"]["sigma"] == pytest.approx(4.7, abs=0.3)
    with pytest.raises(ValueError, match="in its file"):
        restore(photo("grey", 40, 56), "jpeg", settings)


def test_what_cannot_be_compressed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="1 or 3 channels, got an image of 4"):
        compress(torch.rand(1, 4, 16, 16), 50)
    with pytest.raises(ValueError, match="in its file"):
        RestorationDataModule(measurement="sample:camera", operator=JPEG()).setup()
    with pytest.raises(ValueError, match=r"data\.noise cannot be used"):
        RestorationDataModule("sample:camera", operator=JPEG(), noise=GaussianNoise(2)).setup()
