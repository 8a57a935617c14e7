import threading
import time
from types import SimpleNamespace

import pytest
import torch

from deepred_pl import background as background_module
from deepred_pl.background import Background


def worker_threads():
    return [t for t in threading.enumerate() if t.name == "deepred-denoiser"]


def test_runs_beside_the_caller_and_ends_on_close():
    started, release = threading.Event(), threading.Event()

    def job(value):
        started.set()
        release.wait()
        return value + 1

    background = Background()
    background.submit("job", job, 41)
    assert started.wait(60)  # the job runs while this thread goes on
    release.set()
    assert background.result() == 42
    background.close()
    assert not worker_threads()


def test_a_failing_job_is_named_and_the_worker_lives_on():
    background = Background()
    background.submit("denoiser Blur on the x of step 30", lambda: 1 / 0)
    with pytest.raises(RuntimeError, match=r"denoiser Blur on the x of step 30 failed: Zero"):
        background.result()
    background.submit("job", lambda: 7)
    assert background.result() == 7
    background.close()


def test_one_job_at_a_time():
    background = Background()
    background.submit("the first", lambda: 1)
    with pytest.raises(RuntimeError, match="the first has not been collected"):
        background.submit("the second", lambda: 2)
    background.result()
    with pytest.raises(RuntimeError, match="no job"):
        background.result()
    background.close()


def test_the_worker_computes_on_one_core_and_the_caller_keeps_its_own():
    before = torch.get_num_threads()
    background = Background()
    background.submit("job", torch.get_num_threads)
    assert background.result() == 1
    background.close()
    assert torch.get_num_threads() == before


def test_waiting_is_counted(monkeypatch):
    now, asked = 0.0, 0

    def perf_counter():
        nonlocal asked
        asked += threading.current_thread() is threading.main_thread()
        return now

    def slow():
        nonlocal now
        while asked < 2:  # by submit, and as the wait begins
            time.sleep(0.001)
        now = 5.0

    monkeypatch.setattr(background_module, "time", SimpleNamespace(perf_counter=perf_counter))
    background = Background()
    background.submit("job", slow)
    background.result()
    assert background.wait_seconds == background.busy_seconds == 5
    background.close()


def test_a_hung_job_is_abandoned():
    release = threading.Event()
    background = Background()
    background.submit("job", release.wait)
    background.close(timeout=0.01)  # returns although the job does not
    thread = background._thread
    assert thread.daemon and thread.is_alive()
    release.set()
    thread.join(60)
    assert not thread.is_alive()
