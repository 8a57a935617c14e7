"""Blind deblurring: three kernels on five images, and what cannot be deblurred.

    python tests/benchmarks/blind.py
    python tests/benchmarks/blind.py --kernels point --sigma 1
    python tests/benchmarks/blind.py --images house --kernels shake

The images are parts of 128×128 pixels of scikit-image's, blurred as part of a larger scene, so that
light from beyond the border is in them, with 8 bits; "house" is a whole one of 256×256. PSNR on
luminance, without a border of 10 pixels, and at the shift by whole pixels that fits best. The fits
have the settings of `deepred restore --blur unknown:21`; the other one is told the true kernel, and
the same boundary. Every row is printed, and appended to `lightning_logs/blind.jsonl`, next to the
pictures and kernels.
"""

import argparse
import json
import logging
import time
import warnings
from pathlib import Path

import numpy as np
import skimage.data
import torch
from scipy import ndimage
from torch import Tensor

from deepred_pl.blind import correlation
from deepred_pl.callbacks import KernelUpdate, REDUpdate
from deepred_pl.cli import RestorationCLI
from deepred_pl.images import ImageFormat, read_image, to_array, to_tensor, write_image
from deepred_pl.lightning import NAME
from deepred_pl.metrics import psnr
from deepred_pl.operators import Blur, unknown_blur
from deepred_pl.report import registered

LOGS = Path("lightning_logs")
PLACES = {
    "astronaut": (20, 140),
    "camera": (192, 192),
    "chelsea": (86, 161),
    "coffee": (136, 236),
    "rocket": (149, 256),
}
SIDE, ROOM, SIZE, BORDER = 128, 20, 21, 10


def shake(steps: int = 400, reach: float = 7.5) -> np.ndarray:
    """A random walk with inertia, as the path of a camera."""
    generator = np.random.default_rng(5)
    speed, place, path = np.zeros(2), np.zeros(2), []
    for _ in range(steps):
        speed = 0.97 * speed + generator.normal(size=2)
        place = place + speed
        path.append(place)
    path = np.array(path) - np.mean(path, axis=0)
    path *= reach / np.abs(path).max()
    kernel = np.zeros((SIZE, SIZE))
    offsets = np.arange(SIZE) - SIZE // 2
    for down, right in path:
        rows, columns = (np.clip(1 - np.abs(offsets - at), 0, None) for at in (down, right))
        kernel += np.outer(rows, columns)
    kernel = ndimage.gaussian_filter(kernel, 0.5)
    return np.where(kernel < 0.01 * kernel.max(), 0, kernel)


def disc(radius: float = 4.0, parts: int = 9) -> np.ndarray:
    """A defocused lens: a disc, by the area of each pixel that is within."""
    fine = (np.arange(11 * parts) + 0.5) / parts - 5.5
    within = np.hypot(fine[:, None], fine) <= radius
    return within.reshape(11, parts, 11, parts).mean(axis=(1, 3))


KERNELS = {
    "motion": Blur.motion(13, 35).kernel.double().numpy(),
    "disc": disc(),
    "shake": shake(),
    "point": np.ones((1, 1)),
}


def full(kernel: np.ndarray) -> np.ndarray:
    rows, columns = ((SIZE - side) // 2 for side in kernel.shape)
    padded = np.pad(kernel, ((rows, rows), (columns, columns)))
    return padded / padded.sum()


def measured(name: str, kernel: np.ndarray, sigma: float) -> tuple[Tensor, Tensor]:
    """The true image and its measurement, (1, C, H, W)."""
    if name == "house":
        scene, room = read_image("set:cbm3d9/image_House256rgb")[0], 0
    else:
        top, left = (at - ROOM for at in PLACES[name])
        scene, room = to_tensor(getattr(skimage.data, name)())[0], ROOM
        scene = scene[..., top : top + SIDE + 2 * ROOM, left : left + SIDE + 2 * ROOM]
    blurred = Blur(kernel, "reflect")(scene)
    inner = (..., *(slice(room, side - room) for side in scene.shape[-2:]))
    noise = sigma / 255 * torch.randn(blurred.shape, generator=torch.Generator().manual_seed(1))
    y = (blurred + noise)[inner].clamp(0, 1)
    return scene[inner], to_tensor(to_array(y, ImageFormat()))[0]


def fitted(y: Tensor, sigma: float, steps: int, kernel: np.ndarray | None) -> tuple:
    """The restored image, the operator and the seconds; None searches for the kernel."""
    path = LOGS / "blind_y.png"
    write_image(path, y)
    options = [f"--config=deblurring_{'uniform' if kernel is not None else 'blind'}"]
    if kernel is not None:
        np.save(LOGS / "blind_true.npy", kernel)
        given = {"path": str(LOGS / "blind_true.npy"), "boundary": "unknown"}
        given = {"class_path": "deepred_pl.operators.Blur.from_file", "init_args": given}
        options.append("--data.operator=" + json.dumps(given))
    else:
        options.append(f"--data.operator.size={SIZE}")
    options += [
        *(f"--data.measurement={path}", f"--data.noise.sigma={sigma}"),
        *(f"--trainer.max_steps={steps}", f"--model.lr_scheduler.total_steps={steps}"),
        *("--trainer.logger=false", "--trainer.enable_progress_bar=false"),
    ]
    began = time.perf_counter()
    cli = RestorationCLI(options, run=False)
    kept = [c for c in cli.trainer.callbacks if isinstance(c, REDUpdate | KernelUpdate)]
    cli.trainer.callbacks = kept
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return cli.model.restored, cli.model.problem.operator, time.perf_counter() - began


def compare(name: str, kind: str, sigma: float, steps: int, nonblind: bool) -> None:
    truth, y = measured(name, KERNELS[kind], sigma)
    true = full(KERNELS[kind])
    restored, operator, seconds = fitted(y, sigma, steps, None)
    blur = unknown_blur(operator)
    kernel = blur.kernel.double().numpy()
    images = {"measured": y, "blind": restored}
    if nonblind:
        images["true kernel"] = fitted(y, sigma, steps, KERNELS[kind])[0]
    row = {
        **{"image": name, "kernel": kind, "sigma": sigma, "steps": steps},
        **{
            method: round(float(psnr(*registered(image, truth, BORDER), "luminance")), 2)
            for method, image in images.items()
        },
        "correlation": round(correlation(kernel, true), 3),
        "largest": round(float(kernel.max()), 3),
        "agreement": round(blur.agreement, 2),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(row), flush=True)
    with (LOGS / "blind.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    for method, image in images.items():
        write_image(LOGS / f"blind_{name}_{kind}_{sigma:g}_{method.replace(' ', '_')}.png", image)
    for which, values in {"true": true, "found": kernel}.items():
        picture = torch.from_numpy(values / values.max()).float()[None, None]
        write_image(LOGS / f"blind_{name}_{kind}_{sigma:g}_kernel_{which}.png", picture)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", nargs="+", default=list(PLACES))
    parser.add_argument("--kernels", nargs="+", default=["motion", "disc", "shake"])
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--only_blind", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger(NAME).setLevel(logging.ERROR)
    LOGS.mkdir(exist_ok=True)
    for kind in arguments.kernels:
        for name in arguments.images:
            compare(name, kind, arguments.sigma, arguments.steps, not arguments.only_blind)


if __name__ == "__main__":
    main()
