"""Every parser that is tried, by room."""

from tests.fuzz.targets import runs, weights, wire

TARGETS = (*wire.TARGETS, *weights.TARGETS, *runs.TARGETS)
