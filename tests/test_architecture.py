"""The rules of the house that a program can check: who imports whom, how large things may be, what the folders are.

A budget that does not fit is a sign that something needs to be cut in two; raising the budget is not the way out.
"""

from __future__ import annotations

import ast
import fnmatch
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture import Architecture

ROOT = Path(__file__).resolve().parent.parent
LINKS = ("comm", "launchers", "configs", "slurm")

FILE_LINES, TEST_FILE_LINES, FUNCTION_LINES, CONSTRUCTOR_PARAMETERS, PUBLIC_METHODS = 600, 600, 60, 7, 15

TOUCH_TORCH_DISTRIBUTED = {
    "comm/transports/*.py": "carry the ops of flows",
    "comm/channel.py": "performs the collectives that algorithms only describe",
    "comm/attach.py": "finds the process group of a model",
    "comm/runtime/membership/*.py": "replicas that come and go meet in a store and make their own groups",
    "comm/torch_private.py": "asks torch for what has no public name",
    "comm/adapters/*.py": "they adapt models that hold process groups, meshes and DTensors",
    "dtrain/bench/*.py": "measure torch's collectives beside our own",
    "dtrain/integrations/*.py": "trainers of others run in the default process group",
    "dtrain/train/mesh.py": "makes the process groups of a run",
    "dtrain/train/engines/*.py": "wrap models in DDP, FSDP2 and DeepSpeed, which own the shard axis",
    "dtrain/train/worker.py": "joins and leaves the default process group",
    "dtrain/train/process_group.py": "joins and leaves one where the calling program has none; makes its models equal",
    "dtrain/train/checkpoint_choice.py": "rank 0's choice goes to all ranks before there is a mesh to send it over",
    "dtrain/testing/*.py": "make the process groups of tests",
    "launchers/rendezvous.py": "serves the store where ranks of one machine meet; no collective is called there",
    "launchers/elastic_agent.py": "torch.distributed.elastic starts the workers; no collective is called there",
}
"""Files that may name torch.distributed at all, and why. All others are pure, and are tested without processes."""


@functools.cache
def _files() -> tuple[str, ...]:
    """Every Python file of ours, once: the real folders, not the links to them."""
    found: list[str] = []
    for top in ("comm", "launchers", "slurm", "dtrain", "benchmarks", "tests", "examples"):
        for folder, _, names in os.walk(ROOT / top):  # does not follow links to folders
            found += [str((Path(folder) / name).relative_to(ROOT)) for name in names if name.endswith(".py")]
    return tuple(sorted(found))


@functools.cache
def _tree(name: str) -> ast.Module:
    return ast.parse((ROOT / name).read_text(), name)


def _imports(tree: ast.AST) -> Iterator[str]:
    """The dotted names that are imported anywhere below, under TYPE_CHECKING and within functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _at_module_level(tree: ast.Module) -> ast.Module:
    """What runs when the module is imported: no function bodies, nothing under TYPE_CHECKING."""

    class Cut(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None: ...

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None: ...

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Cut().visit(ast.parse(ast.unparse(tree)))  # type: ignore[no-any-return]  # a Module stays one


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _in(*tops: str) -> list[str]:
    return [name for name in _files() if name.startswith(tuple(f"{top}/" for top in tops))]


def _body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from ``def`` to the end, without the docstring; decorators are no part of it."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
    return lines


def _is_record(owner: ast.ClassDef) -> bool:
    """Frozen dataclasses hold values and do nothing: their size is that of what they describe."""
    return any("dataclass" in (said := ast.unparse(d)) and "frozen=True" in said for d in owner.decorator_list)


def _constructor_parameters(owner: ast.ClassDef) -> int:
    """Parameters besides ``self`` of ``__init__`` or ``__new__``, or those that a dataclass makes of its fields."""
    for member in owner.body:
        if isinstance(member, ast.FunctionDef) and member.name in ("__init__", "__new__"):
            taken = member.args
            named = len(taken.posonlyargs) + len(taken.args) + len(taken.kwonlyargs) - 1
            return named + (taken.vararg is not None) + (taken.kwarg is not None)
    if not any("dataclass" in ast.unparse(decorator) for decorator in owner.decorator_list):
        return 0
    fields = [member for member in owner.body if isinstance(member, ast.AnnAssign)]
    return sum("ClassVar" not in ast.unparse(f.annotation) and "init=False" not in ast.unparse(f) for f in fields)


# ---- the eyes of these tests ---------------------------------------------------------------------------------------


def test_imports_are_seen_wherever_they_stand() -> None:
    tree = ast.parse("import a.b\nif TYPE_CHECKING:\n    from c import d\ndef f():\n    import e\n")
    assert list(_imports(tree)) == ["a.b", "c.d", "e"]
    assert list(_imports(_at_module_level(tree))) == ["a.b"]


def test_a_function_is_as_long_as_it_is_without_its_docstring() -> None:
    (function,) = ast.parse('@cache\ndef f(\n    x,\n):\n    """One\n\n    two."""\n    return x\n').body
    assert isinstance(function, ast.FunctionDef) and _body_lines(function) == 4


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("class A:\n    def __init__(self, a, /, b, *c, d, **e): ...", 5),
        ("class A:\n    a: int", 0),
        (
            "@dataclass\nclass A:\n    a: int\n    b: int = field(init=False)\n    c: ClassVar[int]\n    d: int = 2",
            2,
        ),
    ],
)
def test_parameters_of_constructors_are_counted(source: str, count: int) -> None:
    (owner,) = ast.parse(source).body
    assert isinstance(owner, ast.ClassDef) and _constructor_parameters(owner) == count


# ---- who imports whom ----------------------------------------------------------------------------------------------


def test_comm_imports_nothing_of_ours_outside_of_comm() -> None:
    wrong = [
        f"{name} imports {imported}"
        for name in _in("comm")
        for imported in _imports(_tree(name))
        if _within(imported, "dtrain") and not _within(imported, "dtrain.comm")
    ]
    assert wrong == []


def test_comm_imports_torch_and_the_standard_library_only() -> None:
    import sys

    # One file each for what is neither; a user of anything else in comm needs none of them.
    others = {
        "deepspeed": "comm/adapters/zero.py",
        "mpi4py": "comm/transports/mpi.py",
        "zstandard": "comm/compressors/lossless.py",
    }
    wrong = [
        f"{name} imports {imported}"
        for name in _in("comm")
        for imported in _imports(_tree(name))
        if (top := imported.partition(".")[0]) not in sys.stdlib_module_names | {"torch", "dtrain"}
        and others.get(top) != name
    ]
    assert wrong == []


def test_launchers_import_nothing_of_ours_outside_of_launchers() -> None:
    wrong = [
        f"{name} imports {imported}"
        for name in _in("launchers")
        for imported in _imports(_tree(name))
        if _within(imported, "dtrain") and not _within(imported, "dtrain.launchers")
    ]
    assert wrong == []


def test_the_cluster_on_one_machine_imports_nothing_of_ours_outside_of_slurm() -> None:
    wrong = [
        f"{name} imports {imported}"
        for name in _in("slurm")
        for imported in _imports(_tree(name))
        if _within(imported, "dtrain")
        and not (_within(imported, "dtrain.slurm") or imported == "dtrain.launchers.environment.CLUSTER")
    ]
    assert wrong == []


def test_launchers_import_no_torch_at_module_level() -> None:
    wrong = [
        f"{name} imports {imported}"
        for name in _in("launchers")
        for imported in _imports(_at_module_level(_tree(name)))
        if _within(imported, "torch")
    ]
    assert wrong == []


def _touches_torch_distributed(name: str) -> bool:
    attributes = (ast.unparse(node) for node in ast.walk(_tree(name)) if isinstance(node, ast.Attribute))
    return any(
        _within(used, "torch.distributed") or used.startswith("torch._C._distributed")
        for used in [*_imports(_tree(name)), *attributes]
    )


def test_only_the_edges_touch_torch_distributed() -> None:
    touching = [name for name in _in("comm", "launchers", "slurm", "dtrain") if _touches_torch_distributed(name)]
    assert [name for name in touching if not any(fnmatch.fnmatch(name, p) for p in TOUCH_TORCH_DISTRIBUTED)] == []
    idle = [pattern for pattern in TOUCH_TORCH_DISTRIBUTED if not fnmatch.filter(touching, pattern)]
    assert idle == [], "these need the permission no longer"


def test_what_training_does_not_need_is_not_imported_by_what_trains() -> None:
    # A test helper in the product would bring pytest or hypothesis with it.
    wrong = [
        f"{name} imports {imported}"
        for name in _in("comm", "launchers", "slurm", "dtrain")
        for imported in _imports(_tree(name))
        if imported.partition(".")[0] in ("pytest", "hypothesis", "tests", "comm", "launchers", "slurm")
    ]
    assert wrong == []


def test_benchmarks_are_imported_by_themselves_and_their_tests_alone() -> None:
    wrong = [
        f"{name} imports {imported}"
        for name in _files()
        if not name.startswith(("benchmarks/", "tests/benchmarks/"))
        for imported in _imports(_tree(name))
        if _within(imported, "benchmarks")
    ]
    assert wrong == []


# ---- budgets -------------------------------------------------------------------------------------------------------


def test_files_are_within_their_budget() -> None:
    sizes = {name: len((ROOT / name).read_text().splitlines()) for name in _files()}
    allowed = {name: TEST_FILE_LINES if name.startswith("tests/") else FILE_LINES for name in sizes}
    assert {name: lines for name, lines in sizes.items() if lines > allowed[name]} == {}


def test_functions_are_within_their_budget() -> None:
    functions = (
        (f"{name}:{node.lineno} {node.name}", _body_lines(node))
        for name in _files()
        for node in ast.walk(_tree(name))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    assert {where: lines for where, lines in functions if lines > FUNCTION_LINES} == {}


def _classes() -> Iterator[tuple[str, ast.ClassDef]]:
    for name in _files():
        for node in ast.walk(_tree(name)):
            if isinstance(node, ast.ClassDef):
                yield f"{name}:{node.lineno} {node.name}", node


def test_constructors_are_within_their_budget() -> None:
    taken = {where: _constructor_parameters(owner) for where, owner in _classes() if not _is_record(owner)}
    assert {where: count for where, count in taken.items() if count > CONSTRUCTOR_PARAMETERS} == {}


def _is_property(method: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator) == "property" for decorator in method.decorator_list)


def test_classes_are_within_their_budget() -> None:
    public = {
        where: sum(
            isinstance(m, ast.FunctionDef) and not m.name.startswith("_") and not _is_property(m) for m in owner.body
        )
        for where, owner in _classes()
    }
    assert {where: count for where, count in public.items() if count > PUBLIC_METHODS} == {}


# ---- coupling ------------------------------------------------------------------------------------------------------

FAN_OUT, DEPTH = 15, 2
WIDER = {
    "dtrain/cli/bench.py": 18, "dtrain/train/worker.py": 17,
}  # fmt: skip
"""Modules that import more of ours, and how many at most. This and what follows gets shorter, never longer."""
DEEPER: set[str] = set()
"""Classes whose parent inherits, too."""
ASKED: set[str] = set()
"""Where somebody asks whether a value is of a concrete class of another module."""
IN_CIRCLES: set[str] = set()
"""Modules that import each other, within functions too."""


@functools.cache
def _coupling() -> Architecture:
    return Architecture(ROOT)


def test_no_module_imports_too_many_others() -> None:
    """What imports much knows much: cut it at an idea, or hand it what it needs."""
    fan_out = _coupling().fan_out()
    assert {path: count for path, count in fan_out.items() if count > WIDER.get(path, FAN_OUT)} == {}


def test_inheritance_is_two_deep() -> None:
    """A third one overrides the inside of the second: put the parts together by a function instead."""
    lines = _coupling().lines_of_inheritance()
    deep = {name: line for name, line in lines.items() if len(line) > DEPTH}
    assert {name: line for name, line in deep.items() if name.rpartition(".")[2] not in DEEPER} == {}


def test_nobody_asks_for_a_concrete_class() -> None:
    """Ask a value what it can do: an attribute of its Protocol says so."""
    assert [str(question) for question in _coupling().questions() if question.what not in ASKED] == []


def test_no_modules_import_each_other() -> None:
    assert [circle for circle in _coupling().circles() if not set(circle) <= IN_CIRCLES] == []


def test_coupling_is_counted(tmp_path: Path) -> None:
    """The eyes of the four above."""
    files = {
        "comm/a.py": "from typing import Protocol\nclass A: ...\nclass P(Protocol): ...\nclass E(ValueError): ...\n",
        "comm/b.py": "from dtrain.comm.a import A\nfrom dtrain.comm import c\nclass B(A): ...\nclass Q(E): ...\n",
        "comm/c.py": "from dtrain.comm.b import B as Other\nclass C(Other[int]): ...\n",
        "dtrain/__init__.py": "from dtrain.comm.a import A, P\n",
        "dtrain/d.py": "import dtrain\ndef f(x):\n    from dtrain import A, P\n    isinstance(x, A | int)\n"
        "    isinstance(x, P)\n    isinstance(x, (str, dtrain.A))\n    match x:\n        case A(): ...\n"
        "if TYPE_CHECKING:\n    from dtrain.comm import c\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    coupling = Architecture(tmp_path)
    assert coupling.fan_out() == {
        "comm/a.py": 0, "comm/b.py": 2, "comm/c.py": 1, "dtrain/__init__.py": 1, "dtrain/d.py": 1,
    }  # fmt: skip
    assert coupling.circles() == [["dtrain.comm.b", "dtrain.comm.c"]]
    assert {name.rpartition(".")[2]: len(line) for name, line in coupling.lines_of_inheritance().items()} == {
        "A": 1, "P": 0, "B": 2, "Q": 1, "C": 3,
    }  # fmt: skip
    assert [str(question) for question in coupling.questions()] == [
        "dtrain/d.py A, line 4", "dtrain/d.py A, line 6", "dtrain/d.py A, line 8",
    ]  # fmt: skip


# ---- folders and names ---------------------------------------------------------------------------------------------


def test_every_module_says_what_it_is() -> None:
    assert [name for name in _files() if not ast.get_docstring(_tree(name))] == []


def test_no_file_is_named_for_being_a_heap() -> None:
    heaps = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
    assert [name for name in _files() if Path(name).name in heaps] == []


@pytest.mark.parametrize("name", LINKS)
def test_the_links_are_relative_links_to_real_folders(name: str) -> None:
    link, real = ROOT / "dtrain" / name, ROOT / name
    assert link.is_symlink() and os.readlink(link) == f"../{name}"
    assert real.is_dir() and not real.is_symlink()


@pytest.mark.parametrize("name", LINKS)
def test_no_top_level_package_shadows_anybody_elses(name: str) -> None:
    # With an __init__.py, pytest and mypy would import comm/ under the name `comm`, which is Jupyter's.
    assert not (ROOT / name / "__init__.py").exists()


@pytest.mark.parametrize("name", ["dtrain.comm.ops", "dtrain.launchers.elastic_agent"])
def test_what_lies_behind_the_links_is_imported_under_our_name_only(name: str) -> None:
    import importlib
    import sys

    module = importlib.import_module(name)
    assert module.__name__ == name and name.removeprefix("dtrain.") not in sys.modules
