"""The tests, independent of the environment of the shell that runs them."""

import os

SHELL = ("TERM", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "JSONARGPARSE_DEBUG")
for name in list(os.environ):
    if name in SHELL or name.startswith("SLURM_"):
        del os.environ[name]
os.environ["COLUMNS"] = "100"
