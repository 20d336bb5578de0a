"""The members of fastens' demo: weights and nothing else."""
