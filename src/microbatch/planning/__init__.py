"""Which microbatch, how many of them, and which hyperparameters go with the batch."""
