"""Gradient accumulation: the buffers and dtypes of the sums, fused products, norm and clipping."""
