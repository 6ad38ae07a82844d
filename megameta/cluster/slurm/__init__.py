"""Jobs on a SLURM cluster: what a batch script asks of the package. docs/slurm.md shows it in use."""
