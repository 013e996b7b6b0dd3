"""Plans: which compression each parameter gets, and from which step on. A compression alone is the uniform plan."""
