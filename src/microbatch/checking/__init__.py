"""Is it the large batch's gradient, and if not, why."""
