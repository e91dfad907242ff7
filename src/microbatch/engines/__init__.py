"""Training engines of others that bring their own gradients, ranks and optimizer step, given one exact denominator."""
