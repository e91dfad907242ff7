"""Measure `microbatch` against plain PyTorch and against the libraries that accumulate gradients too."""
