"""Every parser that is tried, by room."""

from tests.fuzz.targets import runs, told, weights, wire

TARGETS = (*wire.TARGETS, *weights.TARGETS, *runs.TARGETS, *told.TARGETS)
