"""The doctor: what is wrong with a gradient accumulation loop, read from its source without running it."""
