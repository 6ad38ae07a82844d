"""A run: its loop, data, evaluation, records and checkpoints; one process that evaluates; longer windows."""
