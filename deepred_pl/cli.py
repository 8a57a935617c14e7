"""The `deepred` command."""

import os
import signal
import sys
from typing import NoReturn

from pytorch_lightning.cli import ArgsType

from deepred_pl.background import is_left_behind
from deepred_pl.callbacks.checkpoint import SIGNALLED
from deepred_pl.run import EXPECTED, RestorationCLI, reason


def main(args: ArgsType = None) -> None:
    """Run `deepred fit|test|predict`; a user's mistake ends it with one line and status 1.

    With the environment variable JSONARGPARSE_DEBUG=true the traceback is shown instead.

    Args:
        args: Command-line arguments as a list; None takes sys.argv.
    """
    try:
        RestorationCLI(args)
    except EXPECTED as error:
        if os.environ.get("JSONARGPARSE_DEBUG", "").lower() == "true":
            raise
        sys.exit(f"deepred: error: {reason(error)}")
    except KeyboardInterrupt:  # outside of the fit, which has its own way to stop
        print("deepred: stopped", file=sys.stderr)
        sys.exit(SIGNALLED + signal.SIGINT)


def command() -> NoReturn:
    """The command's own process: `main`, and an end that no denoiser left behind holds up.

    Python ends a thread that computes in foreign code by aborting the process, with a status of its
    own; where one is left, the process ends without asking it.
    """
    try:
        main()
        status: int | str | None = 0
    except SystemExit as error:
        status = error.code
    if not is_left_behind():
        sys.exit(status)
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)
