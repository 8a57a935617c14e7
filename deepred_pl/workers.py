"""Where the jobs of a batch run: processes on this machine, or a Ray cluster."""

import logging
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from deepred_pl.jobs import Job, fit

RETRIES = 2  # of a job whose process was killed; it goes on from its checkpoint
TICK = 1.0  # seconds between two looks at what is going on

Outcome = tuple[Job, str | None]  # a job that ended, and why it failed if it did


def on_this_machine(jobs: Sequence[Job], workers: int, threads: int) -> Iterator[Outcome | None]:
    """Run jobs in processes, each with so many CPU threads; yields what ended, and None now and
    then.

    A process serves one job after another. One that is killed takes nothing with it: its job goes
    on in another from its checkpoint, and fails when that happens for the third time.
    """
    context = get_context("spawn")  # a forked process cannot use CUDA, or torch's threads
    waiting, killed = deque(jobs), Counter[Path]()
    gpus = _gpus()
    idle: list[Connection] = []
    busy: dict[Connection, Job] = {}
    processes: list[BaseProcess] = []
    try:
        while waiting or busy:
            while waiting and len(busy) < workers:
                if not idle:
                    ours, theirs = context.Pipe()
                    gpu = gpus[len(processes) % len(gpus)] if gpus else None
                    processes.append(
                        context.Process(target=_serve, args=(theirs, gpu), daemon=True)
                    )
                    processes[-1].start()
                    theirs.close()  # so that its end is seen
                    idle.append(ours)
                connection, job = idle.pop(), waiting.popleft()
                connection.send((job, threads))
                busy[connection] = job
            ended = wait(list(busy), timeout=TICK)
            for connection in [c for c in busy if c in ended]:
                job = busy.pop(connection)
                try:
                    error = connection.recv()
                except (EOFError, ConnectionError):
                    killed[job.directory] += 1
                    if killed[job.directory] <= RETRIES:
                        waiting.appendleft(job)
                        continue
                    error = "its process was killed, again and again; perhaps for want of memory"
                else:
                    idle.append(connection)
                yield job, error
            yield None
    finally:
        for process in processes:
            process.kill()


def _gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(i) for i in range(count)]


def _serve(connection: Connection, gpu: str | None) -> None:
    """A process of `on_this_machine`: one job after another, on one GPU if there is any."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    while True:
        try:
            job, threads = connection.recv()
        except EOFError:
            return
        connection.send(fit(job, threads))


def _end_with_parent() -> None:
    """A fit without its batch would go on beside the one that takes the batch up again."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def on_ray(
    jobs: Sequence[Job], address: str, workers: int | None, threads: int, gpus: float
) -> Iterator[Outcome | None]:
    """Run jobs as Ray tasks; yields what ended, and None now and then.

    Ray places them, and starts a task again whose worker died. The run directories must be on
    storage that all nodes share.

    Args:
        jobs: The jobs.
        address: Of a cluster, as "auto" or "HOST:PORT"; "local" starts one on this machine, which
            listens on the loopback interface alone.
        workers: Fits beside each other on a local one; None leaves that to its cores.
        threads: Cores that a fit takes.
        gpus: GPUs that a fit takes; a fraction packs several on one.

    Raises:
        ValueError: Ray is not installed, or no cluster answers.
    """
    local = address == "local"
    if local:  # read when Ray is imported: without clusters, it keeps to the loopback interface
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    else:  # its core would write a warning a second while it waits for an answer
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # its coming default
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            "--ray needs Ray, which is not installed; pip install 'deepred_pl[ray]', or use "
            "--workers"
        ) from error
    cores: dict[str, Any] = {"include_dashboard": False} if local else {}
    if local and workers is not None:
        cores["num_cpus"] = workers * threads
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **cores)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise ValueError(
            f"no Ray cluster answers at {address} ({str(error).splitlines()[0]}); start one by "
            "`ray start --head`, or give --ray local"
        ) from error
    try:
        task = ray.remote(fit).options(num_cpus=threads, num_gpus=gpus, max_retries=RETRIES)
        pending = {task.remote(job, threads): job for job in jobs}
        while pending:
            ended, _ = ray.wait(list(pending), timeout=TICK)
            for reference in ended:
                job = pending.pop(reference)
                try:
                    yield job, ray.get(reference)
                except ray.exceptions.RayError as error:
                    yield job, f"its worker died: {str(error).splitlines()[0]}"
            yield None
    finally:
        ray.shutdown()
