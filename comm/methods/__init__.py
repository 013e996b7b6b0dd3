"""Schedules: when, and what. `sync.py` has the Protocols; every other file is one method of the literature."""
