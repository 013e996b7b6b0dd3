"""Compressors: how small. One file for each family; `base.py` says what every one of them declares."""
