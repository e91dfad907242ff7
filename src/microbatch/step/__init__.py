"""One exact optimizer step: the room where batch, loss, gradients, ranks and memory meet."""
