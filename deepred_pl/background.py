"""Run one job at a time on a background thread."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotDone  # the same as TimeoutError in Python 3.11
from functools import partial
from typing import Any

import torch
from torch import Tensor

THREAD_NAME = "deepred-denoiser"
POLL = 1.0  # seconds between two checks that the thread is alive


class Background:
    """Runs one function at a time on a daemon thread.

    The thread is a daemon because one that hangs in foreign code must not keep the process alive.
    It lives until `close`, so that thread-bound resources are set up once. Torch uses one core on
    it; other libraries use as many as they choose. On a GPU it has its own stream, on which a job
    starts after the work that its caller had queued when submitting it.

    Args:
        device: The device of the jobs' tensors.

    Attributes:
        wait_seconds: Total time that `result` has waited, in seconds.
        busy_seconds: Total time of the jobs that ended, in seconds.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.wait_seconds = self.busy_seconds = 0.0
        on_gpu = torch.device(device).type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._jobs: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None]
        self._jobs = queue.SimpleQueue()
        self._pending: tuple[Future, str] | None = None
        self._submitted_at = 0.0
        self._hung = False  # a job timed out
        ready = threading.Event()
        self._thread = threading.Thread(
            target=_work, args=(self._jobs, ready), name=THREAD_NAME, daemon=True
        )
        threads = torch.get_num_threads()
        self._thread.start()
        ready.wait()
        torch.set_num_threads(threads)  # for threads started from now on; the caller's is unchanged

    @property
    def busy(self) -> bool:
        """Whether a job was submitted and its result not collected yet."""
        return self._pending is not None

    def submit(self, label: str, function: Callable[..., Any], *args: Any) -> None:
        """Start `function(*args)`; `label` names it in errors. One job at a time."""
        if self._pending is not None:
            raise RuntimeError(f"{self._pending[1]} has not been collected by result() yet")
        future: Future = Future()
        self._pending = (future, label)
        self._submitted_at = time.perf_counter()
        job: Callable[[], Any] = partial(function, *args)
        ready = None
        if self._stream is not None:
            caller = torch.cuda.current_stream(self._stream.device)
            # Waiting for events and streams otherwise occupies a core.
            ready = caller.record_event(torch.cuda.Event(blocking=True))
            job = partial(_on_stream, self._stream, caller, job)
        self._jobs.put((future, partial(self._timed, job, ready)))

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the job and return its result.

        Args:
            timeout: Seconds after `submit` at which a running job is abandoned; None waits
                indefinitely.

        Raises:
            RuntimeError: The job raised an exception or ended its thread; the message begins with
                its label.
            TimeoutError: The job timed out. Nothing can be submitted any more.
        """
        if self._pending is None:
            raise RuntimeError("no job was submitted")
        (future, label), self._pending = self._pending, None
        start = time.perf_counter()
        try:
            error = self._outcome(future, label, timeout)
        finally:
            self.wait_seconds += time.perf_counter() - start
        if error is not None:
            raise RuntimeError(f"{label} failed: {type(error).__name__}: {error}") from error
        return future.result()

    def _outcome(self, future: Future, label: str, timeout: float | None) -> BaseException | None:
        """The exception that the job raised, if any."""
        while True:
            left = POLL
            if timeout is not None:
                left = min(POLL, max(0.0, self._submitted_at + timeout - time.perf_counter()))
            try:
                return future.exception(left)
            except NotDone:
                # This thread may have been woken late, after the job was done.
                if future.done():
                    continue
            if not self._thread.is_alive():
                raise RuntimeError(f"{label} failed: it ended its thread")
            if timeout is not None and time.perf_counter() >= self._submitted_at + timeout:
                self._hung = True
                raise TimeoutError(f"{label} did not finish in {timeout:g} s and was abandoned")

    def _timed(self, job: Callable[[], Any], ready: torch.cuda.Event | None) -> Any:
        if ready is not None:
            ready.synchronize()  # blocks only this thread, and does not count as work
        start = time.perf_counter()
        try:
            return job()
        finally:
            self.busy_seconds += time.perf_counter() - start

    def close(self, timeout: float | None = None) -> None:
        """End the thread; a job still running after `timeout` seconds is abandoned.

        None waits for the job indefinitely, unless it has timed out before.
        """
        self._pending = None
        self._jobs.put(None)
        self._thread.join(0 if self._hung else timeout)


def has_abandoned_job() -> bool:
    """Whether an abandoned job is still running in this process."""
    return any(thread.name == THREAD_NAME for thread in threading.enumerate())


def _work(jobs: queue.SimpleQueue, ready: threading.Event) -> None:
    # Torch uses one core here: a second OpenMP team competes with the caller's in every parallel
    # region, which doubled the time of a θ-step on two cores.
    torch.get_num_threads()  # a thread's first call copies the process's setting; ours holds after
    torch.set_num_threads(1)
    ready.set()
    while (job := jobs.get()) is not None:
        future, function = job
        try:
            future.set_result(function())
        except BaseException as error:  # the caller handles it
            future.set_exception(error)
        del job, future, function  # so that an idle thread holds no images


def _on_stream(
    stream: torch.cuda.Stream,
    caller: torch.cuda.Stream,
    job: Callable[[], Any],
) -> Any:
    with torch.cuda.stream(stream):
        value = job()
        stream.record_event(torch.cuda.Event(blocking=True)).synchronize()  # only this thread
    for tensor in value if isinstance(value, tuple) else (value,):
        if isinstance(tensor, Tensor) and tensor.is_cuda:
            tensor.record_stream(caller)  # allocated on this stream, used on the caller's
    return value
