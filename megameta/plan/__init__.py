"""What a layout costs, before anything runs: memory, traffic, time; the planner; what ``config check`` shows."""
