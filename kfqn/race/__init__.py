"""Optimizers raced on real images: problems, entrants, runs, reports, the paper's figures and tables."""
