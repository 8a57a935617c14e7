"""The `deepred` command."""

import argparse
import os
import sys
import warnings
from textwrap import shorten

from pytorch_lightning.cli import ArgsType
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from deepred_pl.run import RestorationCLI

EXPECTED = (ValueError, RuntimeError, OSError, MisconfigurationException, argparse.ArgumentError)
LONGEST = 600  # characters; a checkpoint of another network lists all its parameters

# What a parser error says beside its reason: how it tried every member of a type.
BESIDE = (
    *("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType"),
    *("Not a valid subclass", "Subclass types expect", "a class path (str)", "a dict with"),
    "Type collections.abc.Callable",
)


def main(args: ArgsType = None) -> None:
    """Run `deepred fit|test|predict`; a user's mistake ends it with one line and status 1.

    With the environment variable JSONARGPARSE_DEBUG=true the traceback is shown instead.

    Args:
        args: Command-line arguments as a list; None takes sys.argv.
    """
    # Lightning calls what torch and jsonargparse have deprecated.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", module="pytorch_lightning.cli")
    try:
        RestorationCLI(args)
    except EXPECTED as error:
        if os.environ.get("JSONARGPARSE_DEBUG", "").lower() == "true":
            raise
        lines = [line.strip(" -") for line in str(error).splitlines()]
        reasons = [line for line in lines if line and not line.startswith(BESIDE)]
        reason = " ".join(reasons or lines)
        sys.exit(f"deepred: error: {shorten(reason, LONGEST)}")
