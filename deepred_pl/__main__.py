"""The `deepred` command, also as `python -m deepred_pl`."""

import sys

import psutil

from deepred_pl import cli
from deepred_pl.batch.main import restore


def main() -> None:
    """Run `deepred restore` with what follows it, or the other subcommands."""
    if sys.argv[1:2] == ["restore"]:
        # The time for an image includes that of starting Python.
        restore(sys.argv[2:], psutil.Process().create_time())
    else:
        cli.command()


if __name__ == "__main__":
    main()
