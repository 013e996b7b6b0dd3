"""What a run tells people: one line while it runs, a closing summary, and a record of where it ran."""
