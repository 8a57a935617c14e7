"""A fit that is killed or told to stop, at whatever moment, ends with the same picture."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from PIL import Image

from deepred_pl import DeepRED, REDUpdate
from deepred_pl.callbacks import LastCheckpoint
from deepred_pl.callbacks.checkpoint import Stopped
from deepred_pl.cli import RestorationCLI, main
from deepred_pl.denoisers import TotalVariation
from deepred_pl.images import write_image
from deepred_pl.lightning import NAME, Callback, LightningEnvironment, loggers
from tests.faults import processes
from tests.faults.processes import CHECKPOINT, RESULTS, ROUND, STEP
from tests.helpers import RUN, TinyNet, noisy_problem, picture, result_of, smooth
from tests.test_resume import assert_same_checkpoint

STEPS = 30


def options_in(root):
    """The settings of a small fit, into a folder under `root`."""
    write_image(root / "truth.png", picture(3, 37, 45))

    def into(folder, steps=STEPS):
        return [
            *("fit", "--config", "quickstart", "--trainer.max_steps", str(steps)),
            *("--model.network.init_args.width", "4", "--model.network.init_args.scales", "3"),
            *("--data.ground_truth", str(root / "truth.png"), "--red.every_n_steps", "4"),
            *("--checkpoint.every_n_steps", "7", "--trainer.accelerator", "cpu"),
            *("--red.denoiser", "TotalVariation"),
            *("--trainer.default_root_dir", str(root / folder)),
        ]

    return into


@pytest.fixture
def options(tmp_path):
    return options_in(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed fit of these settings: its pixels, and its moments."""
    root = tmp_path_factory.mktemp("whole")
    status, moments = processes.run(options_in(root)("whole"), root / "log")
    assert status == 0, (root / "log").read_text()
    return pixels(root / "whole" / RUN), moments


def pixels(directory):
    return Image.open(directory / "restored.png").tobytes()


def assert_nothing_is_half_written(directory):
    for name in ("restored.png", "comparison.png"):
        if (directory / name).exists():
            Image.open(directory / name).load()
    if (directory / "result.json").exists():
        result_of(directory)
        assert (directory / "restored.png").exists()
    if (directory / "checkpoints" / "last.ckpt").exists():
        torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_fit_killed_at_random_moments_ends_with_the_same_pixels(
    options, whole, tmp_path, chance, seed, long, record_property
):
    expected, moments = whole
    tries, survived = 20 if long else 4, 0
    for i in range(tries):
        name = (STEP, ROUND, CHECKPOINT, RESULTS)[i % 4]
        known = [(begin, end) for n, begin, end in moments if n == name]
        number = chance.randint(1, len(known))
        begin, end = known[number - 1]
        delay = chance.uniform(0, end - begin)
        status = 0
        while status == 0:  # this time, it had ended before
            cut = tmp_path / f"cut_{i}_{delay}"
            status = processes.kill_at(options(cut), tmp_path / "log", name, number, delay)
            where = f"try {i}, seed {seed}: {delay:.4f} s into {name} {number}"
            delay /= 2
        assert status == -signal.SIGKILL, where
        run = cut / RUN
        assert_nothing_is_half_written(run)
        if not (run / "result.json").exists():  # else it is complete
            last = run / "checkpoints" / "last.ckpt"
            main(go_on(run) if last.exists() else options(cut))
            run = cut / "lightning_logs" / "version_1"
        assert pixels(run) == expected, where
        survived += 1
    record_property("figures", f"SIGKILL: {tries} tried, {survived} survived, seed {seed}")


def go_on(run):
    """The options by which a fit goes on from its last checkpoint."""
    last = run / "checkpoints" / "last.ckpt"
    return ["fit", "--config", str(run / "config.yaml"), "--ckpt_path", str(last)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_fit_that_is_told_to_stop_says_how_to_go_on(options, whole, tmp_path, chance, number):
    at = chance.randint(1, STEPS - 1)
    status, _ = processes.run(options("cut"), tmp_path / "log", (number, STEP, at))
    output = (tmp_path / "log").read_text()
    assert status == 128 + number, output
    run = tmp_path / "cut" / RUN
    assert f"Stopped at step {at};" in output
    assert f"the image so far: {run / 'restored.png'}" in output
    assert not (run / "result.json").exists()
    assert_nothing_is_half_written(run)
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == at
    [told] = [line for line in output.splitlines() if line.startswith("To resume: ")]
    command = shlex.split(told.removeprefix("To resume: "))
    assert command == ["deepred", *go_on(run)]
    main(command[1:])
    assert pixels(tmp_path / "cut" / "lightning_logs" / "version_1") == whole[0]


class Hanging(TotalVariation):
    """A denoiser that at its third call computes in foreign code, which nothing can end."""

    calls = 0

    def __call__(self, x):
        self.calls += 1
        while self.calls == 3:
            torch.randn(300, 300) @ torch.randn(300, 300)
        return super().__call__(x)


def test_a_hung_denoiser_does_not_hold_the_process(options, whole, tmp_path):
    # A real `deepred`: the end of a forked process is not Python's, which such a thread aborts.
    hanging = ["--red.denoiser", f"{__name__}.Hanging", "--red.timeout", "1.5"]
    ended = subprocess.run(
        [sys.executable, "-m", "deepred_pl", *options("hung"), *hanging],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,  # for the denoiser never ends
    )
    assert ended.returncode == 1, ended
    *_, last = ended.stderr.strip().splitlines()
    assert last.startswith("deepred: error: denoiser Hanging on the x of step 8 did not finish")
    assert "Traceback" not in ended.stderr
    main([*go_on(tmp_path / "hung" / RUN), "--red.denoiser", "TotalVariation"])
    assert pixels(tmp_path / "hung" / "lightning_logs" / "version_1") == whole[0]


def new_trainer(make_trainer, folder, update):
    return make_trainer(
        max_steps=13,
        callbacks=[update, LastCheckpoint()],
        enable_checkpointing=True,
        default_root_dir=folder,
    )


def new_model():
    return DeepRED(network=TinyNet, problem=noisy_problem())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_fit_that_waits_for_its_denoiser_stops_at_once(make_trainer, tmp_path, number):
    def slow(x):
        if len(calls) == 1:
            while not update.waiting:
                time.sleep(0.001)
            signal.pthread_kill(threading.main_thread().ident, number)
            released.wait(60)
        calls.append(x)
        return smooth(x)

    calls, released, before = [], threading.Event(), signal.getsignal(number)
    update = REDUpdate(slow, every_n_steps=4)
    trainer = new_trainer(make_trainer, tmp_path / "cut", update)
    with pytest.raises(Stopped) as stop:
        trainer.fit(new_model())
    assert stop.value.code == 128 + number
    assert len(calls) == 1  # its denoiser still computes
    released.set()
    assert signal.getsignal(number) is before
    saved = tmp_path / "cut" / RUN / "checkpoints" / "last.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == 8
    resumed = new_trainer(make_trainer, tmp_path / "resumed", REDUpdate(smooth, every_n_steps=4))
    resumed.fit(new_model(), ckpt_path=saved)
    whole = new_trainer(make_trainer, tmp_path / "whole", REDUpdate(smooth, every_n_steps=4))
    whole.fit(new_model())
    ends = [tmp_path / f / RUN / "checkpoints" / "last.ckpt" for f in ("resumed", "whole")]
    assert_same_checkpoint(*ends)


def test_a_fit_leaves_the_signals_as_they_were(make_trainer, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    for i in range(2):
        update = REDUpdate(smooth, every_n_steps=4)
        new_trainer(make_trainer, tmp_path / str(i), update).fit(new_model())
        after = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        assert after == before  # else Lightning's own stays, and keeps the trainer alive


def test_a_fit_that_gives_nan_keeps_the_checkpoint_before(make_trainer, tmp_path):
    class Poison(Callback):
        def on_train_batch_end(self, trainer, model, *batch):
            if trainer.global_step == 5:
                with torch.no_grad():
                    next(model.parameters()).fill_(float("nan"))

    trainer = new_trainer(make_trainer, tmp_path, REDUpdate(smooth, every_n_steps=100))
    trainer.callbacks[1:] = [Poison(), LastCheckpoint(every_n_steps=4)]
    trainer.fit(new_model())
    saved = torch.load(tmp_path / RUN / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 4


def test_only_a_checkpoint_of_the_same_fit_is_offered(make_trainer, tmp_path, caplog):
    """A logger's fixed directory may hold that of another."""

    class Fails(Callback):
        def on_train_batch_end(self, trainer, model, *batch):
            if trainer.global_step == 3:
                raise RuntimeError("of the user's")

    def fit(*others, every_n_steps=100, ckpt_path=None):
        caplog.clear()
        logger = loggers.CSVLogger(tmp_path, name="", version="")
        saving = LastCheckpoint(every_n_steps)
        settings = {"max_steps": 6, "logger": logger, "enable_checkpointing": True}
        parts = [REDUpdate(smooth, every_n_steps=2), saving, *others]
        with suppress(RuntimeError):
            make_trainer(callbacks=parts, **settings).fit(new_model(), ckpt_path=ckpt_path)
        return "To resume" in caplog.text

    caplog.set_level("INFO", logger=NAME)
    assert not fit()
    assert not fit(Fails())
    assert fit(Fails(), every_n_steps=2)
    assert fit(Fails(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")


def test_a_signal_before_the_first_step_counts(make_trainer, tmp_path):
    class Early(Callback):
        def on_train_start(self, *args):
            os.kill(os.getpid(), signal.SIGTERM)

    trainer = new_trainer(make_trainer, tmp_path, REDUpdate(smooth, every_n_steps=4))
    trainer.callbacks.insert(0, Early())
    with pytest.raises(Stopped) as stop:
        trainer.fit(new_model())
    assert stop.value.code == 128 + signal.SIGTERM
    saved = torch.load(tmp_path / RUN / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 1


def test_a_scheduler_does_not_bring_its_own_checkpoints(options, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_JOB_NAME", "night")
    cli = RestorationCLI(options("run", steps=2)[1:], run=False)
    cli.before_fit()
    assert cli.trainer._accelerator_connector.cluster_environment.__class__ is LightningEnvironment
    (tmp_path / "run" / "hpc_ckpt_1.ckpt").touch()
    with pytest.raises(ValueError, match="expected no hpc_ckpt"):
        cli.before_fit()


def test_ctrl_c_before_the_fit_has_its_status(monkeypatch, options, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("deepred_pl.data.RestorationDataModule.setup", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(options("run", steps=2))
    assert stop.value.code == 128 + signal.SIGINT
    assert "deepred: stopped" in capsys.readouterr().err


def test_a_run_without_a_logger_goes_on_in_a_directory_of_its_own(options, tmp_path):
    main([*options("run", steps=9), "--trainer.logger", "false"])
    run = tmp_path / "run" / RUN
    main([*go_on(run), "--trainer.max_steps", "12"])
    assert result_of(run)["steps"] == 9
    assert result_of(run.with_name("version_1"))["steps"] == 12
