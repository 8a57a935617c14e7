"""Settings parsed once: what the fork server imports, so that each of its children need not."""

from deepred_pl.cli import RestorationCLI

RestorationCLI(["--config=quickstart"], run=False)
