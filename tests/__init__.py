"""The tests: the same in every shell, whatever its environment says."""

import os

SHELL = ("TERM", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "JSONARGPARSE_DEBUG", "DEEPRED_DATA")
for name in list(os.environ):
    if name in SHELL or name.startswith("SLURM_"):
        del os.environ[name]
os.environ["COLUMNS"] = "100"
