"""Measurements that are too long for tests: ``make evidence``, or ``python -m benchmarks [NAME ...]``.

Each name is a report: real runs of the command ``dtrain``, and what they showed, as docs/evidence/NAME.md for people
and NAME.json for figures. A figure that misses its line is printed as MISSED and the exit code is 1; the files are
written all the same. Every figure is read from the runs; the lines are those of the issue.
"""
