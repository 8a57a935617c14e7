"""One job at a time on a worker thread."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotDone  # TimeoutError itself from Python 3.11
from functools import partial
from typing import Any

import torch
from torch import Tensor

THREAD_NAME = "deepred-denoiser"
LOOK = 1.0  # seconds between two looks at whether a thread that is waited for still lives


class Background:
    """Runs one function at a time on a daemon thread, beside the caller.

    A daemon, because a thread that hangs in foreign code must not keep the process alive.
    The thread lives until `close`, so that thread-bound resources are set up once. Torch uses
    one core on it; other libraries as many as they like. On a GPU it has a stream of its own,
    which begins a job behind what the caller had queued when it submitted it.

    Args:
        device: Where the jobs' tensors are.

    Attributes:
        wait_seconds: Total time `result` has waited, in seconds.
        busy_seconds: Total time the jobs that ended have taken, in seconds.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.wait_seconds = self.busy_seconds = 0.0
        on_gpu = torch.device(device).type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        self._jobs: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None]
        self._jobs = queue.SimpleQueue()
        self._pending: tuple[Future, str] | None = None
        self._submitted_at = 0.0
        self._hung = False  # a job was given up
        ready = threading.Event()
        self._thread = threading.Thread(
            target=_work, args=(self._jobs, ready), name=THREAD_NAME, daemon=True
        )
        threads = torch.get_num_threads()
        self._thread.start()
        ready.wait()
        torch.set_num_threads(threads)  # of threads made from now on; the caller's never changed

    @property
    def busy(self) -> bool:
        """Whether a job was submitted and not collected yet."""
        return self._pending is not None

    @property
    def done(self) -> bool:
        """Whether `result` would return at once."""
        return self._pending is not None and self._pending[0].done()

    def overdue(self, timeout: float | None) -> bool:
        """Whether a job is still running `timeout` seconds after it was submitted."""
        if self._pending is None or self.done or timeout is None:
            return False
        return time.perf_counter() - self._submitted_at >= timeout

    def submit(self, label: str, function: Callable[..., Any], *args: Any) -> None:
        """Start `function(*args)`; `label` names it should it fail. One job at a time."""
        if self._pending is not None:
            raise RuntimeError(f"{self._pending[1]} has not been collected by result() yet")
        future: Future = Future()
        self._pending = (future, label)
        self._submitted_at = time.perf_counter()
        job: Callable[[], Any] = partial(function, *args)
        ready = None
        if self._stream is not None:
            caller = torch.cuda.current_stream(self._stream.device)
            ready = caller.record_event()
            job = partial(_on_stream, self._stream, caller, job)
        self._jobs.put((future, partial(self._timed, job, ready)))

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the job and return what it returned.

        Args:
            timeout: Seconds after `submit` at which a job that still runs is given up; None waits
                however long it takes.

        Raises:
            RuntimeError: The job raised, or ended its thread; the message begins with its label.
            TimeoutError: The job was given up. Nothing can be submitted any more.
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
        """What the job raised, if it did."""
        while True:
            left = LOOK
            if timeout is not None:
                left = min(LOOK, max(0.0, self._submitted_at + timeout - time.perf_counter()))
            try:
                return future.exception(left)
            except NotDone:
                # Where another thread holds the interpreter, this one wakes late: look once more.
                if future.done():
                    continue
            if not self._thread.is_alive():
                raise RuntimeError(f"{label} failed: it ended its thread")
            if timeout is not None and time.perf_counter() >= self._submitted_at + timeout:
                self._hung = True
                raise TimeoutError(
                    f"{label} gave no answer in {timeout:g} s and was given up; where it is only "
                    "slow, allow it a longer timeout (--red.timeout)"
                )

    def _timed(self, job: Callable[[], Any], ready: torch.cuda.Event | None) -> Any:
        if ready is not None:
            ready.synchronize()  # holds up this thread alone, and is no work of the job
        start = time.perf_counter()
        try:
            return job()
        finally:
            self.busy_seconds += time.perf_counter() - start

    def close(self, timeout: float | None = None) -> None:
        """End the thread; a job still running after `timeout` seconds is abandoned.

        None waits for the job, however long it takes. One that was given up is not waited for.
        """
        self._pending = None
        self._jobs.put(None)
        self._thread.join(0 if self._hung else timeout)


def is_left_behind() -> bool:
    """Whether an abandoned job is still running somewhere in this process."""
    return any(thread.name == THREAD_NAME for thread in threading.enumerate())


def _work(jobs: queue.SimpleQueue, ready: threading.Event) -> None:
    # Torch computes on one core here: a second OpenMP team beside the caller's makes both sleep
    # and wake at every parallel region, which doubled the time of a θ-step on two cores.
    torch.get_num_threads()  # a thread's first call takes the process's setting; then ours holds
    torch.set_num_threads(1)
    ready.set()
    while (job := jobs.get()) is not None:
        future, function = job
        try:
            future.set_result(function())
        except BaseException as error:  # whatever ends a job belongs to its caller
            future.set_exception(error)
        del job, future, function  # an idle thread keeps no images


def _on_stream(
    stream: torch.cuda.Stream,
    caller: torch.cuda.Stream,
    job: Callable[[], Any],
) -> Any:
    with torch.cuda.stream(stream):
        value = job()
        stream.synchronize()  # holds up this thread alone
    for tensor in value if isinstance(value, tuple) else (value,):
        if isinstance(tensor, Tensor) and tensor.is_cuda:
            tensor.record_stream(caller)  # its memory is this stream's, its use the caller's
    return value
