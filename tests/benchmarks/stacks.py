"""Frames of a moving scene and bands of a cube: PSNR against seconds, one by one and together.

    python tests/benchmarks/stacks.py frames --scene camera
    python tests/benchmarks/stacks.py frames --scene camera --motion 4
    python tests/benchmarks/stacks.py bands
    python tests/benchmarks/stacks.py sizes

The scenes are made of scikit-image's pictures. Every row is printed, and appended to
`lightning_logs/stacks.jsonl`. A fit has one thread; its seconds are those of `Trainer.fit`.
"""

import argparse
import json
import logging
import resource
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import scipy.ndimage
import skimage.data
import skimage.transform
import torch
from torch import Tensor, nn

from deepred_pl import DeepRED, InverseProblem, REDUpdate
from deepred_pl.callbacks import CollapseGuard
from deepred_pl.callbacks.preflight import step_memory
from deepred_pl.denoisers import BM3D, Denoiser, NonLocalMeans, PrincipalComponents
from deepred_pl.lightning import NAME, LightningModule, Trainer
from deepred_pl.networks import SkipNet
from deepred_pl.noise import GaussianNoise, PoissonNoise
from deepred_pl.operators import Blur
from deepred_pl.optim import WarmupCosine

ROWS = Path("lightning_logs") / "stacks.jsonl"
CORNERS = {"camera": (60, 180), "astronaut": (40, 140), "coffee": (100, 200)}
FRAMES, SIDE, PEAK = 12, 96, 200  # photons at white
PAN, OBJECT = (-0.62, -0.37), (0.45, 1.3)  # pixels per frame; the object's is never more than ×2.5
BANDS, CUBE, SIGMA = 31, 128, 10.0


def report(what: str, **values: object) -> None:
    row = {"what": what, **values}
    print(json.dumps(row), flush=True)
    ROWS.parent.mkdir(exist_ok=True)
    with ROWS.open("a") as file:
        file.write(json.dumps(row) + "\n")


def psnr(image: Tensor, truth: Tensor) -> list[float]:
    """PSNR of each channel, (1, C, H, W), in dB."""
    return (-10 * torch.log10((image - truth).square().mean((0, 2, 3)))).tolist()


def fit(model: LightningModule, steps: int, callbacks: list, path: Path | None = None) -> float:
    """Train; return the seconds."""
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    began = time.perf_counter()
    trainer.fit(model)
    seconds = time.perf_counter() - began
    if path is not None:
        trainer.save_checkpoint(path)
    return seconds


def schedule(steps: int) -> partial:
    return partial(WarmupCosine, total_steps=steps, warmup_steps=min(30, steps // 10))


ADAM = partial(torch.optim.Adam, lr=0.01, betas=(0.9, 0.95), fused=True)


# Frames


def moving_scene(name: str, motion: float) -> Tensor:
    """A picture that is panned and a coin that crosses it, by parts of a pixel, (1, T, H, W)."""
    picture = getattr(skimage.data, name)()
    picture = (picture.mean(-1) if picture.ndim == 3 else picture) / 255.0
    top, left = CORNERS[name]
    room = SIDE + 32 + int(8 * motion)
    picture = picture[top - 8 : top - 8 + room, left - 8 : left - 8 + room]
    rows, columns = np.mgrid[:50, :50] - 24.5
    disc = scipy.ndimage.gaussian_filter((np.hypot(rows, columns) < 15).astype(float), 1)
    coin = skimage.data.coins()[20:70, 30:80] / 255.0
    frames = []
    for t in range(FRAMES):
        pan = [motion * t * p for p in PAN]
        frame = scipy.ndimage.shift(picture, pan, order=3, mode="nearest")
        layer, mask = np.zeros_like(frame), np.zeros_like(frame)
        layer[30:80, 20:70], mask[30:80, 20:70] = coin, disc
        moved = [min(motion, 2.5) * t * p for p in OBJECT]
        layer = scipy.ndimage.shift(layer, moved, order=3)
        mask = scipy.ndimage.shift(mask, moved, order=1)
        frames.append(((1 - mask) * frame + mask * layer)[8 : 8 + SIDE, 8 : 8 + SIDE])
    return torch.from_numpy(np.clip(np.stack(frames), 0, 1)).float()[None]


def blur() -> Blur:
    return Blur.gaussian(25, 1.6, boundary="reflect")


def deblurring(y: Tensor, steps: int, init_from: str | None = None) -> DeepRED:
    """`deblurring_gaussian` with photon counts."""
    return DeepRED(
        network=partial(SkipNet, width=32),
        optimizer=ADAM,
        lr_scheduler=schedule(steps),
        fidelity="backprojection",
        lam=0.7,
        mu=0.7,
        weighting="discrepancy",
        input_scale=1.0,
        input_noise_std=0.01,
        init_from=init_from,
        problem=InverseProblem(
            y, blur(), PoissonNoise(PEAK), limits=(0.0, max(1.0, float(y.max())))
        ),
    )


def red(submodule: str = "") -> REDUpdate:
    return REDUpdate(NonLocalMeans(sigma=4), every_n_steps=10, submodule=submodule)


class Shared(LightningModule):
    """One network for all frames, with z interpolated between two, and the losses summed."""

    def __init__(self, y: Tensor, steps: int) -> None:
        super().__init__()
        self.frames = nn.ModuleList(deblurring(frame, steps) for frame in y.split(1, dim=1))
        first = self.frames[0]
        last = torch.rand(first.z.shape, generator=torch.Generator().manual_seed(1))
        for t, frame in enumerate(self.frames):
            frame.network = first.network
            frame.z.copy_(torch.lerp(first.z, last, t / (len(self.frames) - 1)))
        self.steps = steps

    def training_step(self, batch: object, batch_idx: int) -> Tensor:
        return sum(frame.training_step() for frame in self.frames)

    def configure_optimizers(self) -> dict:
        optimizer = ADAM(self.frames[0].network.parameters())
        rate = {"scheduler": schedule(self.steps)(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": rate}

    def train_dataloader(self) -> range:
        return range(10**9)


def frames(scene: str, motion: float) -> None:
    truth = moving_scene(scene, motion)
    y = PoissonNoise(PEAK).sample(blur()(truth), torch.Generator().manual_seed(0))
    say = partial(report, scene=scene, motion=motion)
    say("measured", psnr=np.mean(psnr(y, truth)))

    def one_by_one(what: str, first: int, others: int) -> None:
        seconds, restored, before = 0.0, [], None
        for frame in y.split(1, dim=1):
            chained = what == "chained"
            steps = first if before is None else others
            model = deblurring(frame, steps, before if chained else None)
            before = str(ROWS.parent / f"{scene}_{motion}_{what}.ckpt")
            seconds += fit(model, steps, [CollapseGuard(), red()], Path(before))
            restored.append(model.restored)
        values = psnr(torch.cat(restored, dim=1), truth)
        say(what, first=first, steps=others, seconds=seconds, psnr=np.mean(values))

    def together(steps: int) -> None:
        model = deblurring(y, steps)
        seconds = fit(model, steps, [CollapseGuard(), red()])
        values = psnr(model.restored, truth)
        say("together", steps=steps, seconds=seconds, psnr=np.mean(values), least=min(values))

    def shared(steps: int) -> None:
        model = Shared(y, steps)
        seconds = fit(model, steps, [red(f"frames.{t}") for t in range(FRAMES)])
        restored = torch.cat([frame.restored for frame in model.frames], dim=1)
        say("shared", steps=steps, seconds=seconds, psnr=np.mean(psnr(restored, truth)))

    ROWS.parent.mkdir(exist_ok=True)
    for steps in (300, 600, 1200):
        together(steps)
    for steps in (75, 150, 300):
        one_by_one("chained", 300, steps)
        one_by_one("separate", 2 * steps, 2 * steps)
    for steps in (150, 300):
        shared(steps)


# Bands


def cube(bands: int, side: int = CUBE) -> Tensor:
    """Six pictures with smooth spectra, (1, C, H, W)."""
    data = skimage.data
    maps = [data.astronaut()[..., 0], data.camera(), data.coffee()[..., 2]]
    maps += [data.chelsea()[..., 0], data.rocket()[..., 1], data.coins()]
    corners = [((m.shape[0] - 256) // 2, (m.shape[1] - 256) // 2) for m in maps]
    maps = [m[i : i + 256, j : j + 256] / 255 for m, (i, j) in zip(maps, corners, strict=True)]
    small = np.stack([skimage.transform.resize(m, (side, side), anti_aliasing=True) for m in maps])
    centres, widths = np.linspace(-0.1, 1.1, 6), np.array([0.15, 0.2, 0.12, 0.25, 0.18, 0.14])
    spectra = np.exp(-0.5 * ((np.linspace(0, 1, bands)[:, None] - centres) / widths) ** 2)
    image = np.einsum("bm,mhw->bhw", spectra, small)
    return torch.from_numpy(image / image.max()).float()[None]


def denoising(y: Tensor, sigma: Sequence[float], steps: int, width: int) -> DeepRED:
    """`denoising` with the weights that `deepred restore` chooses for this noise."""
    scale = float(np.mean(np.square(sigma))) / 25**2
    low, high = min(0.0, float(y.min())), max(1.0, float(y.max()))
    return DeepRED(
        network=partial(SkipNet, width=width),
        optimizer=ADAM,
        lr_scheduler=schedule(steps),
        lam=0.5 * scale,
        mu=0.5 * scale,
        weighting="discrepancy",
        input_scale=1.0,
        input_noise_std=0.1 * scale,
        problem=InverseProblem(y, noise=GaussianNoise(list(sigma)), limits=(low, high)),
    )


def bands() -> None:
    truth = cube(BANDS)
    order = np.random.default_rng(0).permutation(BANDS)
    sigma = (SIGMA * 2 ** np.linspace(-0.5, 0.5, BANDS)[order]).tolist()
    white = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    y = truth + white * torch.tensor(sigma).view(1, -1, 1, 1) / 255

    def say(what: str, restored: Tensor, seconds: float, **values: object) -> None:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        mean = np.mean(psnr(restored, truth))
        report(what, psnr=mean, seconds=seconds, largest_memory_so_far=memory, **values)

    def joint(what: str, denoiser: Denoiser, steps: int, width: int) -> None:
        model = denoising(y, sigma, steps, width)
        seconds = fit(model, steps, [CollapseGuard(), REDUpdate(denoiser, every_n_steps=10)])
        needed = step_memory(model) / 2**30
        say(what, model.restored, seconds, steps=steps, width=width, step_memory=needed)

    def by_band(steps: int) -> None:
        seconds, restored = 0.0, []
        for band, one in zip(y.split(1, dim=1), sigma, strict=True):
            model = denoising(band, [one], steps, 32)
            update = REDUpdate(NonLocalMeans(sigma=3), every_n_steps=10)
            seconds += fit(model, steps, [CollapseGuard(), update])
            restored.append(model.restored)
        needed = step_memory(model) / 2**30
        image = torch.cat(restored, dim=1)
        say("band by band", image, seconds, steps=steps, width=32, step_memory=needed)

    def once(what: str, denoiser: Denoiser) -> None:
        began = time.perf_counter()
        restored = denoiser(y)
        say(what, restored, time.perf_counter() - began)

    rms = float(np.sqrt(np.mean(np.square(sigma))))
    say("measured", y, 0.0)
    for steps in (75, 150):
        by_band(steps)
    components = PrincipalComponents(NonLocalMeans(sigma=3), 6, sigma)
    for steps, width in ((600, 32), (600, 64), (1200, 64)):
        joint("joint", NonLocalMeans(sigma=3), steps, width)
        joint("joint, six components denoised", components, steps, width)
    by_band(300)
    once("BM3D on six components", PrincipalComponents(BM3D(sigma=rms, threads=1), 6))
    once(
        "BM3D on six components, channel_sigmas",
        PrincipalComponents(BM3D(sigma=rms, threads=1), 6, sigma),
    )
    began = time.perf_counter()
    single = [BM3D(sigma=s, threads=1)(b) for b, s in zip(y.split(1, dim=1), sigma, strict=True)]
    say("BM3D band by band", torch.cat(single, dim=1), time.perf_counter() - began)


def sizes() -> None:
    """Time and memory of a step by the number of channels and the width."""
    for side in (128, 256):
        for channels in (1, 3, 31, 100, 200):
            for width in (32, 64):
                y = cube(channels, side)
                model = denoising(y, [SIGMA] * channels, 100, width)
                update = REDUpdate(NonLocalMeans(sigma=3), every_n_steps=10)
                seconds = fit(model, 20, [update]) / 20
                needed = step_memory(model) / 2**30
                report(
                    "step", side=side, channels=channels, width=width, seconds=seconds, GiB=needed
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["frames", "bands", "sizes"])
    parser.add_argument("--scene", choices=CORNERS, default="camera")
    parser.add_argument("--motion", type=float, default=1.0, help="factor of the movement")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger(NAME).setLevel(logging.ERROR)
    if arguments.what == "frames":
        frames(arguments.scene, arguments.motion)
    else:
        {"bands": bands, "sizes": sizes}[arguments.what]()


if __name__ == "__main__":
    main()
