"""Treat a batch as data: count its rows, cut it into microbatches, and copy each microbatch to the device."""
