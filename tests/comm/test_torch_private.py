"""The installed torch has every private name that dtrain uses, all of them in one file; one that it lacks is told."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.agent.server.api import SimpleElasticAgent
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from dtrain.comm import torch_private
from dtrain.comm.torch_private import C10D, MESH_INFOS, NAMES, NEWER_NAMES, ZEROS_OF_UNUSED
from dtrain.testing import WorkerPool

ROOT = Path(__file__).parents[2]
OURS = ("_get", "_set")
GONE = "see what has taken its place, and change comm/torch_private.py, where alone it is used"

OF_OTHERS = {
    "comm/torch_private.py": "the one file",
    "comm/adapters/dcp_parts.py": "the unpickler of the standard library that is written in Python",
    "comm/adapters/zero.py": "DeepSpeed's",
    "dtrain/cli/__init__.py": "argparse's",
    "dtrain/integrations/accelerate.py": "Accelerate's",
    "dtrain/integrations/hf.py": "Accelerate's",
    "dtrain/integrations/lightning.py": "Lightning's",
    "dtrain/testing/_loaded.py": "imports torch._dynamo early, which later imports would take seconds for",
    "dtrain/train/config/targets.py": "typing's",
    "launchers/elastic_agent.py": "overrides torch's elastic agent; launchers import nothing of ours, see ELASTIC",
    "launchers/probe.py": "torch's flight recorder, which may be missing; sys._current_frames",
    "launchers/slurm/launcher.py": "submitit's",
}
"""Where private names that are not ours stand besides, and whose they are."""
ELASTIC = ("_monitor_workers", "_pcontext", "_rdzv_handler", "_remaining_restarts", "_start_workers")


def owners() -> dict[str, object]:
    """Something that has the names, for each entry of `NAMES`: of models that have been forward and back."""
    model: Any = nn.Sequential(nn.Linear(3, 2))
    fully_shard(model, mesh=init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard")))
    model(torch.ones(1, 3)).sum().backward()
    state = model._get_fsdp_state()
    group = state._fsdp_param_group
    c10d: Any = importlib.import_module(C10D)
    plain = nn.Linear(2, 2)
    optimizer: Any = torch.optim.SGD(plain.parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it warns of torch.jit
        in_backward: Any = importlib.import_module("torch.distributed.optim")
    in_backward._apply_optimizer_in_backward(torch.optim.SGD, plain.parameters(), {"lr": 0.1})
    options: Any = torch_private.ProcessGroupGloo._Options  # type: ignore[attr-defined]
    found: dict[str, object] = {
        "FSDPModule": model, "FSDPState": state, "FSDPStateContext": state._state_ctx, "FSDPParamGroup": group,
        "FSDPParam": group.fsdp_params[0], "DTensor": group.fsdp_params[0].sharded_param,
        "HSDPMeshInfo": group.mesh_info, "torch.autograd.Variable": torch.autograd.Variable,
        "DistributedDataParallel": DistributedDataParallel(nn.Linear(2, 2)), "World": c10d._world,
        "ProcessGroup": dist.group.WORLD, "ProcessGroupGloo": torch_private.ProcessGroupGloo,
        "ProcessGroupGloo.Options": options(), "Optimizer": optimizer, "Optimizer.step": optimizer.step,
        "OpOverload": torch.ops.aten.add.Tensor, "torch.ops.aten": torch.ops.aten,
        "Parameter": plain.weight, "Tensor": torch.ones(1), "Module": plain,
    }  # fmt: skip
    return found | {label: importlib.import_module(label) for label in {*NAMES, *NEWER_NAMES} - set(found)}


def lacking() -> list[str]:
    """Of all names, those of newer versions among them."""
    found = owners()
    listed = [(label, name) for names in (NAMES, NEWER_NAMES) for label in names for name in names[label]]
    return [f"{label}.{name}" for label, name in listed if not hasattr(found[label], name)]


@pytest.fixture(scope="module")
def missing(pool: WorkerPool) -> list[str]:
    return pool.run(lacking, world=1)[0]


@pytest.mark.processes
@pytest.mark.parametrize("name", [f"{label}.{name}" for label, names in NAMES.items() for name in names])
def test_this_torch_has(missing: list[str], name: str) -> None:
    assert name not in missing, f"torch {torch.__version__} has no {name}: {GONE}"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "public"),
    [
        ("HSDPMeshInfo.is_spmd_mesh", "dp_mesh_dims" in inspect.signature(fully_shard).parameters),
        (
            "HSDPMeshInfo.reduce_scatter_process_group",
            hasattr(FSDPModule, "set_separate_reduce_scatter_group"),
        ),
        ("FSDPState._fsdp_param_groups", hasattr(importlib.import_module(MESH_INFOS), "ShardPlacementResult")),
    ],
)
def test_this_torch_has_what_its_public_functions_set(missing: list[str], name: str, public: bool) -> None:
    assert (name not in missing) == public, f"torch {torch.__version__} and {name}: {GONE}"


@pytest.mark.parametrize("name", ELASTIC)
def test_the_elastic_agent_of_this_torch_has(name: str) -> None:
    functions = [f for owner in (SimpleElasticAgent, LocalElasticAgent) for f in vars(owner).values() if callable(f)]
    used = {word for f in functions if hasattr(f, "__code__") for word in f.__code__.co_names}
    assert hasattr(LocalElasticAgent, name) or name in used, (
        f"torch {torch.__version__} has no {name} in its elastic agent: see what has taken its place, and change "
        "launchers/elastic_agent.py"
    )


def test_zeros_of_unused_parameters_are_asked_for_where_torch_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    class New:
        def set_reduce_scatter_unused_params(self, wanted: bool) -> None:
            asked.append(wanted)

    class Old: ...

    for wanted in (True, False):
        torch_private.zeros_of_unused(New(), wanted)  # type: ignore[arg-type]
    torch_private.zeros_of_unused(Old(), False)  # type: ignore[arg-type]
    assert asked == [True, False]
    with pytest.raises(RuntimeError, match=rf"torch {re.escape(torch.__version__)} has no {ZEROS_OF_UNUSED}.*unit of"):
        torch_private.zeros_of_unused(Old(), True)  # type: ignore[arg-type]
    monkeypatch.setattr(FSDPModule, ZEROS_OF_UNUSED, None, raising=False)
    assert f"or call {ZEROS_OF_UNUSED}(True)" in torch_private.without_zeros_of_unused()
    monkeypatch.delattr(FSDPModule, ZEROS_OF_UNUSED)
    assert "a newer torch can" in torch_private.without_zeros_of_unused()


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
    calls = list(_calls(ROOT / "comm/torch_private.py"))
    used = {name for function, name in calls if function in OURS}
    # Marks that only schedulers and _apply_optimizer_in_backward set; what is imported at the head of the file.
    marks = {"_in_backward_optimizers", "_opt_called", "_wrapped_by_lr_sched"}
    newer = {name for function, name in calls if function == "_newer"} | {ZEROS_OF_UNUSED}
    assert (used - newer) | marks == {name for names in NAMES.values() for name in names}
    assert newer == {name for names in NEWER_NAMES.values() for name in names}


# ---- nowhere else ----------------------------------------------------------------------------------------------------


def _files() -> list[Path]:
    links = {"comm", "launchers", "configs", "slurm"}
    dtrain = [path for path in (ROOT / "dtrain").iterdir() if path.name not in links]
    folders = [ROOT / "comm", ROOT / "launchers", *(path for path in dtrain if path.is_dir())]
    return sorted([*(p for p in dtrain if p.suffix == ".py"), *(p for f in folders for p in f.rglob("*.py"))])


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


@cache
def _defined() -> frozenset[str]:
    """Private names of our own: functions, classes, variables, fields."""
    names: set[str] = set()
    for path in _files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names |= {node.attr} if ast.unparse(node.value) in ("self", "cls") else set()
    return frozenset(names)


def _private_of_others(path: Path) -> set[str]:
    """Private names that nothing of ours defines, and private modules of torch."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and ast.unparse(node.value) != "os":
            found |= {node.attr} - _defined()
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and _is_private(str(name.value)):
                found |= {str(name.value)} - _defined()
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names if "._" in f"{node.module}.{alias.name}"}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("torch") and "._" in alias.name}
    return found


def test_private_names_are_seen(tmp_path: Path) -> None:
    imports = "import torch._strange\nfrom torch.nn import _odd\n"
    (tmp_path / "a.py").write_text(imports + "os._exit(1)\nmodel._queer.x\ngetattr(a, '_rare')\na.__doc__\n")
    assert _private_of_others(tmp_path / "a.py") == {"torch._strange", "torch.nn._odd", "_queer", "_rare"}


def test_private_names_of_torch_stand_nowhere_else() -> None:
    found = {str(path.relative_to(ROOT)): _private_of_others(path) for path in _files()}
    wrong = {name: private for name, private in found.items() if private and name not in OF_OTHERS}
    assert wrong == {}, "each behind a function of comm/torch_private.py, and in its NAMES"
    assert [name for name in OF_OTHERS if not found[name]] == [], "these need the permission no longer"
