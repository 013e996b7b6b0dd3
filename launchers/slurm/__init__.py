"""Jobs under Slurm: sbatch text as a pure function of settings, submission by submitit, state without sacct."""
