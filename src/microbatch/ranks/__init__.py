"""Data-parallel, sharded and pipelined ranks: agree on a window's content, then reduce gradients once."""
