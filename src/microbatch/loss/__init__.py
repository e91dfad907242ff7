"""Define losses as a sum and a count, losses that couple samples, and statistics over the effective batch."""
