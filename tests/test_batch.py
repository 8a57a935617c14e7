"""`deepred-batch`, as a user calls it."""

import csv
import errno
import ipaddress
import os
import re
import signal
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import skimage.data
import tifffile
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deepred_pl.batch import workers
from deepred_pl.batch.main import main
from deepred_pl.batch.plan import find_images
from deepred_pl.cli import RestorationCLI
from deepred_pl.images import ImageFormat, read_image, write_image
from deepred_pl.lightning import LightningEnvironment, Trainer, rank_zero_only
from deepred_pl.restore import restore
from tests.faults import processes
from tests.helpers import picture, result_of, run_here

ROOT = Path(__file__).parents[1]
STEPS = 12
TINY = [
    *("--config", "denoising", "--config", "methods/quick"),
    *("--model.network.width", "4", "--model.network.scales=2", "--trainer.accelerator=cpu"),
    *(f"--trainer.max_steps={STEPS}", "--trainer.log_every_n_steps", "2"),
    *("--checkpoint.every_n_steps=4", "--red.every_n_steps=2"),
]
# Columns that are not numbers of the result.
OF_THE_MACHINE = {"seconds", "host"}


def save_crops(folder, count=8):
    """Noisy crops of photographs, 48 to 96 pixels, colour and grey, odd and not square."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    photos = [skimage.data.astronaut(), skimage.data.camera(), skimage.data.coffee()]
    sizes = [(48, 48), (49, 83), (96, 52), (61, 61), (48, 96), (77, 50), (64, 48), (51, 90)]
    for i, (height, width) in enumerate(sizes[:count]):
        crop = photos[i % 3][60 : 60 + height, 150 : 150 + width]
        noisy = (crop + noise.normal(0, 25, crop.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"crop{i}.png")
    return folder


@pytest.fixture
def crops(tmp_path):
    return save_crops(tmp_path / "crops", 3)


@pytest.fixture
def batch(tmp_path, monkeypatch, capsys):
    """Call `deepred-batch` within this process; give its status, and what it said."""
    monkeypatch.setattr(workers, "on_this_machine", run_here)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    # Where other processes take the cores, two threads wait for each other for long.
    monkeypatch.setattr(workers, "_cores", lambda: 1)

    def call(*args, settings=TINY, out="out"):
        own = [] if out is None else ["--out", str(tmp_path / out)]
        status = 0
        try:
            main([*settings, *own, *map(str, args)])
        except SystemExit as stop:
            status = stop.code
        said = "".join(capsys.readouterr())
        return (1, status) if isinstance(status, str) else (status, said)

    return call


@pytest.fixture
def refused(batch):
    """Call `deepred-batch` with a mistake; give the one line it says."""

    def call(*args, **kwargs):
        _, said = batch(*args, **kwargs)
        assert said.startswith("deepred-batch: error: ") and len(said.splitlines()) == 1
        return said

    return call


def rows(out):
    with open(out / "results.csv") as file:
        return list(csv.DictReader(file))


def numbers(out):
    return [{k: v for k, v in row.items() if k not in OF_THE_MACHINE} for row in rows(out)]


# On the machine


DEADLY = ["--red.denoiser=tests.faults.processes.Deadly", "--red.denoiser.marker"]


def test_two_workers_and_ray_give_the_same_rows(tmp_path, capfd, monkeypatch):
    """Though one of Ray's workers is killed; the cluster is on the loopback interface alone."""
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("RAY_worker_niceness", "0")  # with its 15 it waits for all that runs beside
    images = save_crops(tmp_path / "crops", 3)
    frame = np.asarray(Image.open(images / "crop0.png"))
    frames = np.stack([np.roll(frame, t, axis=1) for t in range(3)])
    tifffile.imwrite(images / "stack.tif", frames, photometric="rgb")
    marker = str(tmp_path / "{name} was killed")
    common = [*TINY, "--ground_truth", str(images), "--threads", "1", *DEADLY, marker]
    common += ["--chain", "2"]  # of the stack's pages
    for name in ("crop0", "crop2", "stack"):
        (tmp_path / f"{name} was killed").touch()
    addresses = set()

    def watched(*args):
        for outcome in on_ray(*args):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    listening = [c for c in process.net_connections() if c.status == "LISTEN"]
                    addresses.update(c.laddr.ip.removeprefix("::ffff:") for c in listening)
            yield outcome

    on_ray = workers.on_ray
    monkeypatch.setattr(workers, "on_ray", watched)
    main([*common, "--out", str(tmp_path / "ray"), "--ray", "local", "--workers", "2"])
    assert "127.0.0.1" in addresses and all(ipaddress.ip_address(a).is_loopback for a in addresses)
    assert (tmp_path / "crop1 was killed").exists()
    main([*common, "--out", str(tmp_path / "two"), "--workers", "2"])
    two, rays = numbers(tmp_path / "two"), numbers(tmp_path / "ray")
    assert two == rays and len(two) == 6
    assert {row["threads"] for row in two} == {"1"}
    assert all(float(row["psnr_restored"]) > 10 and int(row["steps"]) == STEPS for row in two)
    for row in two:
        suffix = "tif" if "page" in row["image"] else "png"
        inside = Path(row["directory"]) / f"restored.{suffix}"
        assert (tmp_path / "two" / inside).read_bytes() == (tmp_path / "ray" / inside).read_bytes()
    for name in ("two", "ray"):
        started_from = [
            yaml.safe_load((tmp_path / name / "stack" / page / "config.yaml").read_text())["model"]
            for page in ("page_0", "page_1", "page_2")
        ]
        before = [model["init_args"]["init_from"] for model in started_from]
        assert before == [None, str(tmp_path / name / "stack" / "page_0"), None]
    assert capfd.readouterr().err.count("6 of 6 restored") == 2


def test_a_batch_that_was_killed_goes_on(batch, tmp_path, monkeypatch):
    images, out = save_crops(tmp_path / "crops", 3), tmp_path / "out"
    # The last image begins when one of the others is done; its fourth round is behind a checkpoint.
    deadly = [*DEADLY, tmp_path / "{name}", "--red.denoiser.call=4", "--red.denoiser.group=true"]
    common = [*TINY, "--ground_truth", images, "--workers", 2, "--threads", 1, *deadly]
    for name in ("crop0", "crop1"):
        (tmp_path / name).touch()
    process = processes.start_batch([*common, "--out", out], tmp_path / "log")
    process.join()
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    done = {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")}
    saved = {path.parents[1] for path in out.glob("*/checkpoints/last.ckpt")}
    saved -= {path.parent for path in done}
    assert done and out / "crop2" in saved
    gone_on_from = []
    fit = Trainer.fit

    def spy(trainer, *args, ckpt_path=None, **kwargs):
        gone_on_from.append(ckpt_path)
        fit(trainer, *args, ckpt_path=ckpt_path, **kwargs)

    monkeypatch.setattr(Trainer, "fit", spy)
    assert batch(*common, settings=[])[0] == 0
    assert len(gone_on_from) == 3 - len(done)
    assert batch(*common, settings=[], out="undisturbed")[0] == 0
    assert numbers(out) == numbers(tmp_path / "undisturbed")
    for path, written in done.items():
        assert path.stat().st_mtime_ns == written  # not made again
    for run in saved:
        assert str(run / "checkpoints" / "last.ckpt") in gone_on_from
        images = [folder / run.name / "restored.png" for folder in (out, tmp_path / "undisturbed")]
        assert images[0].read_bytes() == images[1].read_bytes()


def test_a_batch_that_is_told_to_stop_saves_its_fits(tmp_path):
    images, out, log = save_crops(tmp_path / "crops", 2), tmp_path / "out", tmp_path / "log"
    settings = [*TINY, "--trainer.max_steps=100000", "--checkpoint.every_n_steps=50000"]
    options = ["--images", images, "--workers", 2, "--threads", 1, "--out", out]
    process, deadline = processes.start_batch([*settings, *options], log), time.monotonic() + 120
    try:
        while len(list(out.glob("*/progress.json"))) < 2:  # both are fitted
            process.join(0.02)
            assert process.exitcode is None and time.monotonic() < deadline, log.read_text()
        process.terminate()
        process.join()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.exitcode == 128 + signal.SIGTERM
    assert "stopped; repeat the command to resume" in log.read_text()
    for i in range(2):
        saved = torch.load(out / f"crop{i}/checkpoints/last.ckpt", weights_only=True)
        assert 0 < saved["global_step"] < 50000  # none was due yet


@pytest.mark.parametrize("name", ["sample:../../outside", "sample:.."])
def test_names_stay_inside_the_output(tmp_path, name):
    with pytest.raises(SystemExit, match="names valid for a directory"):
        main([*TINY, "--ground_truth", name, "--out", str(tmp_path / "out" / "a" / "b")])
    assert not (tmp_path / "out" / "outside").exists()


def test_a_killed_worker_takes_nothing_with_it(tmp_path, capfd, monkeypatch):
    images = save_crops(tmp_path / "crops", 3)
    (images / "crop2.png").rename(images / "always.png")
    (tmp_path / "crop1").touch()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(workers, "get_context", lambda method: processes.context)
    deadly = [*DEADLY, str(tmp_path / "{name}")]
    with pytest.raises(SystemExit) as stop:
        main([*TINY, *deadly, "--images", str(images), "--out", str(tmp_path / "out")])
    assert stop.value.code == 1
    errors = {row["image"]: row["error"] for row in rows(tmp_path / "out")}
    assert errors["crop0"] == errors["crop1"] == ""  # killed once, and never
    assert "its process was killed repeatedly" in errors["always"]
    assert (tmp_path / "crop0").exists()
    assert "2 of 3 restored" in capfd.readouterr().err


# What a batch leaves


def test_each_image_has_a_run_directory_and_a_row(batch, crops, tmp_path):
    assert batch("--images", crops)[0] == 0
    assert [row["image"] for row in rows(tmp_path / "out")] == ["crop0", "crop1", "crop2"]
    for row in rows(tmp_path / "out"):
        run = tmp_path / "out" / row["image"]
        names = {path.name for path in run.iterdir()}
        assert {"config.yaml", "restored.png", "comparison.png", "result.json"} <= names
        assert (run / "checkpoints" / "last.ckpt").is_file() and "progress.json" not in names
        assert row["steps"] == str(STEPS) and row["psnr_restored"] == ""
        assert row["torch"] == torch.__version__ and row["seed"] == "0"
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "Images: 3." in summary and "| crop1 | 25.00 | 12 |" in summary


def test_a_job_is_the_fit_that_its_configuration_says(batch, crops, tmp_path):
    batch("--images", crops / "crop0.png", "--threads", 1)
    run = tmp_path / "out" / "crop0"
    array = np.asarray(Image.open(crops / "crop0.png"))
    overrides = {option[2:].split("=")[0]: option.split("=")[1] for option in TINY if "=" in option}
    overrides |= {"model.network.width": 4, "trainer.log_every_n_steps": 2}
    expected = restore(array, ["denoising", "methods/quick"], overrides)
    np.testing.assert_array_equal(np.asarray(Image.open(run / "restored.png")), expected)


def test_methods_are_compared_on_the_same_data(batch, crops, tmp_path):
    names = ["dip", str(ROOT / "configs" / "methods" / "deepred_tv.yaml")]
    methods = [word for name in names for word in ("--method", name)]
    assert batch("--ground_truth", crops / "crop0.png", "sample:coffee", *methods)[0] == 0
    found = rows(tmp_path / "out")
    assert [r["method"] for r in found] == ["dip", "deepred_tv"] * 2
    assert len({row["psnr_measurement"] for row in found[:2]}) == 1
    assert len({row["psnr_restored"] for row in found[:2]}) == 2
    run = tmp_path / "out" / "coffee" / "dip"
    assert "DeepImagePrior" in (run / "config.yaml").read_text()
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "| image | measurement | dip | deepred_tv |" in summary
    gains = [
        float(found[i + 1]["psnr_restored"]) - float(found[i]["psnr_restored"]) for i in (0, 2)
    ]
    mean, sd = np.mean(gains), np.std(gains, ddof=1)
    assert f"- deepred_tv: {mean:+.2f} ± {sd:.2f} dB, better on" in summary


def test_restarts_are_averaged(batch, crops, tmp_path):
    truth = crops / "crop1.png"
    assert batch("--ground_truth", truth, "--restarts", 3, "--model.seed", 5)[0] == 0
    out = tmp_path / "out" / "crop1"
    runs = [out / f"restart_{i}" for i in range(3)]
    assert [result_of(run)["seed"] for run in runs] == [5, 6, 7]
    assert len({result_of(run)["psnr"]["measurement"] for run in runs}) == 1
    images = np.stack([read_image(run / "restored.tif")[0][0].numpy() for run in runs])
    mean, std = images.mean(0), images.std(0, ddof=1)  # (C, H, W)
    stored = np.asarray(Image.open(out / "restored.png"), float)
    assert np.abs(stored - 255 * mean[0]).max() <= 0.5 + 1e-3
    np.testing.assert_allclose(np.load(out / "uncertainty.npy"), np.moveaxis(std, 0, -1), atol=1e-6)
    shown = np.asarray(Image.open(out / "uncertainty.png"), float)
    assert shown.max() == 255
    expected = -10 * np.log10(np.mean((mean[0] - np.asarray(Image.open(truth)) / 255.0) ** 2))
    assert result_of(out)["psnr"]["restored"] == pytest.approx(expected, abs=1e-3)
    table = rows(tmp_path / "out")
    assert [row["restart"] for row in table] == ["0", "1", "2", "mean"]
    single = [float(row["psnr_restored"]) for row in table[:3]]
    said = f"{np.mean(single):.2f} ± {np.std(single, ddof=1):.2f} (their mean image"
    assert said in (tmp_path / "out" / "summary.md").read_text()


@pytest.mark.parametrize("restarts", [1, 2])
def test_tiles_are_blended(batch, crops, tmp_path, restarts):
    args = ["--ground_truth", crops / "crop2.png", "--tile", 60, "--overlap", 10]
    assert batch(*args, "--restarts", restarts)[0] == 0
    out = tmp_path / "out" / "crop2"
    first = out if restarts == 1 else out / "restart_0"
    tiles = sorted(first.glob("tile_*"))
    assert [tile.name for tile in tiles] == ["tile_0_0", "tile_36_0"]  # 96×52 pixels
    for tile in tiles:
        image, image_format = read_image(tile / "restored.tif")
        assert image.shape[-2:] == (60, 52) and image_format.dtype == "float32"
        assert result_of(tile)["noise_sigma"] == pytest.approx(25)
        whole, _ = read_image(first / ("restored.png" if restarts == 1 else "restored.tif"))
        alone = slice(0, 36) if tile.name == "tile_0_0" else slice(24, 60)  # not shared
        top = int(tile.name.split("_")[1])
        difference = image[..., alone, :] - whole[..., top + alone.start : top + alone.stop, :]
        assert difference.abs().max() <= 0.5 / 255 + 1e-6
    assert Image.open(out / "restored.png").size == (52, 96)
    assert result_of(out)["steps"] == 2 * STEPS * restarts
    assert len(rows(tmp_path / "out")) == (1 if restarts == 1 else 3)


@pytest.mark.parametrize("task", ["super_resolution", "inpainting", "deblurring_gaussian"])
def test_other_tasks_are_tiled(batch, tmp_path, crops, task):
    settings = ["--config", task, *TINY[2:]]
    more = ["--data.operator.boundary=reflect"] if task == "deblurring_gaussian" else []
    args = ["--ground_truth", crops / "crop2.png", "--tile", 60, *more]
    assert batch(*args, settings=settings)[0] == 0
    assert Image.open(tmp_path / "out" / "crop2" / "restored.png").size == (52, 96)


def test_restore_takes_tiles(tmp_path, crops):
    array = np.asarray(Image.open(crops / "crop2.png"))
    overrides = {"trainer.max_steps": 4, "model.network.width": 4, "model.network.scales": 2}
    overrides |= {"trainer.enable_progress_bar": False, "trainer.accelerator": "cpu"}
    task = ["denoising", "methods/quick"]
    at_once = restore(array, task, overrides)
    assert np.array_equal(restore(array, task, overrides, tile=96), at_once)
    tiled = restore(array, task, overrides, tile=60, overlap=10)
    assert tiled.shape == array.shape and tiled.dtype == array.dtype
    assert not np.array_equal(tiled, at_once)
    assert np.abs(tiled.astype(float) - array).mean() < 25
    with pytest.raises(ValueError, match=r"overlap .* less than the tile's 40"):
        restore(array, task, overrides, tile=40, overlap=40)


def test_tensorboard_has_the_curves_and_the_hyperparameters(batch, crops, tmp_path):
    assert batch("--ground_truth", crops / "crop0.png")[0] == 0
    run = tmp_path / "out" / "crop0"
    events = EventAccumulator(str(run)).Reload()
    tags = events.Tags()["scalars"]
    assert {"curves/psnr_average", "final/psnr", "final/seconds"} <= set(tags)
    final = events.Scalars("final/psnr")[-1].value
    assert final == pytest.approx(result_of(run)["psnr"]["restored"], abs=1e-4)
    hparams = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert all(
        word in hparams for word in (b"NonLocalMeans", b"crop0", b"input_noise_std", b"DeepRED")
    )


# Going on


def test_a_second_call_makes_what_is_missing(batch, crops, tmp_path):
    batch("--images", crops / "crop0.png", crops / "crop1.png")
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*/restored.png")}
    before = rows(tmp_path / "out")
    status, said = batch("--images", crops)
    assert status == 0 and "3 of 3: crop2" in said and "crop1: 12 steps" not in said
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in written.items())
    assert rows(tmp_path / "out")[:2] == before


@pytest.mark.parametrize("method", [(), ("--method", "dip")])
def test_a_changed_setting_is_refused_unless_it_may_overwrite(
    batch, refused, crops, tmp_path, method
):
    args = ["--images", crops / "crop0.png", *method]
    batch(*args)
    run = tmp_path / "out" / "crop0" / ("dip" if method else "")
    first = (run / "result.json").read_bytes()
    said = refused(*args, "--model.input_scale=0.5")
    assert "model.input_scale was 1.0, and is now 0.5" in said and "--overwrite" in said
    assert (run / "result.json").read_bytes() == first
    assert batch(*args, "--model.input_scale=0.5", "--overwrite")[0] == 0
    assert "input_scale: 0.5" in (run / "config.yaml").read_text()
    assert batch(*args, "--model.input_scale=0.5")[0] == 0


def test_a_changed_image_is_refused_and_one_that_becomes_the_truth(batch, refused, crops):
    batch("--images", crops / "crop0.png")
    assert "role was data.measurement" in refused("--ground_truth", crops / "crop0.png")
    write_image(crops / "crop0.png", picture(3, 48, 48))
    assert "sha256 was" in refused("--images", crops / "crop0.png")


def test_tiles_or_restarts_that_were_begun_are_not_forgotten(batch, refused, crops, monkeypatch):
    def killed(*args):
        yield next(run_here(*args))
        raise KeyboardInterrupt

    args = ["--images", crops / "crop0.png"]
    monkeypatch.setattr(workers, "on_this_machine", killed)
    assert "stopped; repeat the command" in batch(*args, "--restarts", 2)[1]
    monkeypatch.setattr(workers, "on_this_machine", run_here)
    assert "restart was mean, and is now None" in refused(*args)
    assert batch(*args, "--restarts", 2)[0] == 0


def test_shards_are_merged_by_a_last_call(batch, crops, tmp_path):
    (crops / "crop2.png").unlink()
    for i in (2, 1):
        status, said = batch("--images", crops, "--restarts", 2, "--shard", f"{i}/2")
        assert status == 0 and f"part {i} of 2: 2 of 2 fits done" in said
    assert not (tmp_path / "out" / "results.csv").exists()
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("restart_*/result.json")}
    assert len(made) == 4
    assert batch("--images", crops, "--restarts", 2)[0] == 0
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in made.items())
    assert len(rows(tmp_path / "out")) == 6


def test_an_allocation_of_slurm_is_not_the_fits(batch, crops, tmp_path, monkeypatch):
    for name, value in {"NTASKS": "4", "JOB_ID": "7", "JOB_NAME": "b", "PROCID": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(rank_zero_only, "rank", 2)  # as it is where Lightning was imported
    monkeypatch.setenv("SLURM_LOCALID", "0")
    monkeypatch.setenv("SLURM_NODEID", "0")
    seen = []
    real = RestorationCLI.before_fit

    def spy(cli):
        seen.append(cli.trainer._accelerator_connector.cluster_environment)
        real(cli)

    monkeypatch.setattr(RestorationCLI, "before_fit", spy)
    assert batch("--images", crops / "crop0.png")[0] == 0
    assert isinstance(seen[0], LightningEnvironment)
    run = tmp_path / "out" / "crop0"
    assert (run / "restored.png").exists() and list(run.glob("events*"))


def test_files_of_all_kinds_come_back_in_theirs(batch, tmp_path):
    folder = tmp_path / "kinds"
    folder.mkdir()
    colour = (picture(3, 48, 64)[0].movedim(0, -1) * 255).byte().numpy()
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90°
    Image.fromarray(colour).save(folder / "phone.jpg", exif=exif)
    grey = (picture(1, 49, 53) * 65535)[0, 0].numpy().astype(np.uint16)
    tifffile.imwrite(folder / "grey16.tif", grey)
    alpha = np.full((48, 64, 1), 255, np.uint8)
    alpha[:9] = 0
    Image.fromarray(np.concatenate([colour, alpha], -1)).save(folder / "alpha.png")
    (folder / "text.png").write_text("hello")
    status, _ = batch("--images", folder, "--data.noise.sigma=10")
    assert status == 1
    out = tmp_path / "out"
    assert [row["image"] for row in rows(out) if row["error"]] == ["text"]
    assert Image.open(out / "phone" / "restored.png").size == (48, 64)  # width, height: upright
    assert tifffile.imread(out / "grey16" / "restored.tif").dtype == np.uint16
    restored = np.asarray(Image.open(out / "alpha" / "restored.png"))
    np.testing.assert_array_equal(restored[..., 3:], alpha)


# Bad input


def test_one_bad_image_fails_alone(batch, crops, tmp_path):
    (crops / "text.png").write_text("not a picture")
    (crops / "notes.txt").write_text("not of the batch")
    write_image(crops / "tiny.png", picture(3, 4, 4))
    status, said = batch("--images", crops)
    assert status == 1
    errors = {row["image"]: row["error"] for row in rows(tmp_path / "out")}
    assert [name for name, error in errors.items() if error] == ["text", "tiny"]
    assert "cannot read" in errors["text"]
    assert "needs images of at least 5×5 pixels, got 4×4" in errors["tiny"]
    assert "3 of 5 restored" in said and "cannot read" in said
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "## Not restored" in summary and "- text: expected a PNG" in summary
    log = (tmp_path / "out" / "text" / "run.log").read_text()
    assert "Traceback" in log and "cannot read" in log


def test_a_bad_image_may_be_replaced_by_a_good_one(batch, crops):
    good = (crops / "crop1.png").read_bytes()
    (crops / "crop1.png").write_text("not a picture")
    assert batch("--images", crops / "crop1.png")[0] == 1
    (crops / "crop1.png").write_bytes(good)
    assert batch("--images", crops / "crop1.png")[0] == 0


def test_a_full_disk_fails_its_image_alone(batch, crops, tmp_path, monkeypatch):
    import deepred_pl.callbacks.writer as writer

    def full(path, image, *args):
        if "crop1" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_image(path, image, *args)

    monkeypatch.setattr(writer, "write_image", full)
    (crops / "crop0.png").unlink()
    assert batch("--images", crops)[0] == 1
    errors = [row["error"] for row in rows(tmp_path / "out")]
    assert "No space left" in errors[0] and errors[1] == ""
    monkeypatch.undo()
    monkeypatch.setattr(workers, "on_this_machine", run_here)
    assert batch("--images", crops)[0] == 0


def test_a_name_in_a_setting_is_the_images(batch, crops, tmp_path):
    masked = []  # PSNR of what each mask leaves
    for i in range(2):
        image, _ = read_image(crops / f"crop{i}.png")
        known = torch.rand(image[:, :1].shape, generator=torch.Generator().manual_seed(i)) > 0.5
        write_image(tmp_path / f"mask_crop{i}.png", known.float(), ImageFormat())
        masked.append(-10 * (image * ~known).square().mean().log10().item())
    settings = ["--config", "inpainting", *TINY[2:]]
    mask = ["--data.operator.mask", tmp_path / "mask_{name}.png"]
    truth = ["--data.ground_truth", crops / "{name}.png"]
    images = [crops / "crop0.png", crops / "crop1.png"]
    assert batch("--images", *images, *mask, *truth, settings=settings)[0] == 0
    for row, psnr in zip(rows(tmp_path / "out"), masked, strict=True):
        assert float(row["psnr_measurement"]) == pytest.approx(psnr, abs=0.01)
        assert float(row["psnr_restored"]) > psnr + 10
    status, _ = batch("--images", crops, *mask, *truth, settings=settings)  # one has no mask
    assert status == 1 and "mask_crop2.png" in rows(tmp_path / "out")[2]["error"]


@pytest.mark.parametrize(
    "args, said",
    [
        (("--images", "empty"), "found nothing: empty"),
        (("--images", "nowhere/*.png"), "found nothing: nowhere"),
        (("--images", "crops", "other/crop0.tif"), "different names.*crop0.png and .*crop0.tif"),
        (("--images", "crops", "--ground_truth", "crops"), "--ground_truth cannot be combined"),
        (
            (),
            "one of the arguments --images --ground_truth is required; see `deepred-batch --help`",
        ),
        (("--images", "crops", "--model.lam=0"), "lam .* must be > 0 .*got 0"),
        (("--images", "crops", "--model.lamb=1"), "lamb"),
        (("--images", "crops", "--config", "nothing"), "shipped configuration, found no nothing"),
        (("--images", "crops", "--method", "nothing"), "found no methods/nothing"),
        (("--images", "crops", "--method", "dip", "--method", "dip"), "different names, got dip"),
        (
            ("--images", "crops", "--shard", "3/2"),
            "--shard I/N with 1 <= I <= N, such as 3/8, got 3/2",
        ),
        (("--images", "crops", "--shard", "0/2"), "--shard I/N"),
        (("--images", "crops", "--tile", "32", "--overlap", "32"), "less than --tile 32, got 32"),
        (("--images", "crops", "--tile", "4", "--overlap", "1"), "tiles of at least 5 pixels"),
        (("--images", "crops", "--data.measurement=a.png"), "is set by this command; use --images"),
        (("--images", "crops", "--trainer.default_root_dir", "a"), "use --out"),
        (("--images", "crops", "--data.noise.sigma"), "expected a value after --data.noise.sigma"),
        (("--images", "crops", "--gpus", "0.5"), "--gpus requires --ray"),
        (("--images", "crops", "--overlap", "8"), "--overlap applies to tiles"),
        (("--images", "crops", "--shard", "1/2", "--overwrite"), "use it without --shard"),
        (("--images", "crops", "--workers", "0"), "whole number of at least 1, got 0"),
        (("--images", "crops", "--worker", "2"), "unrecognized arguments: --worker"),
        (("--images", "crops", "--trainer.devices=2"), "is set by this command"),
        (
            ("--images", "crops", "--config", "truth.yaml"),
            "data.ground_truth=a.png, but each image",
        ),
        (
            ("--images", "crops", "--ray", "nowhere:1"),
            "no Ray cluster answers at nowhere:1 .no one",
        ),
        (("--images", "crops", "--ray", "auto", "--workers", "2"), "--workers is for this machine"),
        (("crops/crop0.png", "--images", "crops"), "unrecognized arguments: crops/crop0.png"),
    ],
)
def test_a_mistake_is_told_before_anything_is_begun(refused, crops, monkeypatch, args, said):
    monkeypatch.chdir(crops.parent)

    def no_one(*args, **kwargs):
        raise ConnectionError("no one is there")

    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=no_one))
    (crops.parent / "truth.yaml").write_text("data:\n  ground_truth: a.png\n")
    (crops.parent / "empty").mkdir()
    (crops.parent / "other").mkdir()
    (crops.parent / "other" / "crop0.tif").write_bytes(b"")
    assert re.search(said, refused(*args))
    assert not (crops.parent / "out").exists() or "--ray" in args


@pytest.mark.parametrize("task, said", [("tomography", "Radon"), ("quickstart", "circular")])
def test_what_cannot_be_cut_is_refused(refused, crops, task, said):
    settings = ["--config", task, *TINY[2:]]
    assert said in refused("--ground_truth", crops, "--tile", 40, "--overlap", 8, settings=settings)


def test_a_directory_that_cannot_be_written_is_refused(refused, crops, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "choose another with --out" in refused("--images", crops, out="file/out")


def test_ray_that_is_missing_names_the_extra(refused, crops, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    assert "pip install -c constraints.txt '.[ray]'" in refused("--images", crops, "--ray", "local")


def test_what_no_node_of_the_cluster_has_is_refused(refused, crops, monkeypatch):
    node = {"Alive": True, "Resources": {"CPU": 2.0}}
    cluster = SimpleNamespace(
        init=lambda *args, **kwargs: None,
        nodes=lambda: [node],
        cluster_resources=lambda: node["Resources"],
        shutdown=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "ray", cluster)
    for wish in (["--threads", "3"], ["--gpus", "0.5"]):
        said = refused("--images", crops, "--ray", "local", *wish)
        assert "which no node of the Ray cluster has" in said


def test_folders_and_patterns_are_sorted_and_hidden_files_left_out(crops, monkeypatch):
    (crops / ".hidden.png").write_bytes(b"")
    (crops / "photo.JPG").write_bytes(b"")
    (crops / "photo.restored.png").write_bytes(b"")
    (crops / "inner.png").mkdir()
    names = ["crop0", "crop1", "crop2", "photo"]
    assert [source.name for source in find_images([str(crops)])] == names
    monkeypatch.chdir(crops)
    assert [source.name for source in find_images(["crop[12].png"])] == names[1:3]
    assert find_images(["sample:coffee", "crop0.png"])[0].path == "sample:coffee"
    assert len(find_images(["crop0.png", str(crops), "crop*.png"])) == 4  # each once


# What is said about the images


def test_a_folders_other_files_are_listed_by_kind(batch, tmp_path):
    folder = save_crops(tmp_path / "crops", 1)
    for name in ("a.heic", "b.HEIC", "m31.fits", "notes", ".hidden.heic"):
        (folder / name).touch()
    status, said = batch("--images", folder)
    assert status == 0
    assert "Skipped files of other types: 1 .fits, 2 .heic, 1 without suffix" in said


def test_an_image_too_small_for_the_network_fails_once_and_alone(batch, tmp_path):
    folder = save_crops(tmp_path / "crops", 1)
    Image.open(folder / "crop0.png").crop((0, 0, 20, 40)).save(folder / "small.png")
    settings = [*TINY, "--model.network.scales=5", "--data.noise.sigma=25"]
    status, said = batch("--images", folder, "--tile", 40, settings=settings)
    assert status == 1 and said.count("at least 33×33 pixels, got 40×20") == 1
    assert "1 of 2 restored" in said


def test_a_folder_of_other_files_names_them(refused, tmp_path):
    (tmp_path / "m31.fits").touch()
    assert "found only 1 .fits; convert them to TIFF" in refused("--images", tmp_path)


def test_warnings_of_the_fits_are_printed_once_for_each_image(batch, tmp_path):
    folder = save_crops(tmp_path / "crops", 5)
    images = ["--images", folder / "crop0.png", folder / "crop4.png"]  # one tile, and two
    status, said = batch(*images, "--tile", 64, "--data.noise.sigma=50")
    assert status == 0
    for i in (0, 4):
        assert said.count(f"crop{i}: The noise is stated as GaussianNoise(sigma=50.00)") == 1
    assert said.count("stated as") == 2


def test_the_number_of_threads_is_omps(batch, crops, monkeypatch):
    monkeypatch.setattr(workers, "_cores", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert "1 in parallel, 1 CPU thread each" in batch("--images", crops / "crop0.png")[1]


@pytest.mark.parametrize("before", [None, "2,5"])
def test_a_process_is_started_with_one_gpu_visible(monkeypatch, before):
    name = "CUDA_VISIBLE_DEVICES"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    with workers._visible(None):
        assert os.environ.get(name) == before
    with workers._visible("5"):
        started = workers.get_context("spawn").Pool(1)
    assert os.environ.get(name) == before
    with started:
        assert started.apply(os.getenv, (name,)) == "5"
