"""What kfqn costs and what it claims, each as a program: `python -m benchmarks.cost.step_time`."""
