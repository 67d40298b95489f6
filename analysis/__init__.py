"""Analysis of thoughts: `python -m analysis`."""
