"""Run the fits of a batch in processes on this machine, or on a Ray cluster."""

import logging
import math
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from deepred_pl.batch.jobs import Job, fit, ready
from deepred_pl.callbacks.preflight import step_memory
from deepred_pl.choose import set_up
from deepred_pl.cli import EXPECTED, RestorationCLI, reason, report_in_thread
from deepred_pl.memory import free_memory, give_memory_back

RETRIES = 2  # of a fit whose process was killed; it resumes from its checkpoint
GRACE = 10.0  # seconds for fits to save their checkpoints when a batch is stopped
TICK = 1.0  # seconds between two checks for fits that ended
PROCESS = 700 * 2**20  # bytes of a process with torch, without its fit
TRIED = 3  # images, to measure the memory of a fit

Outcome = tuple[Job, str | None]  # a fit that ended, and the reason if it failed
Outcomes = Generator[Outcome | None, None, None]  # None: no fit has ended


@dataclass(frozen=True)
class Where:
    """Where fits run; numbers that are None depend on the machine.

    Attributes:
        ray: Address of a Ray cluster, such as "auto" or "HOST:PORT"; "local" starts one on this
            machine; None runs processes.
        workers: Parallel fits on this machine.
        threads: CPU threads per fit.
        gpus: GPUs per fit with Ray; with a fraction several share one.
    """

    ray: str | None = None
    workers: int | None = None
    threads: int | None = None
    gpus: float | None = None


def start(
    fits: Sequence[Job], where: Where, chains: int, report: Callable[[str], None]
) -> Outcomes:
    """Run fits, and `report` how many run in parallel; yields those that ended, and None meanwhile.

    On this machine the threads per fit depend on how many fits of the whole batch need not wait for
    another, `chains`, not on those that are left, because the last bits of the results depend on
    them.
    """
    accelerator = fits[0].about["settings"]["trainer"]["accelerator"]
    if where.ray not in (None, "local"):
        return on_ray(fits, where, accelerator)
    on_gpu = accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available()
    cores, gpus = _cores(), torch.cuda.device_count() if on_gpu else 0
    parallel = where.workers or min(chains, gpus or cores)
    threads = where.threads or _stated_threads() or max(1, cores // parallel)
    workers = where.workers or min(gpus or max(1, cores // threads), len(fits), chains)
    if where.workers is None and workers > 1 and not gpus:
        workers = min(workers, _that_fit_into_memory(fits))
    of_each = f"{threads} CPU thread{'s' * (threads > 1)} each"
    number = f"{len(fits)} fit{'s' * (len(fits) > 1)}"
    report(f"{number}, {workers} in parallel, {of_each}")
    if where.ray is None:
        return on_this_machine(fits, workers, threads)
    share = min(1.0, gpus / workers) if where.gpus is None else where.gpus
    return on_ray(fits, Where("local", workers, threads, share), accelerator)


def _stated_threads() -> int | None:
    """The number of OMP_NUM_THREADS, which torch follows everywhere else, too."""
    stated = os.environ.get("OMP_NUM_THREADS", "")
    return int(stated) if stated.isdecimal() and int(stated) > 0 else None


def on_this_machine(jobs: Sequence[Job], workers: int, threads: int) -> Outcomes:
    """Run fits in parallel processes with a number of CPU threads each.

    A process runs one fit after another. If it is killed, its fit is resumed from its checkpoint in
    another process, and fails when that happens for the third time.
    """
    context = get_context("spawn")  # a forked process cannot use CUDA, or torch's threads
    waiting, killed = list(jobs), Counter[Path]()
    idle: list[Connection] = []
    busy: dict[Connection, Job] = {}
    processes: list[BaseProcess] = []
    gpus, gpu_of = _gpus(), dict[Connection, str | None]()
    try:
        while waiting or busy:
            while len(busy) < workers and (startable := ready(waiting, busy.values())):
                job = startable[0]
                if not idle:
                    ours, theirs = context.Pipe()
                    taken = Counter(gpu_of[c] for c in busy)
                    gpu_of[ours] = min(gpus, key=lambda gpu: taken[gpu]) if gpus else None
                    process = context.Process(target=_serve, args=(theirs,), daemon=True)
                    with _visible(gpu_of[ours]):
                        process.start()
                    theirs.close()  # so that its end is detected
                    processes.append(process)
                    idle.append(ours)
                connection = idle.pop()
                try:
                    end = None if job.effort is None else job.effort.end(workers)
                    connection.send((job, threads, end))
                except OSError:  # it was killed while idle
                    continue
                waiting.remove(job)
                busy[connection] = job
            ended = wait(list(busy), timeout=TICK)
            for connection in [c for c in busy if c in ended]:
                job = busy.pop(connection)
                try:
                    error = connection.recv()
                except (EOFError, OSError):
                    killed[job.directory] += 1
                    if killed[job.directory] <= RETRIES:
                        waiting.insert(0, job)
                        continue
                    error = "its process was killed repeatedly, perhaps for lack of memory"
                else:
                    if error is None:
                        idle.append(connection)
                    else:  # the process's state may be the cause: use a new one
                        connection.close()
                yield job, error
            yield None
    finally:
        try:
            for served in processes:
                served.terminate()  # a fit saves its checkpoint after the current step
            deadline = time.monotonic() + GRACE
            for served in processes:
                served.join(max(0.0, deadline - time.monotonic()))
        finally:  # also if another signal arrives
            for served in processes:
                served.kill()


@contextmanager
def _visible(gpu: str | None) -> Iterator[None]:
    """Start processes that see only this GPU, from their first import on; None: all of them."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    try:
        yield
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _serve(connection: Connection) -> None:
    """A process of `on_this_machine`: one fit after another."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    threading.excepthook = report_in_thread
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            job, threads, end = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(fit(job, threads, end))


def _end_with_parent() -> None:
    """End with the batch: otherwise the fit would compete with the one of a resumed batch."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _gpus() -> list[str]:
    """The GPUs of this process, as in CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(i) for i in range(count)]


def _cores() -> int:
    """The number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _that_fit_into_memory(fits: Sequence[Job]) -> int:
    """How many fits the free memory allows, at least 1, estimated from the largest files."""
    for job in sorted(fits, key=lambda job: job.about["bytes"], reverse=True)[:TRIED]:
        try:
            cli = RestorationCLI(job.first_options, run=False)
            cli.model.build(set_up(cli.datamodule))
            needed, device = step_memory(cli.model), cli.model.device
        except EXPECTED:  # its fit reports it
            continue
        del cli
        give_memory_back()
        return max(1, free_memory(device) // (needed + PROCESS))
    return len(fits)


def on_ray(jobs: Sequence[Job], where: Where, accelerator: str) -> Outcomes:
    """Run fits as Ray tasks, which Ray schedules and retries if their worker died.

    The run directories must be on storage that all nodes share. A cluster that is started here
    listens only on the loopback interface.
    """
    local, threads = where.ray == "local", where.threads or 1
    if local:  # read when Ray is imported: without clusters, it uses the loopback interface
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    else:  # its core would print a warning per second while it waits for an answer
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "error")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # its coming default
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            "Ray is not installed; pip install -c constraints.txt '.[ray]' in a clone of "
            "deepred_pl, or use workers on this machine"
        ) from error
    own: dict[str, Any] = {}  # settings of a cluster that is started here
    if local and where.workers:
        own = {"include_dashboard": False, "num_cpus": where.workers * threads}
    try:
        ray.init(where.ray, log_to_driver=False, logging_level=logging.ERROR, **own)
    except Exception as error:  # it depends on the kind of connection
        raise ValueError(
            f"no Ray cluster answers at {where.ray} ({reason(error)}); start one with "
            "`ray start --head`, or use `local`"
        ) from error
    try:
        gpus = where.gpus
        if gpus is None:
            has_some = ray.cluster_resources().get("GPU", 0) > 0
            on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and has_some)
            gpus = float(on_gpu)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(n.get("CPU", 0) >= threads and n.get("GPU", 0) >= gpus for n in nodes):
            raise ValueError(
                f"a fit needs {threads} CPUs and {gpus:g} GPUs, which no node of the Ray cluster "
                "has; change threads or gpus"
            )
        task = ray.remote(_fit_in).options(num_cpus=threads, num_gpus=gpus, max_retries=RETRIES)
        waiting, pending = list(jobs), dict[Any, Job]()
        while waiting or pending:
            for job in ready(waiting, pending.values()):
                waiting.remove(job)
                pending[task.remote(os.getcwd(), job, threads, where.workers)] = job
            ended, _ = ray.wait(list(pending), timeout=TICK)
            for reference in ended:
                job = pending.pop(reference)
                try:
                    yield job, ray.get(reference)
                except ray.exceptions.RayError as error:
                    yield job, f"its worker died: {reason(error)}"
            yield None
    finally:
        ray.shutdown()


def _fit_in(directory: str, job: Job, threads: int, workers: int | None) -> str | None:
    """`fit`, with paths in settings relative to a directory."""
    os.chdir(directory)
    parallel = math.inf if workers is None else workers
    return fit(job, threads, None if job.effort is None else job.effort.end(parallel))
