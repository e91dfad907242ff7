"""Memory: how much is available, how much a window takes, and how to free it or recover when it runs out."""
