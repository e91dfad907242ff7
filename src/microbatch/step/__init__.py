"""One exact optimizer step: the package that combines batch, loss, gradients, ranks and memory."""
