"""Is this machine, or every node of an allocation, fit for training? Checks with a way out for each problem."""
