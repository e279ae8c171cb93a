"""The fast CPU path: torch's own operators where they fit, Numba where they do not."""
