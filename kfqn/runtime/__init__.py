"""Processes that train together, work that a GPU repeats, and what an optimizer tells of itself."""
