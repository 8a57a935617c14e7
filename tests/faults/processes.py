"""Fits in processes of their own, which tell where they are and can be killed there."""

import multiprocessing
import os
import signal
import time
from collections import Counter
from contextlib import suppress
from functools import wraps
from pathlib import Path

from deepred_pl.denoisers import Denoiser

# Its children are forked from a process that has imported the package and computed nothing yet.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["deepred_pl.batch.main", __name__, "tests.faults.parsed"])

STEP, ROUND, CHECKPOINT, RESULTS = "step", "round", "checkpoint", "results"


def start(options, log, stop=None):
    """Start `deepred` with these options; the process, and the connection on which it tells.

    `stop` is a signal that it gets, and when: in the `number`-th of the moments of a name.
    """
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(list(map(str, options)), str(log), theirs, stop))
    process.start()
    theirs.close()
    return process, ours


def run(options, log, stop=None):
    """Run `deepred` to its end: exit status, and when what began and ended: (name, from, to)."""
    process, told = start(options, log, stop)
    moments, began = [], {}
    with suppress(EOFError):
        while True:
            name, begins = told.recv()
            if begins:
                began[name] = time.perf_counter()
            else:
                moments.append((name, began[name], time.perf_counter()))
    process.join()
    return process.exitcode, moments


def kill_at(options, log, name, number, delay):
    """Run `deepred` and kill it `delay` seconds into the `number`-th of these moments."""
    process, told = start(options, log)
    with suppress(EOFError):
        while number > 0:
            number -= told.recv() == (name, True)
        time.sleep(delay)
    process.kill()
    process.join()
    return process.exitcode


class Deadly(Denoiser):
    """Makes a file `marker` at one of its calls, and kills its process: not where there is one.

    Args:
        marker: The file; each process of each fit is killed where it is called "always".
        call: When.
        group: Kill all processes of the batch at once.
    """

    def __init__(self, marker: str, call: int = 1, group: bool = False):
        super().__init__()
        self.marker, self.call, self.group = Path(marker), call, group

    def __call__(self, x):
        self.call -= 1
        if self.call == 0 and (self.marker.name == "always" or not self.marker.exists()):
            self.marker.touch()
            (os.killpg if self.group else os.kill)(0 if self.group else os.getpid(), signal.SIGKILL)
        return 0.9 * x


def told_by(target, *args, seconds):
    """What `target(connection, *args)` sends from a process of its own, as pairs.

    The last pair is ("ended", exit status), or ("hung", seconds) of one that sent nothing for so
    long, and was killed.
    """
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(theirs, *args))
    process.start()
    theirs.close()
    try:
        while ours.poll(seconds):
            yield ours.recv()
        yield "hung", seconds
    except EOFError:
        process.join()
        yield "ended", process.exitcode
    finally:
        process.kill()
        process.join()


def start_batch(options, log):
    """Start `deepred-batch` with these options, in a process group of its own."""
    process = context.Process(target=_run_batch, args=(list(map(str, options)), str(log)))
    process.start()
    return process


def _prepare(log):
    """Write into `log`, and take signals as from a terminal, whatever the shell ignores."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    take_signals()
    import torch

    torch.set_num_threads(1)


def take_signals():
    """What Python does with SIGINT and SIGTERM where the shell left them alone; what was before.

    Shells start background jobs of a script with SIGINT ignored.
    """
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    return {number: signal.signal(number, handler) for number, handler in defaults.items()}


def _run_batch(options, log):
    os.setsid()
    _prepare(log)
    from deepred_pl.batch import main as batch
    from deepred_pl.batch import workers

    # Forked: this process has one thread, and what its fits import is here already.
    workers.get_context = lambda method: multiprocessing.get_context("fork")
    workers.GRACE = 100.0  # on a busy machine
    batch.main(options)


def _run(options, log, connection, stop):
    _prepare(log)
    from deepred_pl import DeepRED, REDUpdate
    from deepred_pl.callbacks import LastCheckpoint, Writer
    from deepred_pl.cli import command

    counts = Counter()

    def telling(owner, method, name):
        function = getattr(owner, method)

        @wraps(function)
        def told(*args, **kwargs):
            connection.send((name, True))
            counts[name] += 1
            if stop is not None and stop[1:] == (name, counts[name]):
                os.kill(os.getpid(), stop[0])
            value = function(*args, **kwargs)
            connection.send((name, False))
            return value

        setattr(owner, method, told)

    telling(DeepRED, "training_step", STEP)
    telling(REDUpdate, "_round", ROUND)
    telling(LastCheckpoint, "_save", CHECKPOINT)
    telling(Writer, "on_train_end", RESULTS)
    import sys

    sys.argv = ["deepred", *options]
    command()
