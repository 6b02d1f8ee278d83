"""Optimizers raced on real images: problems, runs, figures, tables, and the command line."""
