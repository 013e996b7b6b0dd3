"""Aggregators: how combined. A rule makes one row of all ranks' rows."""
