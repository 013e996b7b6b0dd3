"""Aggregators: how combined. A rule takes everybody's rows and gives one."""
