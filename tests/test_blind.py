"""Blind deblurring: the kernel of an unknown blur."""

import math

import numpy as np
import pytest
import skimage.data
import torch
from scipy import ndimage, optimize
from scipy.signal import convolve2d

from deepred_pl import DeepRED, InverseProblem, REDUpdate, plausibility
from deepred_pl.blind import correlation, estimate_kernel, kernel_between, with_few_edges
from deepred_pl.callbacks import KernelUpdate
from deepred_pl.callbacks.guard import _changing
from deepred_pl.callbacks.panels import panels
from deepred_pl.data import RestorationDataModule
from deepred_pl.denoisers import TotalVariation
from deepred_pl.fidelity import automatic_epsilon
from deepred_pl.images import write_image
from deepred_pl.lightning import Trainer
from deepred_pl.noise import GaussianNoise
from deepred_pl.operators import Blur, Observed, UnknownBlur, gaussian_kernel, unknown_blur, without
from deepred_pl.report import diagnosis, registered, score, write_kernel
from deepred_pl.restore import restore
from deepred_pl.tiles import Region
from tests.helpers import TinyNet, picture

SIZE = 9


def scene(height=64, width=72):
    return skimage.data.camera()[150 : 150 + height, 180 : 180 + width] / 255


def oblique(size=SIZE):
    """A kernel without symmetry, centred by its centre of mass."""
    kernel = np.zeros((size, size))
    rows, columns = zip((3, 2), (3, 3), (4, 4), (4, 5), (5, 5), (5, 6), (4, 3), strict=True)
    kernel[list(rows), list(columns)] = 1, 2, 3, 2, 1, 1, 1
    return kernel / kernel.sum()


def blurred(kernel, image=None, sigma=0.0):
    image = scene() if image is None else image
    noise = np.random.default_rng(0).normal(0, sigma / 255, image.shape)
    return ndimage.convolve(image, kernel, mode="mirror") + noise


def test_kernel_between_a_sharp_and_a_blurred_image_is_that_of_the_blur():
    found = kernel_between(scene(), blurred(oblique(), sigma=1), SIZE)
    assert found.min() >= 0 and found.sum() == pytest.approx(1)
    assert correlation(found, oblique()) > 0.97


def test_kernel_between_solves_the_constrained_least_squares_problem():
    """Against SciPy's SLSQP on the explicit matrix of patches."""
    image, size = scene(24, 26), 3
    true = np.array([[0, 1, 0], [2, 3, 0], [0, 1, 1.0]]) / 8
    y = blurred(true, image)
    matrix, wanted = [], []
    for axis in (0, 1):
        gradient = np.roll(image, -1, axis) - image
        shifted = [np.roll(gradient, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        edge = slice(1, image.shape[0] - 2), slice(1, image.shape[1] - 2)
        matrix.append(np.stack([s[edge].ravel() for s in shifted], axis=1))
        wanted.append((np.roll(y, -1, axis) - y)[edge].ravel())
    a, b = np.concatenate(matrix), np.concatenate(wanted)
    solved = optimize.minimize(
        lambda k: ((a @ k - b) ** 2).sum() + (k**2).sum(),
        np.full(9, 1 / 9),
        jac=lambda k: 2 * a.T @ (a @ k - b) + 2 * k,
        bounds=[(0, 1)] * 9,
        constraints={"type": "eq", "fun": lambda k: k.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )
    found = kernel_between(image, y, size)
    np.testing.assert_allclose(found, solved.x.reshape(3, 3), atol=2e-3)


@pytest.mark.parametrize("kernel", [oblique(), np.ones((5, 5)) / 25])
def test_estimated_kernel_is_like_the_true_one(kernel):
    found, agreement = estimate_kernel(blurred(kernel, sigma=0.5), SIZE)
    assert found.shape == (SIZE, SIZE) and found.min() >= 0
    assert found.sum() == pytest.approx(1)
    offsets = np.subtract(ndimage.center_of_mass(found), SIZE // 2)
    assert np.abs(offsets).max() <= 0.51
    assert correlation(found, np.pad(kernel, (SIZE - len(kernel)) // 2)) > 0.75
    assert agreement > 0.6


def test_kernel_of_an_image_that_is_not_blurred_is_nearly_a_point():
    found, _ = estimate_kernel(scene(), SIZE)
    assert found.max() > 0.2
    middle = found[SIZE // 2 - 1 : SIZE // 2 + 2, SIZE // 2 - 1 : SIZE // 2 + 2]
    assert middle.sum() > 0.6


def test_correlation_is_the_largest_one_over_all_shifts():
    first, second = np.random.default_rng(0).random((2, 5, 5))
    norms = np.linalg.norm(first) * np.linalg.norm(second)
    expected = convolve2d(first, second[::-1, ::-1]).max() / norms
    assert correlation(first, second) == pytest.approx(expected)
    assert correlation(first, np.roll(np.pad(first, 2), (1, -2), (0, 1))[2:-2, 2:-2]) < 1
    assert correlation(oblique(), np.roll(oblique(), (1, -1), (0, 1))) == pytest.approx(1)


def test_weak_edges_are_removed_and_strong_ones_stay():
    step = np.zeros((32, 40))
    step[8:24, 10:30] = 1
    noisy = step + np.random.default_rng(0).normal(0, 0.03, step.shape)
    assert np.abs(with_few_edges(noisy, 0.02) - step).mean() < 0.3 * np.abs(noisy - step).mean()


def test_unknown_boundary_leaves_out_what_depends_on_it():
    kernel = oblique()
    wide = torch.from_numpy(scene(64, 80)).float()[None, None]
    y = Blur(kernel, "reflect")(wide)[..., 16:48, 16:64]
    problem = InverseProblem(y, Blur(kernel, "unknown"), ground_truth=wide[..., 16:48, 16:64])
    rows, columns = (side // 2 for side in problem.operator.operator.kernel.shape)
    assert isinstance(problem.operator, Observed)
    assert problem.operator.observed.sum() == (32 - 2 * rows) * (48 - 2 * columns)
    assert float(problem.residual(problem.ground_truth)) < 1e-12
    assert float(InverseProblem(y, Blur(kernel, "reflect")).residual(problem.ground_truth)) > 1e-6
    assert torch.equal(problem.as_image(), y)  # pictures show the border, too
    part = problem.split(24, 8)[1][0]
    assert float(part.residual(part.ground_truth)) < 1e-12


def blind_problem(sigma=1.0, **kwargs):
    truth = torch.from_numpy(scene()).float()[None, None]
    y = torch.from_numpy(blurred(oblique(), sigma=sigma)).float()[None, None]
    return InverseProblem(y, UnknownBlur(SIZE), GaussianNoise(1), truth, **kwargs)


def test_problem_estimates_the_kernel_from_the_measurement_alone():
    problem = blind_problem()
    blur = unknown_blur(problem.operator)
    expected, agreement = estimate_kernel(problem.y[0, 0].double().numpy(), SIZE)
    np.testing.assert_allclose(blur.kernel.numpy(), expected, atol=1e-6)
    assert blur.agreement == pytest.approx(agreement)
    assert problem.operator.observed.sum() == (64 - 8) * (72 - 8)
    part = problem.part(Region(0, 0, 48, 56))
    assert unknown_blur(part.operator) is blur  # it is not estimated again


def model_of(problem, **kwargs):
    return DeepRED(network=TinyNet, problem=problem, fidelity="backprojection", **kwargs)


def fit(model, steps, *callbacks, **kwargs):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [REDUpdate(TotalVariation(0.02), every_n_steps=5), *callbacks]
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        enable_checkpointing=False,
        callbacks=callbacks,
        **quiet,
    )
    trainer.fit(model, **kwargs)
    return trainer


def test_updates_are_evenly_spaced_without_the_first_and_the_last_sixth():
    steps = []

    class Watch(KernelUpdate):
        def _update(self, model):
            super()._update(model)
            steps.append(model.step)

    fit(model_of(blind_problem()), 12, Watch(updates=3))
    assert steps == [2, 6, 10]


@pytest.mark.parametrize("contrast", [1.0, 0.04])
@pytest.mark.parametrize("shape", [(64, 72), (47, 61)])
def test_update_finds_the_true_kernel_if_the_outputs_are_the_true_image(contrast, shape):
    """The average also has the first guess in it, which is blurred."""
    truth = 0.5 + contrast * (scene(*shape) - 0.5)
    y = blurred(oblique(), truth, sigma=contrast)
    images = [torch.from_numpy(np.stack([i, i, i]))[None].float() for i in (truth, y)]
    model = model_of(InverseProblem(images[1], UnknownBlur(SIZE), GaussianNoise(1)))
    fit(model, 30)
    blur = unknown_blur(model.problem.operator)
    blur.kernel.fill_(1 / SIZE**2)
    forgotten = 1 - model.average_decay**30
    model.average.copy_(model.problem.first_guess().lerp(images[0], forgotten))
    KernelUpdate()._update(model)
    assert correlation(blur.kernel.double().numpy(), oblique()) > 0.9


def test_update_without_any_edges_keeps_the_kernel():
    model = model_of(blind_problem())
    fit(model, 2)
    blur = unknown_blur(model.problem.operator)
    before = blur.kernel.clone()
    guess = model.problem.first_guess()
    model.average.copy_(guess.lerp(torch.full_like(guess, 0.5), 1 - model.average_decay**2))
    KernelUpdate()._update(model)
    assert torch.equal(blur.kernel, before)


def test_estimate_depends_neither_on_precision_nor_on_contrast():
    y = blurred(oblique(), sigma=0.5)
    kernel, agreement = estimate_kernel(y, SIZE)
    for other in (y.astype(np.float32), 0.3 + 0.1 * y):
        found, agreed = estimate_kernel(other, SIZE)
        np.testing.assert_allclose(found, kernel, atol=1e-3)
        assert agreed == pytest.approx(agreement, abs=1e-3)


def test_held_out_values_next_to_an_unknown_border_are_the_only_ones_removed():
    problem = InverseProblem(picture(3), Blur.gaussian(5, 1, boundary="unknown"), GaussianNoise(1))
    rest = problem.hold_out(0.1, seed=2)
    held = rest.held_out.bool().expand_as(rest.y)
    torch.testing.assert_close(rest.y, torch.where(held, 0, problem.y))


def test_size_that_is_too_large_to_estimate():
    with pytest.raises(ValueError, match="must be below 128, got 129"):
        UnknownBlur(129)


def test_kernel_is_saved_with_the_fit(tmp_path):
    model = model_of(blind_problem())
    trainer = fit(model, 6, KernelUpdate(updates=2))
    kernel = unknown_blur(model.problem.operator).kernel
    kernel.copy_(kernel.flip(0))
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    again = blind_problem()
    loaded = model_of(again)
    assert not torch.equal(unknown_blur(again.operator).kernel, kernel)
    fit(loaded, 6, KernelUpdate(updates=2), ckpt_path=tmp_path / "fit.ckpt")
    assert torch.equal(unknown_blur(again.operator).kernel, kernel)


def test_scores_are_those_of_the_best_shift():
    problem = blind_problem()
    shifted = problem.ground_truth.roll((2, -1), (2, 3))
    shifted = shifted + 0.01  # 40 dB
    assert score(problem, shifted)["psnr"]["restored"] == pytest.approx(40, abs=0.1)
    image, truth = registered(shifted, problem.ground_truth, 4)
    torch.testing.assert_close(image, truth + 0.01)
    assert truth.shape == (1, 1, 64 - 8, 72 - 8)


def test_written_kernel_is_that_of_a_blur(tmp_path):
    kernel = torch.from_numpy(oblique()).float()
    write_kernel(tmp_path, kernel)
    assert torch.equal(Blur.from_file(tmp_path / "kernel.npy").kernel, Blur(kernel).kernel)
    picture = Blur.from_file(tmp_path / "kernel.png").kernel
    torch.testing.assert_close(picture, Blur(kernel).kernel, atol=1e-4, rtol=0)


def test_unknown_blur_that_cannot_be_is_refused():
    for size in (4, 2, 1):
        with pytest.raises(ValueError, match=r"odd|at least 3"):
            UnknownBlur(size)
    with pytest.raises(ValueError, match="use a larger size"):
        RestorationDataModule("sample:camera", operator=UnknownBlur(5, Blur.uniform(9))).setup()
    with pytest.raises(ValueError, match=r"data\.operator\.simulated"):
        RestorationDataModule("sample:camera", operator=UnknownBlur(5)).setup()
    with pytest.raises(ValueError, match="found by one fit, not by each tile"):
        blind_problem().split(32)
    with pytest.raises(ValueError, match="cannot be estimated"):
        InverseProblem(torch.rand(1, 1, 30, 60), UnknownBlur(15))
    known = InverseProblem(picture(1), Blur.uniform(3), GaussianNoise(1))
    with pytest.raises(ValueError, match="is known"):
        fit(model_of(known), 2, KernelUpdate())
    for settings in ({"updates": 0}, {"strength": 0}):
        with pytest.raises(ValueError, match=r"> 0|at least 1"):
            KernelUpdate(**settings)


def test_simulated_blur_is_not_told():
    blur = Blur.motion(5, 30)
    data = RestorationDataModule("sample:camera", operator=UnknownBlur(SIZE, blur))
    data.setup()
    found = unknown_blur(data.problem.operator)
    simulated = Blur(blur.kernel, "unknown")(data.problem.ground_truth)
    torch.testing.assert_close(data.problem.y, simulated.clamp(0, 1))
    rows, columns = ((SIZE - side) // 2 for side in blur.kernel.shape)
    true = torch.nn.functional.pad(blur.kernel, (columns, columns, rows, rows))
    assert not torch.allclose(found.kernel, true, atol=1e-4)
    assert "estimates agree to" in data.reading


@pytest.mark.parametrize(
    ("agreement", "largest", "warned"),
    [(0.9, 0.1, ""), (0.6, 0.1, "cannot be determined"), (0.9, 0.5, "nearly a point")],
)
def test_kernel_that_cannot_be_determined_is_said_to_be(
    tmp_path, recwarn, monkeypatch, agreement, largest, warned
):
    inner = SIZE - 2
    kernel = np.pad(np.full((inner, inner), (1 - largest) / (inner**2 - 1)), 1)
    kernel[4, 4] = largest
    estimated = kernel, agreement
    monkeypatch.setattr("deepred_pl.operators.estimate_kernel", lambda *image: estimated)
    path, noise = tmp_path / "y.png", GaussianNoise(None)
    write_image(path, torch.from_numpy(scene())[None, None])
    RestorationDataModule(measurement=path, operator=UnknownBlur(SIZE), noise=noise).setup()
    said = [str(w.message) for w in recwarn if "blur" in str(w.message)]
    assert (warned in said[0]) if warned else not said


def test_values_that_are_missing_do_not_shape_the_kernel():
    problem = blind_problem()
    y = problem.y.clone()
    missing = torch.zeros_like(y, dtype=torch.bool)
    missing[..., 30:33, 40:43] = True
    y[missing] = 0
    other = InverseProblem(y, without(UnknownBlur(SIZE), missing), GaussianNoise(1))
    first, second = (unknown_blur(p.operator).kernel.double().numpy() for p in (problem, other))
    assert correlation(first, second) > 0.9
    assert not (other.operator.observed.bool() & missing).any()


def test_restore_returns_the_kernel_that_it_found():
    y = blurred(oblique(), sigma=1).astype(np.float32)
    settings = {"trainer.max_steps": 60, "model.network.width": 8, "model.network.scales": 2}
    restored, about = restore(
        y, operator=UnknownBlur(SIZE), noise=GaussianNoise(1), overrides=settings, report=True
    )
    assert restored.shape == y.shape and about["kernel"].shape == (SIZE, SIZE)
    assert about["kernel"].sum() == pytest.approx(1) and about["kernel"].min() >= 0
    assert not np.allclose(about["kernel"], estimate_kernel(y.astype(float), SIZE)[0], atol=1e-3)


def test_errors_of_a_kernel_that_was_found_count_as_noise_in_the_backprojection():
    problem = blind_problem()
    stated = math.sqrt(float(problem.noise_variance())) * 255
    known = Blur(unknown_blur(problem.operator).kernel, "unknown")
    noisier = InverseProblem(problem.y, known, GaussianNoise(math.hypot(stated, math.sqrt(3))))
    assert automatic_epsilon(problem) == pytest.approx(automatic_epsilon(noisier), rel=0.01)
    assert (
        automatic_epsilon(problem)[0]
        > 1.1 * automatic_epsilon(InverseProblem(problem.y, known, problem.noise))[0]
    )


def test_kernel_is_shown_in_the_panels():
    model = model_of(blind_problem())
    kernel = panels(model)["kernel, rescaled"]
    assert kernel.shape == (1, 1, 8 * SIZE, 8 * SIZE) and kernel.max() == 1
    found = unknown_blur(model.problem.operator).kernel
    torch.testing.assert_close(kernel[0, 0, ::8, ::8], found / found.max())


def test_constant_image_has_no_kernel(recwarn):
    kernel, agreement = estimate_kernel(np.full((64, 64), 0.5), SIZE)
    assert kernel[SIZE // 2, SIZE // 2] == kernel.sum() == 1 and agreement == 0
    problem = InverseProblem(torch.full((1, 1, 64, 64), 0.5), UnknownBlur(SIZE), GaussianNoise(1))
    plausibility.check_kernel(problem)
    assert any("cannot be determined" in str(w.message) for w in recwarn)


def test_kernel_is_among_what_a_collapse_restores():
    model = model_of(blind_problem())
    assert _changing(model)["kernel"] is unknown_blur(model.problem.operator).kernel


def test_update_leaves_the_kernel_of_an_image_that_is_not_finite():
    model = model_of(blind_problem())
    fit(model, 1)
    before = unknown_blur(model.problem.operator).kernel.clone()
    model.average.fill_(math.nan)
    KernelUpdate()._update(model)
    assert torch.equal(unknown_blur(model.problem.operator).kernel, before)


def test_parameter_of_an_operator_behind_a_border_is_not_set_on_its_wrapper():
    problem = InverseProblem(picture(1), Blur.gaussian(5, 1, boundary="unknown"), GaussianNoise(1))
    with pytest.raises(AttributeError, match=r"operator\.operator\.kernel"):
        problem.operator.kernel = gaussian_kernel(5, 2.0)
    problem.operator.operator.kernel = gaussian_kernel(5, 2.0)


def test_large_kernel_that_leaves_little_is_questioned(recwarn):
    blur = Blur.uniform(21, boundary="unknown")
    plausibility.check_kernel(InverseProblem(picture(1), blur, GaussianNoise(1)))
    assert any("far enough from its border" in str(w.message) for w in recwarn)


def test_kernel_that_became_a_point_is_said_to_be():
    said = diagnosis({"kernel_largest": 0.9, "residual_to_sigma": 1.0})
    assert "nearly a point, with 90% of it" in said
    assert diagnosis({"kernel_largest": 0.1, "residual_to_sigma": 1.0}) == ""
    problem = blind_problem()
    result = score(problem, problem.first_guess())
    blur = unknown_blur(problem.operator)
    assert 0 < result["kernel_largest"] < 1 and result["kernel_agreement"] == blur.agreement
    inner = blur.kernel[1:-1, 1:-1].sum()
    assert result["kernel_at_border"] == pytest.approx(1 - float(inner))


def test_kernel_that_is_cut_off_by_its_size_is_noticed(recwarn):
    y = torch.from_numpy(blurred(oblique(), sigma=0.5)).float()[None, None]
    plausibility.check_kernel(InverseProblem(y, UnknownBlur(SIZE), GaussianNoise(1)))
    assert not recwarn
    plausibility.check_kernel(InverseProblem(y, UnknownBlur(5), GaussianNoise(1)))
    assert any("increase data.operator.size" in str(w.message) for w in recwarn)
    assert "increase data.operator.size" in diagnosis(
        {"kernel_at_border": 0.2, "residual_to_sigma": 1.0}
    )


def test_residual_of_a_kernel_that_is_not_exact_is_no_fault():
    result = {"residual_to_sigma": 2.0, "residual_correlation": 0.5, "beyond_limits": []}
    assert diagnosis({**result, "operator": "UnknownBlur"}) == ""
    assert "has structure" in diagnosis({**result, "operator": "Blur"})
    assert "has structure" in diagnosis(
        {**result, "operator": "UnknownBlur", "residual_to_sigma": 4}
    )
