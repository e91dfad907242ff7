"""Is it the large batch's gradient, and if it is not, why."""
