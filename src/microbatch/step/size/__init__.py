"""The microbatch size: given, found by timing, predicted by dry runs, and halved when memory runs out."""
