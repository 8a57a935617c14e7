"""Fits in processes of their own, which tell where they are and can be killed there."""

import multiprocessing
import os
import time
from contextlib import suppress
from functools import wraps

# Its children are forked from a process that has imported the package and computed nothing yet.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["deepred_pl.cli", "tests.faults.processes"])

STEP, ROUND, CHECKPOINT, RESULTS = "step", "round", "checkpoint", "results"


def start(options, log):
    """Start `deepred` with these options; the process, and the connection on which it tells."""
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(list(map(str, options)), str(log), theirs))
    process.start()
    theirs.close()
    return process, ours


def run(options, log):
    """Run `deepred` to its end: exit status, and when what began and ended: (name, from, to)."""
    process, told = start(options, log)
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


def _run(options, log, connection):
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    from deepred_pl import DeepRED, REDUpdate
    from deepred_pl.callbacks import LastCheckpoint, Writer
    from deepred_pl.cli import command

    torch.set_num_threads(1)

    def telling(owner, method, name):
        function = getattr(owner, method)

        @wraps(function)
        def told(*args, **kwargs):
            connection.send((name, True))
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
