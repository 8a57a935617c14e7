"""`python -m deepred_pl` is `deepred`."""

from deepred_pl.cli import command

command()
