"""Run `deepred` as `python -m deepred_pl`."""

from deepred_pl.cli import command

command()
