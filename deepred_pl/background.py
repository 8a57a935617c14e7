"""One job at a time on a worker thread."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch


class Background:
    """Runs one function at a time on a daemon thread, beside the caller.

    A daemon, because a thread that hangs in foreign code must not keep the process alive.
    The thread lives until `close`, so that thread-bound resources are set up once.

    Attributes:
        wait_seconds: Total time `result` has waited, in seconds.
    """

    def __init__(self, name: str = "deepred-denoiser") -> None:
        self.wait_seconds = 0.0
        self._jobs: queue.SimpleQueue[tuple[Future, Callable[..., Any], tuple] | None]
        self._jobs = queue.SimpleQueue()
        self._pending: tuple[Future, str] | None = None
        self._thread = threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True)
        self._thread.start()
        # The worker computes on one thread: a second OpenMP team beside the caller's makes both
        # sleep and wake at every parallel region, which doubled the time of a θ-step on two cores.
        threads = torch.get_num_threads()
        self.submit("the first job", _use_one_core)
        self.result()
        torch.set_num_threads(threads)  # of threads made from now on; the caller's never changed
        self.wait_seconds = 0.0

    def submit(self, label: str, function: Callable[..., Any], *args: Any) -> None:
        """Start `function(*args)`; `label` names it should it fail. One job at a time."""
        if self._pending is not None:
            raise RuntimeError(f"{self._pending[1]} has not been collected by result() yet")
        future: Future = Future()
        self._pending = (future, label)
        self._jobs.put((future, function, args))

    def result(self) -> Any:
        """Wait for the job and return what it returned.

        Raises:
            RuntimeError: The job raised; the message begins with its label.
        """
        if self._pending is None:
            raise RuntimeError("no job was submitted")
        (future, label), self._pending = self._pending, None
        start = time.perf_counter()
        error = future.exception()
        self.wait_seconds += time.perf_counter() - start
        if error is not None:
            raise RuntimeError(f"{label} failed: {type(error).__name__}: {error}") from error
        return future.result()

    def close(self, timeout: float = 5.0) -> None:
        """End the thread; a job still running after `timeout` seconds is abandoned."""
        self._pending = None
        self._jobs.put(None)
        self._thread.join(timeout)


def _use_one_core() -> None:
    torch.get_num_threads()  # a thread's first call takes the process's setting; then ours holds
    torch.set_num_threads(1)


def _work(jobs: queue.SimpleQueue) -> None:
    while (job := jobs.get()) is not None:
        future, function, args = job
        try:
            future.set_result(function(*args))
        except BaseException as error:  # whatever ends a job belongs to its caller
            future.set_exception(error)
        del job, future, function, args  # an idle thread keeps no images
