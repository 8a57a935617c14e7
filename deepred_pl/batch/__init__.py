"""The `deepred-batch` command: restore many images, on this machine or on a Ray cluster."""
