"""A run among processes, nodes and jobs: who has the run directory, who is alive, how ranks meet; SLURM."""
