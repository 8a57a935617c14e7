"""The arguments of `deepred restore` and `deepred-batch`."""

import argparse
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from deepred_pl.batch.plan import SUFFIXES
from deepred_pl.choose import seconds_of

# Settings of a single fit that a batch sets, and its own options for them.
OWNED = {
    "data.region": "--tile",
    "data.as_floats": "--restarts or --tile, which set it",
    "trainer.default_root_dir": "--out",
    "trainer.logger": "--out",
    "trainer.devices": "--workers or --gpus",
    "trainer.plugins": "--ray",
    "trainer.enable_progress_bar": "the bar over all fits",
    "trainer.fast_dev_run": "`deepred fit`",
}

RESTORE = """\
Restore images. Say how they were degraded; noise and settings are determined from each image.

  deepred restore photo.jpg                         noise only
  deepred restore blurred.png --blur psf.tif        or gaussian:1.6, uniform:9, motion:15:30
  deepred restore small.png --scale 4
  deepred restore scratched.png --mask mask.png
  deepred restore sinogram.npy --angles 0:180:60
  deepred restore stack.tif --pages 0:10            a file with several images, one by one
  deepred restore folder/ --out restored --sigma 12 --effort 5m

The result of a single file is written next to it. Without a folder as --out, nothing else remains.
"""
BATCH = """\
Restore many images, one fit each, with the configurations of `deepred fit`.

  deepred-batch --config denoising --config methods/quick --images FOLDER --out DIR

DIR gets a run directory for each image, results.csv and summary.md. Repeat the same command to
resume it after a stop. `deepred restore` chooses the configuration and its settings itself.
"""
SETTINGS = """\
Every other --section.key=value is passed to each fit, as in `deepred fit`; {name} in its value
is the image's name without suffix, as in --data.operator.mask 'masks/{name}.png'.
"""

BLUR = """\
the blur's kernel: a file (NPY, PNG, TIFF), gaussian:WIDTH, uniform:SIZE or motion:LENGTH:ANGLE, in
pixels and in degrees counter-clockwise; or unknown:SIZE, to find a kernel of at most SIZE pixels"""
SCALE = "the image is enlarged this many times"
MASK = "image of the same size, white where a pixel is known; the others are filled in"
ANGLES = """\
the image is a sinogram (detectors, angles): START:STOP:COUNT in degrees, without STOP; or a list
0,3,6; or a text or NPY file of them"""
AXES = """\
the axes of TIFF or NPY files, such as CYX, YXC or TZCYX (default: as the file names them): C for
channels, which are restored together; T, Z and others for pages"""
PAGES = "which pages of files with several: START:STOP without STOP, or 0,3,5 (default: all)"
CHAIN = """\
start each page from the network of the page before, in chains of N pages, which run in parallel:
for frames and slices that differ little, which then need half of the steps, as of --effort fast"""
TOGETHER = """\
restore all pages of a file together, as channels of one image: for frames and slices that differ
little, which one network restores better and sooner than one by one"""
JPEG = "remove the artefacts of JPEG compression, which must be those of the file itself"
OVERWRITE = "replace results, and restart fits whose settings have changed"
OUT = "where the results NAME.png, the run directories and the tables go"
SIGMA = "standard deviation of the noise in grey levels of 8 bits (default: estimated)"
EFFORT = "fast, default, best, or the time for an image, such as 90s, 5m or 1h"
TRUTHS = """\
instead of --images: clean images, whose degradation is simulated, for scores; also the published
set:cbm3d9, set:set5, set:set14, set:ncsr and set:inpainting, in DEEPRED_DATA or downloaded; for
true images of --images use --data.ground_truth 'FOLDER/{name}.png'"""
RESTARTS = "fits per image, with seeds model.seed, model.seed + 1, ...; the result is their mean"
TILES = "restore tiles of this side, and blend them"
OVERLAP = "shared by tiles (default: an eighth of a tile, plus what A mixes)"
WORKERS = "parallel fits on this machine (default: what its cores, or GPUs, and memory allow)"
THREADS = "CPU threads per fit (default: OMP_NUM_THREADS, or the cores divided by the workers)"
GPUS = "with --ray: GPUs per fit; with 0.25 four share one"


class _Parser(argparse.ArgumentParser):
    """Raises errors, which `main` reports, and refuses abbreviated names."""

    def __init__(self, name: str, about: str) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(
            name, description=about, epilog=SETTINGS, formatter_class=raw, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        message = message.replace(": not allowed with argument", " cannot be combined with")
        raise ValueError(f"{message}; see `{self.prog} --help`")


def of_restore(args: Sequence[str], began: float) -> argparse.Namespace:
    """Parse the arguments of `deepred restore`; `options` are those of each fit.

    Args:
        args: Command-line arguments.
        began: When the time for a single image began, as of `time.time`.
    """
    own, options = _split(args)
    parser = _Parser("deepred restore", RESTORE)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="files, folders or patterns")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--blur", metavar="KERNEL", help=BLUR)
    task.add_argument("--scale", type=_count, metavar="N", help=SCALE)
    task.add_argument("--mask", metavar="FILE", help=MASK)
    task.add_argument("--angles", metavar="ANGLES", help=ANGLES)
    task.add_argument("--jpeg", action="store_true", help=JPEG)
    add("--sigma", type=float, metavar="S", help=SIGMA)
    add("--effort", default="default", metavar="E", help=EFFORT)
    add("--out", type=Path, metavar="DIR", help=OUT)
    add("--json", action="store_true", help="print the report as JSON, for programs")
    _add_running(parser)
    parsed = parser.parse_args(own)
    if parsed.out is not None and parsed.out.suffix.lower() in SUFFIXES:
        raise ValueError(f"--out is a folder, in which results are NAME.png; got {parsed.out}")
    parsed.role, parsed.method, parsed.began = "data.measurement", [], began
    if seconds_of(parsed.effort) is not None and parsed.chain > 1:  # refuses other efforts, too
        raise ValueError(
            "the networks of a --chain must be equal, but with a time as --effort they depend on "
            f"it; use fast, default or best, got {parsed.effort}"
        )
    if parsed.json and parsed.shard is not None:
        raise ValueError("--shard makes no report; use --json without it")
    config, degraded = _task(parsed)
    parsed.config = [config]
    stated = {name_of_setting(option).partition(".init_args")[0] for option in options}
    if parsed.jpeg and parsed.sigma is not None:
        raise ValueError(
            "--sigma does not apply to --jpeg, whose errors are those of quantization; leave it out"
        )
    if parsed.sigma is not None:
        if any(name.startswith("data.noise") for name in stated):
            raise ValueError("--sigma and --data.noise both state the noise; leave one out")
        if not 0 < parsed.sigma <= 255:
            raise ValueError(f"expected --sigma in (0, 255] grey levels, got {parsed.sigma:g}")
        noise = {"class_path": "GaussianNoise", "init_args": {"sigma": parsed.sigma}}
        degraded.append(f"--data.noise={json.dumps(noise)}")
    # These the fits do not choose.
    parsed.options = (*degraded, *options, *_page_settings(parsed, options))
    _check(parsed, {"data.measurement": "IMAGE"})
    return parsed


def of_batch(args: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of `deepred-batch`; `options` are those of each fit."""
    own, options = _split(args)
    parser = _Parser("deepred-batch", BATCH)
    add = parser.add_argument
    several: dict[str, Any] = {"action": "append", "default": []}
    files: dict[str, Any] = {"nargs": "+", "action": "extend", "default": []}
    add("--config", action="append", required=True, help="YAML file or shipped configuration")
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--images", **files, help="files, folders or patterns: images to restore")
    images.add_argument("--ground_truth", **files, metavar="TRUTHS", help=TRUTHS)
    add(
        "--out", type=Path, required=True, metavar="DIR", help="where run directories and tables go"
    )
    add("--method", **several, help="overlay of a method, such as dip; several are compared")
    _add_running(parser)
    parsed = parser.parse_args(own)
    parsed.options = (*options, *_page_settings(parsed, options))
    parsed.effort, parsed.json = None, False
    parsed.role = "data.ground_truth" if parsed.ground_truth else "data.measurement"
    owned = {"data.measurement": "--images"}
    if parsed.ground_truth:
        owned["data.ground_truth"] = "--ground_truth, and the images to restore by --images"
    parsed.images = parsed.images or parsed.ground_truth
    _check(parsed, owned)
    return parsed


def _add_running(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say how fits run."""
    add = parser.add_argument
    add("--axes", metavar="AXES", help=AXES)
    add("--pages", metavar="PAGES", help=PAGES)
    add("--chain", type=_count, default=1, metavar="N", help=CHAIN)
    add("--together", action="store_true", help=TOGETHER)
    add("--restarts", type=_count, default=1, metavar="R", help=RESTARTS)
    add("--tile", type=_count, metavar="PIXELS", help=TILES)
    add("--overlap", type=int, metavar="PIXELS", help=OVERLAP)
    add("--workers", type=_count, metavar="N", help=WORKERS)
    add("--threads", type=_count, metavar="T", help=THREADS)
    add("--ray", metavar="ADDRESS", help="run on a Ray cluster; `local` starts one here")
    add("--gpus", type=float, metavar="G", help=GPUS)
    add("--shard", metavar="I/N", help="only the I-th of N parts of the fits (from 1), no tables")
    add("--overwrite", action="store_true", help=OVERWRITE)


def _split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate the command's arguments from settings of the fits, which have a dot in the name."""
    own, settings, rest = [], [], iter(args)
    for arg in rest:
        name, equals, _ = arg.partition("=")
        if not (name.startswith("--") and "." in name):
            own.append(arg)
        elif equals:
            settings.append(arg)
        else:
            value = next(rest, None)
            if value is None:
                raise ValueError(f"expected a value after {arg}, got none")
            settings.append(f"{arg}={value}")
    return own, settings


def name_of_setting(option: str) -> str:
    """The name of a command-line option --name=value or --name+=value."""
    return option[2:].partition("=")[0].rstrip("+")


def _page_settings(arguments: argparse.Namespace, options: Sequence[str]) -> list[str]:
    """The settings of --axes and --together, unless the options have them, too."""
    names = [name_of_setting(option) for option in options]
    which = {"--pages": arguments.pages, "--together": arguments.together or None}
    choosing = [name for name, value in which.items() if value is not None]
    choosing += ["--data.page"] * ("data.page" in names)
    if len(choosing) > 1:
        raise ValueError(f"{' and '.join(choosing)} cannot be combined; leave one out")
    if arguments.axes is not None and "data.axes" in names:
        raise ValueError("--axes and --data.axes state the same; leave one out")
    axes = [] if arguments.axes is None else [f"--data.axes={arguments.axes}"]
    return [*axes, *["--data.page=all"] * arguments.together]


def _check(arguments: argparse.Namespace, owned: dict[str, str]) -> None:
    """Refuse incompatible arguments."""
    for option in arguments.options:
        name = name_of_setting(option)
        for mine, instead in {**OWNED, **owned}.items():
            if name == mine or name.startswith(mine + "."):
                raise ValueError(f"--{name} is set by this command; use {instead}")
    if arguments.ray is None and arguments.gpus is not None:
        raise ValueError("--gpus requires --ray; on this machine use --workers to share its GPUs")
    if arguments.ray not in (None, "local") and arguments.workers is not None:
        raise ValueError("--workers is for this machine; a cluster runs as many as its cores allow")
    if arguments.shard is not None and arguments.overwrite:
        raise ValueError("--overwrite would delete other shards' results; use it without --shard")
    if arguments.shard is not None and arguments.chain > 1:
        raise ValueError("--shard would cut the chains of --chain; use one of them")
    if arguments.tile is None and arguments.overlap is not None:
        raise ValueError("--overlap applies to tiles; set --tile too")
    if arguments.overlap is not None and not 0 <= arguments.overlap < arguments.tile:
        raise ValueError(
            f"expected --overlap of at least 0 and less than --tile {arguments.tile}, got "
            f"{arguments.overlap}"
        )
    arguments.shard = None if arguments.shard is None else _shard(arguments.shard)


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise ValueError(f"expected --shard I/N with 1 <= I <= N, such as 3/8, got {text}")
    return int(index), int(count)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return int(text)


# The degradation


def _task(parsed: argparse.Namespace) -> tuple[str, list[str]]:
    """The configuration for the degradation, and its operator's option."""
    if parsed.blur is not None:
        unknown = parsed.blur.startswith("unknown:")
        return "deblurring_blind" if unknown else "deblurring_uniform", [_blur(parsed.blur)]
    if parsed.scale is not None:
        if parsed.scale == 1:
            raise ValueError("--scale 1 enlarges nothing; leave it out, or use 2 or more")
        return "super_resolution", [f"--data.operator.factor={parsed.scale}"]
    if parsed.mask is not None:
        _check_file("--mask", parsed.mask)
        return "inpainting", [_operator("deepred_pl.operators.Mask", mask=parsed.mask)]
    if parsed.angles is not None:
        return "tomography", [f"--data.operator.angles={json.dumps(_angles(parsed.angles))}"]
    if parsed.jpeg:
        return "jpeg", []
    return "denoising", []


def _operator(class_path: str, /, **arguments: Any) -> str:
    return "--data.operator=" + json.dumps({"class_path": class_path, "init_args": arguments})


def _blur(text: str) -> str:
    """The option of a blur by a kernel's name and numbers, or by its file."""
    kind, *numbers = text.split(":")
    arguments: dict[str, Any]
    if Path(text).suffix and not numbers:
        _check_file("--blur", text)
    try:
        if kind == "gaussian":
            (width,) = map(float, numbers)
            arguments = {"size": 2 * math.ceil(4 * width) + 1, "width": width}
        elif kind == "uniform":
            (size,) = map(int, numbers)
            arguments = {"size": size}
        elif kind == "unknown":
            (size,) = map(int, numbers)
            return _operator("deepred_pl.operators.UnknownBlur", size=size, simulated=None)
        elif kind == "motion":
            length, angle = map(float, numbers)
            arguments = {"length": length, "angle": angle}
        else:
            _check_file("--blur", text)
            kind, arguments = "from_file", {"path": text}
        if not all(math.isfinite(value) for value in arguments.values() if value != text):
            raise ValueError
    except (TypeError, OverflowError, ValueError) as error:
        raise ValueError(
            "expected a kernel's file as --blur, or gaussian:WIDTH, uniform:SIZE, "
            f"motion:LENGTH:ANGLE or unknown:SIZE, got {text}"
        ) from error
    return _operator(f"deepred_pl.operators.Blur.{kind}", boundary="unknown", **arguments)


def _angles(text: str) -> list[float]:
    """Angles in degrees."""
    try:
        if text.endswith(".npy"):
            return np.load(text).ravel().tolist()
        with suppress(ValueError):  # a long list is no valid path
            return [float(angle) for angle in text.split(",")]
        if Path(text).is_file():
            return [float(angle) for angle in Path(text).read_text().replace(",", " ").split()]
        start, stop, count = text.split(":")
        return np.linspace(float(start), float(stop), int(count), endpoint=False).tolist()
    except ValueError:
        raise ValueError(
            "expected --angles START:STOP:COUNT such as 0:180:60, a list such as 0,3,6, or a file, "
            f"got {text}"
        ) from None


def _check_file(name: str, path: str) -> None:
    """Raise ValueError if there is no such file, unless it is one for each image."""
    if not Path(path).is_file() and "{name}" not in path:
        raise ValueError(f"expected a file as {name}, found none: {path}")
