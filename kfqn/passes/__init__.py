"""Watched passes through the model, and passes that leave no trace in it."""
