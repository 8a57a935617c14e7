"""The `deepred` command."""

import os
import sys
import warnings
from textwrap import shorten

from pytorch_lightning.cli import ArgsType
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from deepred_pl.run import RestorationCLI

EXPECTED = (ValueError, RuntimeError, OSError, MisconfigurationException)
LONGEST = 600  # characters; a checkpoint of another network lists all its parameters


def main(args: ArgsType = None) -> None:
    """Run `deepred fit|test|predict`; a user's mistake ends it with one line and status 1.

    With the environment variable JSONARGPARSE_DEBUG=true the traceback is shown instead.

    Args:
        args: Command-line arguments as a list; None takes sys.argv.
    """
    # Lightning calls what torch has deprecated.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    try:
        RestorationCLI(args)
    except EXPECTED as error:
        if os.environ.get("JSONARGPARSE_DEBUG", "").lower() == "true":
            raise
        sys.exit(f"deepred: error: {shorten(str(error), LONGEST)}")
