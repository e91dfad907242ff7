"""How much memory there is, how much a step takes, and what to do when it ends."""
