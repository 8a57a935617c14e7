"""`deepred restore` and `deepred-batch`: restore images, on this machine or on a Ray cluster."""
