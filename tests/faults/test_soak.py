"""Many fits in one process take no more memory and threads than the first ones."""

import gc
import threading
from contextlib import suppress

import psutil
import pytest
import torch

from deepred_pl.cli import main
from deepred_pl.images import write_image
from tests.faults import processes
from tests.helpers import picture

STEPS = 10


def fit_many(connection, folder, fits):
    """Make so many fits by the command line; tell memory and threads after each."""
    torch.set_num_threads(1)
    process = psutil.Process()
    for i in range(fits):
        with suppress(SystemExit):
            main(
                [
                    *("fit", "--config", "denoising", "--config", "methods/quick"),
                    *("--model.network.init_args.width", "8", "--trainer.max_steps", str(STEPS)),
                    *("--data.ground_truth", str(folder / "truth.png"), "--trainer.accelerator"),
                    *("cpu", "--trainer.default_root_dir", str(folder / f"run_{i}")),
                    *("--trainer.enable_progress_bar", "false"),
                ]
            )
        gc.collect()
        done = (folder / f"run_{i}" / "lightning_logs/version_0/result.json").exists()
        python, native = threading.active_count(), process.num_threads()
        connection.send(("fit", (done, process.memory_info().rss, python, native)))


@pytest.mark.parametrize("channels", [3])
def test_memory_and_threads_stay_what_they_were(tmp_path, long, record_property, channels):
    write_image(tmp_path / "truth.png", picture(channels, 65, 47))
    fits = 200 if long else 5
    *messages, end = processes.told_by(fit_many, tmp_path, fits, seconds=60)
    told = [message for _, message in messages]
    assert end == ("ended", 0)
    assert len(told) == fits and all(done for done, *_ in told)
    megabytes = [memory / 2**20 for _, memory, *_ in told]
    looks = [i for i in (1, 5, 50, 100, 200) if i <= fits]
    record_property(
        "figures",
        f"soak: {fits} tried, {sum(done for done, *_ in told)} survived; "
        + ", ".join(f"fit {i}: {megabytes[i - 1]:.0f} MB, {told[i - 1][3]} threads" for i in looks),
    )
    settled = told[fits // 4]
    assert told[-1][2:] == settled[2:]
    assert megabytes[-1] < 1.05 * megabytes[fits // 4]
