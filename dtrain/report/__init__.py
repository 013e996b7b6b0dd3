"""A run's output for people: a progress line, a closing summary, and a record of where it ran."""
