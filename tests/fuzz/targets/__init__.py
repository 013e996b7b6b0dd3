"""Every parser that is tried, by room."""

from tests.fuzz.targets import meshes, runs, told, weights, wire

TARGETS = (*wire.TARGETS, *weights.TARGETS, *meshes.TARGETS, *runs.TARGETS, *told.TARGETS)
