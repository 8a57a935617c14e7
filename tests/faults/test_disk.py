"""A disk that fills up, or is taken away, costs what does not fit on it and not the fit."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image

from deepred_pl.denoisers import TotalVariation
from deepred_pl.images import write_image
from tests.faults import processes
from tests.faults.test_killed import pixels
from tests.helpers import RUN, picture

ROUND = 5  # θ-steps


class Spoiling(TotalVariation):
    """A denoiser that spoils the disk `directory` at one of its calls."""

    def __init__(self, directory: str, how: str, at: int, stopping: bool = False):
        super().__init__(0.02)
        self.directory, self.how, self.at, self.stopping = directory, how, at, stopping
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        if self.calls == self.at:
            SPOIL[self.how](self.directory)
            if self.stopping:
                os.kill(os.getpid(), signal.SIGTERM)
        return super().__call__(x)


def fill(directory):
    """Fill the disk, also what is freed by a checkpoint that was being written beside it."""
    written, writing = 1, True
    while written or writing:
        writing, written = any(Path(directory).rglob(".*")), 0
        with suppress(OSError), open(Path(directory) / "filling", "ab", buffering=0) as file:
            while True:
                written += file.write(bytes(512))


def empty(directory):
    (Path(directory) / "filling").unlink()


def remount(directory, how):
    command = ["mount", "-o", f"remount,{how}", str(directory)]
    for _ in range(1000):  # it is refused while a file is being written
        if subprocess.run(command, capture_output=True).returncode == 0:
            return
        time.sleep(0.01)
    raise RuntimeError(f"{command} is refused")


SPOIL = {"full": fill, "read-only": lambda directory: remount(directory, "ro")}
MEND = {"full": empty, "read-only": lambda directory: remount(directory, "rw")}
REASON = {how: os.strerror(number) for how, number in
          {"full": errno.ENOSPC, "read-only": errno.EROFS}.items()}  # fmt: skip


@pytest.fixture
def disk(tmp_path):
    """A disk of 8 MB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(directory)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


@pytest.fixture
def fit(tmp_path, disk):
    write_image(tmp_path / "truth.png", picture(3, 37, 45))

    def run(how, at, stopping=False, logger=False, ckpt_path=None):
        """Exit status and output of a fit on the disk."""
        settings = {"directory": str(disk), "how": how, "at": at, "stopping": stopping}
        denoiser = {"class_path": f"{__name__}.Spoiling", "init_args": settings}
        options = [
            *("fit", "--config", "quickstart", "--trainer.max_steps", "60"),
            *("--model.network.init_args.width", "4", "--model.network.init_args.scales", "3"),
            *("--data.ground_truth", str(tmp_path / "truth.png"), "--trainer.accelerator", "cpu"),
            *("--checkpoint.every_n_steps", "7", "--trainer.log_every_n_steps", "3"),
            *("--red.denoiser", json.dumps(denoiser), "--red.every_n_steps", str(ROUND)),
            *("--trainer.default_root_dir", str(disk)),
            *([] if logger else ["--trainer.logger", "false"]),
            *([] if ckpt_path is None else ["--ckpt_path", str(ckpt_path)]),
        ]
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        status, _ = processes.run(options, log)
        return status, log.read_text()

    return run


@pytest.mark.parametrize("how", SPOIL)
def test_a_spoiled_disk_ends_a_fit_that_resumes_to_the_same_picture(fit, disk, how):
    status, output = fit(how, at=3, logger=True)
    assert status == 1, output
    *_, resuming, last = output.strip().splitlines()
    last_saved = disk / RUN / "checkpoints" / "last.ckpt"
    assert resuming.endswith(f"--ckpt_path {last_saved}")
    assert last.startswith("deepred: error: ") and REASON[how] in last
    assert "Traceback" not in output, output
    assert not (disk / RUN / "result.json").exists()
    assert torch.load(last_saved, weights_only=True)["global_step"] < 60
    MEND[how](disk)
    status, output = fit(how, at=10**6, ckpt_path=last_saved)
    assert status == 0, output
    shutil.rmtree(disk / RUN)
    assert fit(how, at=10**6, logger=True)[0] == 0
    first, resumed = sorted((disk / RUN).parent.iterdir())
    assert pixels(first) == pixels(resumed)


@pytest.mark.parametrize("how", SPOIL)
def test_a_fit_whose_disk_is_spoiled_at_its_end_leaves_its_picture_elsewhere(fit, disk, how):
    status, output = fit(how, at=10)
    assert status == 1, output
    *_, last = output.strip().splitlines()
    assert last.startswith(f"deepred: error: expected to write {disk / RUN / 'restored.png'}")
    assert REASON[how] in last
    assert (
        f"cannot save {disk / RUN / 'checkpoints/last.ckpt'} ({REASON[how]}); the previous"
        in output
    )
    assert "Traceback" not in output, output
    elsewhere = Path(re.search(r"the restored image is at (\S+)", last)[1])
    assert Image.open(elsewhere).size == (45, 37)
    shutil.rmtree(elsewhere.parent)
    MEND[how](disk)
    assert not (disk / RUN / "result.json").exists()
    assert not list(disk.rglob(".*")), "temporary files stay"
    last_saved = torch.load(disk / RUN / "checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert last_saved < 60  # so that it can be resumed, and written


def test_a_fit_stopped_on_a_full_disk_says_where_its_picture_is(fit, disk):
    status, output = fit("full", at=3, stopping=True)
    assert status == 128 + signal.SIGTERM, output
    found = re.search(r"Stopped at step \d+; the image so far: .* is at (\S+)", output)
    assert Image.open(found[1]).size == (45, 37), output
    shutil.rmtree(Path(found[1]).parent)


def test_a_disk_that_is_full_from_the_start_is_reported_in_one_line(fit, disk):
    fill(disk)
    status, output = fit("full", at=10**6)
    assert status == 1
    reading, line = output.strip().splitlines()[2:]  # after Lightning's two on the devices
    assert " pixels, " in reading
    assert line.startswith("deepred: error: expected to write the run directory"), output
    assert "No space left on device; choose another with --trainer.default_root_dir" in line
