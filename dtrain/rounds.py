"""Lengths of rounds that change: what a local update takes as ``every_steps`` in place of a number.

``diloco(every_steps=power(steps=1000, rounds=140, power=1.5))``.
"""

from dtrain.comm.runtime.round_lengths import RoundLengths, lengths, power, qsr

__all__ = ["RoundLengths", "lengths", "power", "qsr"]
