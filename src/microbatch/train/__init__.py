"""Ready-made jobs and the one loop that runs any of them."""
