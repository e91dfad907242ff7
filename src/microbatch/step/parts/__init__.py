"""Features of a window beside adding up gradients: one part in each file."""
