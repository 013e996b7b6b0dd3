"""The installed torch has every private name that adapters use, and a name that it lacks is told."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dtrain.comm.adapters import torch_private
from dtrain.comm.adapters.torch_private import NAMES
from dtrain.testing import WorkerPool

ADAPTERS = Path(torch_private.__file__).parent
OURS = ("_get", "_set")


def owners() -> dict[str, object]:
    """Something that has the names, for each entry of `NAMES`: of a model that has been forward and back."""
    model: Any = nn.Sequential(nn.Linear(3, 2))
    fully_shard(model, mesh=init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard")))
    model(torch.ones(1, 3)).sum().backward()
    state = model._get_fsdp_state()
    group = state._fsdp_param_group
    found: dict[str, object] = {
        "FSDPModule": model, "FSDPState": state, "FSDPStateContext": state._state_ctx, "FSDPParamGroup": group,
        "FSDPParam": group.fsdp_params[0], "DTensor": group.fsdp_params[0].sharded_param,
        "HSDPMeshInfo": group.mesh_info, "torch.autograd.Variable": torch.autograd.Variable,
    }  # fmt: skip
    return found | {label: importlib.import_module(label) for label in set(NAMES) - set(found)}


def lacking() -> list[str]:
    return [f"{label}.{name}" for label, owner in owners().items() for name in NAMES[label] if not hasattr(owner, name)]


@pytest.fixture(scope="module")
def missing(pool: WorkerPool) -> list[str]:
    return pool.run(lacking, world=1)[0]


@pytest.mark.processes
@pytest.mark.parametrize("name", [f"{label}.{name}" for label, names in NAMES.items() for name in names])
def test_this_torch_has(missing: list[str], name: str) -> None:
    assert name not in missing, (
        f"torch {torch.__version__} has no {name}: see what has taken its place, and change "
        "comm/adapters/torch_private.py, where alone it is used"
    )


def test_a_name_that_is_missing_is_told_and_never_made() -> None:
    owner = nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match=re.escape(f"torch {torch.__version__} has no _gone in its Linear")):
        torch_private._get(owner, "_gone")
    with pytest.raises(RuntimeError, match=r"torch_private\.py"):
        torch_private._set(owner, "_gone", 1)
    assert not hasattr(owner, "_gone")


def _calls(path: Path) -> Iterator[tuple[str, str]]:
    """Functions called with a literal as their second argument, and that literal."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            name = node.args[1]
            if isinstance(name, ast.Constant):
                yield node.func.id, str(name.value)


def test_the_list_is_whole() -> None:
    used = {name for function, name in _calls(ADAPTERS / "torch_private.py") if function in OURS}
    listed = {name for names in NAMES.values() for name in names}
    assert used - {"_fsdp_param_groups"} == listed


@pytest.mark.parametrize("path", [*sorted(ADAPTERS.glob("fsdp*.py")), ADAPTERS / "grid.py"], ids=lambda path: path.stem)
def test_the_fsdp2_adapter_uses_private_names_nowhere_else(path: Path) -> None:
    tree = ast.parse(path.read_text())
    private = {
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
        if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    }
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not private
    assert not [module for module in modules if module.startswith("torch") and "._" in module]
