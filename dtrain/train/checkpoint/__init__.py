"""Engine-independent checkpoints: crash-safe to write, readable on any mesh.

`write` (all ranks), `newest` and `load` (resume), `export` and `digest` (what a run leaves behind).
"""

from dtrain.train.checkpoint.export import digest, export, full_parameters
from dtrain.train.checkpoint.manifest import Manifest, RankFile, read_manifest
from dtrain.train.checkpoint.read import load, newest, verify
from dtrain.train.checkpoint.state import Kind, Placement, RankState
from dtrain.train.checkpoint.write import RANK0_STAGES, STAGES, prune, write

__all__ = [
    "RANK0_STAGES",
    "STAGES",
    "Kind",
    "Manifest",
    "Placement",
    "RankFile",
    "RankState",
    "digest",
    "export",
    "full_parameters",
    "load",
    "newest",
    "prune",
    "read_manifest",
    "verify",
    "write",
]
