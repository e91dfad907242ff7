"""A batch as data: walk it, cut it into microbatches, send each one to the device."""
