"""Which learning rate and which batch: answers from runs."""
