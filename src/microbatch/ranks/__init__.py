"""Who else holds a share of the batch: agree on what is in the window, then reduce once."""
