"""What a step costs, in calls, seconds and memory."""
