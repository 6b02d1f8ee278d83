"""What is trained: settings, layers as matrices, parameter groups, and the fallback optimizer."""
