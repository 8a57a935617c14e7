"""The `deepred` command."""

import os
import sys

from pytorch_lightning.cli import ArgsType

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
