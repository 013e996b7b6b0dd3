"""Aggregators: rules that combine all ranks' rows into one."""
