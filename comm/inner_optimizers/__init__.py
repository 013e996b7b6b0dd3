"""Inner optimizers that need whole matrices, which some engines cut over the ranks of a replica."""
