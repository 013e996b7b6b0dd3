"""Marks of tests that need something that the oldest torch of the range has not: skipped there, with the version."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest
import torch
from torch.distributed.fsdp import FSDPModule, fully_shard

from dtrain.comm.torch_private import MESH_INFOS

MUON, UNUSED, MESH_DIMS, PLACED = (
    pytest.mark.skipif(not there, reason=f"{what}: torch {version} or newer, and this is {torch.__version__}")
    for there, what, version in (
        (hasattr(torch.optim, "Muon"), "torch.optim.Muon", "2.9"),
        (hasattr(FSDPModule, "set_reduce_scatter_unused_params"), "set_reduce_scatter_unused_params", "2.13"),
        ("dp_mesh_dims" in inspect.signature(fully_shard).parameters, "fully_shard(dp_mesh_dims=)", "2.12"),
        (hasattr(import_module(MESH_INFOS), "ShardPlacementResult"), "a mesh from shard_placement_fn", "2.12"),
    )
)
