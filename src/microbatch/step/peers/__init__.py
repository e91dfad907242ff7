"""The other ranks of a window, and all communication with them."""
