"""restore(), the one-call form."""

from functools import partial

import numpy as np
import pytest
import skimage.data
import torch

from deepred_pl import DeepRED, InverseProblem, REDUpdate, restore
from deepred_pl.cli import settings_of
from deepred_pl.denoisers import NonLocalMeans
from deepred_pl.lightning import Callback
from deepred_pl.networks import DeepDecoder, SkipNet
from deepred_pl.noise import GaussianNoise
from deepred_pl.operators import Blur, Downsample, Mask, Radon
from deepred_pl.optim import WarmupCosine
from tests.helpers import picture, smooth

TINY = {
    "trainer.max_steps": 3,
    "trainer.enable_progress_bar": False,
    "trainer.accelerator": "cpu",
    "trainer.precision": 32,
    "model.network.init_args.width": 4,
    "model.network.init_args.scales": 2,
}
CLEAN = TINY | {"data.noise.sigma": 3}  # to denoise a photograph without much noise


def stored(dtype, channels=3):
    array = picture(channels, 33, 47)[0].movedim(0, -1).numpy()
    if np.issubdtype(dtype, np.integer):
        array = np.rint(array * np.iinfo(dtype).max)
    array = array.astype(dtype)
    return array[..., 0] if channels == 1 else array


@pytest.mark.parametrize(
    ("dtype", "channels"),
    [(np.uint8, 1), (np.uint8, 3), (np.uint16, 2), (np.float32, 3), (np.float64, 1)],
)
def test_an_array_comes_back_as_it_went(dtype, channels):
    image = stored(dtype, channels)
    restored = restore(image, overrides=CLEAN)
    assert isinstance(restored, np.ndarray)
    assert restored.shape == image.shape and restored.dtype == image.dtype
    # The average of three steps is 97 % the measurement it started at, and 3 % the network's.
    peak = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    change = np.abs(restored.astype(float) - image.astype(float)).mean()
    assert 0.002 * peak < change < 0.01 * peak


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [
        (torch.uint8, (33, 47)),
        (torch.uint8, (1, 3, 33, 47)),
        (torch.float32, (3, 33, 47)),
        (torch.float32, (33, 47)),
        (torch.float64, (1, 1, 33, 47)),
        (torch.bfloat16, (1, 3, 33, 47)),
    ],
)
def test_a_tensor_comes_back_as_it_went(shape, dtype):
    image = picture(1 if len(shape) == 2 else shape[-3], 33, 47).reshape(shape)
    image = image.to(dtype) if dtype.is_floating_point else (image * 255).to(dtype)
    restored = restore(image, overrides=CLEAN)
    assert restored.shape == image.shape and restored.dtype == dtype
    peak = 1 if dtype.is_floating_point else 255
    assert 0.002 * peak < (restored.float() - image.float()).abs().mean() < 0.01 * peak


def test_settings_may_be_numpys():
    angles = np.linspace(0, 180, 15, endpoint=False)
    clean = Radon(angles)(picture(1, 23, 23))
    image = 33 * GaussianNoise(0.5).sample(clean, torch.Generator().manual_seed(0)).numpy()
    settings = {**TINY, "data.operator.angles": angles, "trainer.max_steps": np.int64(2)}
    settings["data.intensity_range"] = np.array([0, 33.0], np.float32)
    assert restore(image[0, 0], "tomography", overrides=settings).shape == (23, 23)


def test_it_is_what_the_same_fit_gives_by_hand(make_trainer):
    # With this much noise λ and μ leave their floor within six steps.
    noise, weights = GaussianNoise(75), {"lam": 0.03, "mu": 0.05}
    y = noise.sample(picture(1, 33, 47), torch.Generator().manual_seed(0)).clamp(0, 1)
    overrides = {"red.every_n_steps": 2, "trainer.max_steps": 6}
    overrides |= {f"model.{name}": value for name, value in weights.items()}
    model = DeepRED(
        network=partial(SkipNet, width=4, scales=2),
        optimizer=partial(torch.optim.Adam, lr=0.01, betas=(0.9, 0.95), fused=True),
        lr_scheduler=partial(WarmupCosine, total_steps=1200, warmup_steps=30),
        weighting="discrepancy",
        input_scale=1.0,
        input_noise_std=0.1,
        problem=InverseProblem(y, noise=noise),
        **weights,
    )
    update = REDUpdate(NonLocalMeans(3), every_n_steps=2)
    make_trainer(max_steps=6, callbacks=[update]).fit(model)
    assert model.lam > 0.15 and model.mu > 0.25
    assert torch.equal(restore(y, "denoising", TINY | overrides, noise=noise), model.restored)


def test_the_parts_can_be_given():
    x = picture(3, 36, 48)
    small = Downsample(4)(x)[0]
    several = ["super_resolution", "methods/quick"]
    assert restore(small, several, TINY).shape == x[0].shape
    assert restore(x, "deblurring_gaussian", TINY, operator=Blur.uniform(5)).shape == x.shape
    mask = picture(1, 36, 48) > 0.4
    assert restore(x[0], "inpainting", TINY, operator=Mask(mask)).shape == x[0].shape
    sinogram = Radon(7)(x[..., :36])[0].movedim(0, -1).numpy()
    restored = restore(sinogram, "tomography", TINY | {"data.operator.angles": 7})
    assert restored.shape == (36, 36, 3) and restored.dtype == np.float32


def test_denoiser_network_and_callbacks_may_be_objects():
    y, seen = picture(3, 33, 47), []

    def denoiser(x):
        seen.append(x.shape)
        return smooth(x)

    class Watch(Callback):
        def on_train_end(self, trainer, module):
            seen.append(type(module.network))

    objects = {"denoiser": denoiser, "network": partial(DeepDecoder, width=4, scales=2)}
    every_step = CLEAN | {"red.every_n_steps": 1}
    restored = restore(y, overrides=every_step, callbacks=[Watch()], **objects)
    assert seen[-1] is DeepDecoder and set(seen[:-1]) == {y.shape} and len(seen) > 1
    del objects["denoiser"]
    assert not torch.equal(restore(y, overrides=every_step, **objects), restored)
    seen.clear()
    tiled = restore(y, overrides=CLEAN, tile=33, callbacks=[Watch()], denoiser=denoiser)
    assert tiled.shape == y.shape and seen.count(SkipNet) == 2


def test_nothing_is_written_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    restore(picture(1), overrides=CLEAN)
    assert not list(tmp_path.iterdir())
    restore(picture(1), overrides={**CLEAN, "trainer.default_root_dir": str(tmp_path / "kept")})
    assert (tmp_path / "kept/lightning_logs/version_0/restored.tif").is_file()


def test_an_intensity_range_is_undone():
    image = (stored(np.uint16, 1) // 16 + 100).astype(np.uint16)  # 12 bits
    restored = restore(image, overrides={**CLEAN, "data.intensity_range": [100, 4195]})
    assert restored.dtype == np.uint16 and restored.min() >= 100 and restored.max() <= 4195
    assert 0.002 * 4095 < np.abs(restored.astype(float) - image).mean() < 0.01 * 4095


@pytest.mark.parametrize(
    ("image", "arguments", "message"),
    [
        (stored(np.uint8), {"task": "denoisin"}, "shipped are .*denoising"),
        (stored(np.uint8), {"overrides": {"red.every_n_step": 2}}, "every_n_step"),
        (stored(np.uint8), {"overrides": {"data.measurement": "a.png"}}, "the measurement itself"),
        (stored(np.uint8), {"task": "inpainting"}, "give the mask"),
        (
            stored(np.uint8),
            {"task": "inpainting", "overrides": {"data.operator.mask": np.ones((33, 47))}},
            r"got an array \(33, 47\).*operator=Mask",
        ),
        (stored(np.uint8), {"operator": torch.ones(3, 3)}, "methods A and A_adjoint"),
        (
            stored(np.float32),
            {"task": "tomography", "overrides": {"data.intensity_range": "minmax"}},
            "shifts 0",
        ),
        (stored(np.uint8).astype(np.float32), {"task": "denoising"}, r"\[0, 1\].*got"),
        (stored(np.float32) * np.nan, {}, "NaN"),
        (np.zeros((2, 3, 33, 47), np.uint8), {}, "one image"),
        (torch.zeros(2, 3, 33, 47), {}, "one image at a time"),
        ([1, 2], {}, r"array, a tensor or a file\'s path, got list; use numpy\.asarray"),
        (stored(np.uint8)[:20], {"noise": GaussianNoise(3)}, "at least 33×33 pixels"),
        (stored(np.uint8), {"task": "tomography"}, "with 60 angles"),
        (stored(np.uint8), {"denoiser": NonLocalMeans}, "denoiser must be an object of"),
        (stored(np.uint8), {"network": SkipNet(3, 4)}, "network must be a class or function"),
        (stored(np.uint8), {"noise": 25}, "noise must be one of"),
        (stored(np.uint8), {"callbacks": [Callback]}, "must be a list of callback objects"),
        (stored(np.uint8), {"callbacks": Callback()}, "must be a list of callback objects"),
        (
            stored(np.uint8),
            {"callbacks": [REDUpdate(smooth)]},
            r"restore\(\) has a REDUpdate of its own; give its denoiser as denoiser=",
        ),
        (
            stored(np.uint8),
            {"task": ["denoising", "methods/dip"], "denoiser": smooth},
            "fits a DeepImagePrior; leave denoiser out",
        ),
    ],
)
def test_what_cannot_be_is_refused(image, arguments, message):
    with pytest.raises(ValueError, match=message):
        restore(image, **arguments)


def test_the_processes_random_numbers_are_left_alone():
    before = torch.random.get_rng_state()
    restore(picture(1), overrides=CLEAN)
    assert torch.equal(before, torch.random.get_rng_state())


def test_tiles_are_as_good_as_the_whole_and_leave_no_seam():
    truth = skimage.data.astronaut()[40:104, 150:262]
    noise = np.random.default_rng(0).normal(0, 25, truth.shape)
    y = np.clip(truth + noise, 0, 255).astype(np.uint8)
    few = {"trainer.max_steps": 100, "model.lr_scheduler.total_steps": 100}
    settings = {**few, "model.network.width": 8, "trainer.enable_progress_bar": False}
    settings |= {"trainer.accelerator": "cpu", "model.input_noise_std": 0.033}
    whole = restore(y, ["denoising", "methods/quick"], settings)
    tiled = restore(y, ["denoising", "methods/quick"], settings, tile=64)

    def psnr(image):
        return -10 * np.log10(np.mean(((image.astype(float) - truth) / 255) ** 2))

    def across_cuts(image):
        """Mean difference of neighbours across the tiles' borders, against elsewhere."""
        right = np.abs(np.diff(image.astype(float), axis=1)).mean((0, 2))
        columns = [47, 63]  # tiles of 64 from 0 and 48
        return right[columns].mean() / np.delete(right, columns).mean()

    assert psnr(tiled) > psnr(whole) - 0.2 > psnr(y) + 3
    assert abs(across_cuts(tiled) / across_cuts(whole) - 1) < 0.05


def test_tiles_that_are_kept_have_all_digits(tmp_path):
    image = stored(np.float32, 1)
    settings = {**CLEAN, "trainer.default_root_dir": str(tmp_path)}
    restore(image, "denoising", settings, tile=24, overlap=8)
    tiles = list(tmp_path.rglob("restored.*"))
    assert len(tiles) == 6 and {path.suffix for path in tiles} == {".tif"}


def test_one_device_is_the_default():
    assert settings_of(["--config=denoising"])["trainer"]["devices"] == 1
