"""What user code imports: exactly these names, cheaply, and without what only `dtrain train` needs."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import dtrain

NAMES = [
    "GradScaler",
    "Members",
    "Trainer",
    "__version__",
    "attach",
    "co2",
    "delayed_diloco",
    "dgc",
    "diloco",
    "eager_diloco",
    "every_step",
    "fedavg_m",
    "fedkseed",
    "ferret",
    "load",
    "local_sgd",
    "local_update",
    "muloco",
    "one_byte",
    "onebit_adam",
    "post_local_sgd",
    "scaffold_m",
    "simulate",
    "slowmo",
    "sparta",
    "streaming_diloco",
]
FOR_TRAINING_ONLY = {"hydra", "omegaconf", "antlr4", "yaml", "rich", "safetensors", "tensorboard"}
NOT_FOR_THE_HOOKS = FOR_TRAINING_ONLY | {
    "submitit",
    "deepspeed",
    "mpi4py",
    "tokenizers",
    "pyroute2",
    "transformers",
    "peft",
}


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after the code."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    # Without a site's .pth files: what they import has nothing to do with us. The paths then come from here.
    paths = f"import sys; sys.path[:0] = {sys.path!r}\n"
    done = subprocess.run([sys.executable, "-S", "-c", paths + script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_public_names_are_exactly_these() -> None:
    assert dtrain.__all__ == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_can_be_imported_and_says_what_it_is(name: str) -> None:
    value = getattr(dtrain, name)
    if name != "__version__":
        assert callable(value) and value.__module__.startswith("dtrain.")
        assert inspect.getdoc(value), f"{name} has no docstring"


@pytest.mark.parametrize("name", [name for name in NAMES if name != "__version__"])
def test_no_public_signature_says_any(name: str) -> None:
    called = getattr(dtrain, name)
    hints = getattr(called.__init__ if inspect.isclass(called) else called, "__annotations__", {})
    assert hints and not any("Any" in str(hint) for hint in hints.values())


def test_type_checkers_see_the_names_that_the_interpreter_loads() -> None:
    tree = ast.parse(Path(dtrain.__file__).read_text())
    (seen,) = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in seen.body if isinstance(node, ast.ImportFrom)]
    assert {alias.name: node.module for node in imports for alias in node.names} == dtrain._HOME
    assert sorted(dtrain._HOME) == [name for name in NAMES if name != "__version__"]


def test_dir_lists_the_names_before_they_are_loaded() -> None:
    assert set(NAMES) <= set(dir(dtrain))


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'every_stepp'"):
        getattr(dtrain, "every_stepp")  # noqa: B009 - mypy knows that it is not there


@pytest.mark.processes
def test_importing_dtrain_costs_nothing() -> None:
    heavy = {"torch", "numpy"} | NOT_FOR_THE_HOOKS
    assert not loaded_by("import dtrain; dtrain.__version__") & heavy


@pytest.mark.processes
def test_a_user_of_the_hooks_imports_torch_and_nothing_of_the_command() -> None:
    loaded = loaded_by("from dtrain import " + ", ".join(NAMES))
    assert "torch" in loaded and not loaded & NOT_FOR_THE_HOOKS


@pytest.mark.processes
def test_the_help_of_the_command_needs_no_torch() -> None:
    assert not loaded_by("import dtrain.cli.main; dtrain.cli.main._parser()") & ({"torch"} | NOT_FOR_THE_HOOKS)
