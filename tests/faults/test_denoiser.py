"""A denoiser that fails in every way there is costs a fit nothing but itself."""

import _thread
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from deepred_pl import DeepRED, REDUpdate, background
from deepred_pl.background import THREAD_NAME
from deepred_pl.callbacks import AutoStop, LastCheckpoint
from deepred_pl.lightning import NAME
from tests.helpers import RUN, TinyNet, noisy_problem, smooth
from tests.test_resume import assert_same_checkpoint

STEPS, K = 21, 4  # a round is due at 4, 8, ... and none at the end


@pytest.fixture(autouse=True)
def _hear_lightning(caplog):
    caplog.set_level("INFO", logger=NAME)


class Failing:
    """`smooth`, which fails at some of its calls."""

    def __init__(self, failure, calls):
        self.failure, self.calls, self.called = failure, calls, 0

    def __call__(self, x):
        self.called += 1
        return self.failure(x) if self.called in self.calls else smooth(x)


def raises(x):
    raise KeyError("no such patch")


def gives_nan(x):
    return x * float("nan")


def gives_another_shape(x):
    return x[..., 1:]


def gives_grey_levels(x):
    return 255 * smooth(x)


def gives_a_list(x):
    return [1.0]


def exits(x):
    sys.exit("of its own accord")


def ends_its_thread(x):
    _thread.exit()


RELEASED, OVERDUE = threading.Event(), threading.Event()


@pytest.fixture(autouse=True)
def _release_what_hangs(monkeypatch):
    """An hour goes by as soon as a denoiser hangs: no other is given up, however busy all is."""

    def now():
        return time.perf_counter() + 3600 * OVERDUE.is_set()

    monkeypatch.setattr(background, "time", SimpleNamespace(perf_counter=now))
    monkeypatch.setattr(background, "POLL", 0.01)
    for thread in left_behind():  # by the test before
        thread.join()
    RELEASED.clear()
    OVERDUE.clear()
    yield
    RELEASED.set()


def left_behind():
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


def hangs(x):
    OVERDUE.set()
    RELEASED.wait(60)
    return x


FAILURES = {
    raises: r"KeyError: 'no such patch'",
    gives_nan: "NaN",
    gives_another_shape: r"got \(1, 3, 9, 10\)",
    gives_grey_levels: r"got values of up to \d+ for up to .*divide them by the value of white",
    gives_a_list: r"tensor of \(1, 3, 9, 11\) like its input, got list",
    exits: "SystemExit: of its own accord",
    ends_its_thread: "SystemExit",
    hangs: "did not finish in 60 s",
}


def new_model():
    return DeepRED(network=TinyNet, problem=noisy_problem(), weighting="rise", rise_start=5.0)


@pytest.fixture
def fit(make_trainer, tmp_path):
    def run(folder, denoiser, ckpt_path=None, **settings):
        update = REDUpdate(denoiser, **{"every_n_steps": K, **settings})
        trainer = make_trainer(
            max_steps=STEPS,
            callbacks=[update, AutoStop(window=10), LastCheckpoint(every_n_steps=3)],
            enable_checkpointing=True,
            default_root_dir=tmp_path / folder,
        )
        try:
            trainer.fit(new_model(), ckpt_path=ckpt_path)
        finally:
            assert not update.waiting
        return tmp_path / folder / RUN / "checkpoints" / "last.ckpt"

    return run


@pytest.mark.parametrize(
    ("failure", "message"), FAILURES.items(), ids=[f.__name__ for f in FAILURES]
)
@pytest.mark.parametrize("schedule", [{}, {"every_n_steps": 2, "rounds_per_denoising": 2}])
def test_a_fit_whose_denoiser_failed_goes_on_as_if_it_had_not(
    fit, tmp_path, failure, message, schedule
):
    whole = fit("whole", smooth, **schedule)
    with pytest.raises(
        (RuntimeError, TimeoutError), match=f"denoiser Failing on the x of step 8.*{message}"
    ):
        fit("cut", Failing(failure, [3]), timeout=60, retries=0, **schedule)
    saved = tmp_path / "cut" / RUN / "checkpoints" / "last.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == 12  # the round that failed
    assert_same_checkpoint(fit("resumed", smooth, ckpt_path=saved, **schedule), whole)


def test_a_failure_in_the_last_round_repeats_one_step(fit, tmp_path):
    whole = fit("whole", smooth, every_n_steps=7)  # at 7, 14 and 21
    with pytest.raises(RuntimeError, match="no such patch"):
        fit("cut", Failing(raises, [3]), retries=0, every_n_steps=7)
    saved = tmp_path / "cut" / RUN / "checkpoints" / "last.ckpt"
    assert torch.load(saved, weights_only=True)["global_step"] == STEPS - 1
    assert_same_checkpoint(fit("resumed", smooth, ckpt_path=saved, every_n_steps=7), whole)


@pytest.mark.parametrize("failure", [raises, gives_nan, gives_another_shape])
def test_a_failure_that_happens_once_is_tried_again(fit, caplog, failure):
    whole = fit("whole", smooth)
    assert_same_checkpoint(fit("again", Failing(failure, [3])), whole)
    assert "Denoiser Failing failed; retrying: " in caplog.text


@pytest.mark.parametrize("retries", [0, 2])
def test_one_that_always_fails_is_asked_as_often_as_was_said(fit, caplog, retries):
    denoiser = Failing(raises, range(100))
    with pytest.raises(RuntimeError, match="no such patch"):
        fit("always", denoiser, retries=retries)
    assert denoiser.called == retries + 1
    assert caplog.text.count("retrying") == retries


def test_a_hung_denoiser_does_not_hold_the_fit(fit):
    with pytest.raises(TimeoutError):
        fit("hung", Failing(hangs, [2]), timeout=60, retries=0)
    assert left_behind()  # it still hangs


def test_a_slow_one_within_its_time_is_left_alone(fit):
    def slow(x):
        time.sleep(0.05)
        return smooth(x)

    assert_same_checkpoint(fit("slow", slow, timeout=20), fit("fast", smooth, timeout=None))


@pytest.mark.parametrize("failure", [raises, exits, ends_its_thread])
def test_no_thread_is_left_behind(fit, failure):
    with pytest.raises(RuntimeError):
        fit("failed", Failing(failure, [2]), retries=0)
    assert not left_behind()


@pytest.mark.parametrize("wrong", [{"timeout": 0}, {"timeout": float("nan")}, {"retries": -1}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        REDUpdate(smooth, **wrong)
