"""The order in which a window runs its microbatches: coupled, in lockstep, or through a pipeline."""
