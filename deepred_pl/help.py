"""The command line's help, without what nobody can read."""

import re
from textwrap import fill

from pytorch_lightning.cli import LightningArgumentParser

LIST = re.compile(r"known\s+subclasses:\s+([^)]*)\)")
INDENT = 24  # columns, argparse's
OWN = "deepred_pl."


class ReadableParser(LightningArgumentParser):
    """Names this package's classes alone where it has some that fit, not all that are imported.

    Any class that fits can be given all the same, by its import path.
    """

    def format_help(self) -> str:
        return LIST.sub(_own, super().format_help())


def _own(found: re.Match[str]) -> str:
    names = re.split(r",\s+", found[1])
    # Where any torch module would do, a network is meant: problems and operators are modules too.
    of = OWN + "networks." if "torch.nn.Module" in names else OWN
    own = [name for name in names if name.startswith(of)]
    if not own or len(own) == len(names):
        return found[0]
    indent = INDENT * " "
    told = fill(", ".join(own), 78, initial_indent=indent, subsequent_indent=indent)
    return f"among them, of this package:\n{told})"
