"""kfqn in the frameworks that people train with; each module is imported when asked for."""
