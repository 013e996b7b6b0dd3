"""What couples modules of dtrain, counted. ``python -m tests.architecture [FOLDER]`` prints it, of any checkout.

fan-out      modules of ours that a module imports, anywhere in it but for type checkers alone
depth        classes of ours in a line of inheritance; Protocols and exceptions are not counted
isinstance   questions after a concrete class of ours, by `isinstance`, `issubclass` or `match`; not Protocols,
             exceptions, classes of the module that asks, or a closed set (`CLOSED`), whose members all are handled
circles      groups of modules that import each other, within functions too
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TOPS = ("comm", "launchers", "slurm", "dtrain")
ELSEWHERE = ("dtrain/evidence/",)
"""What older revisions have within dtrain, and newer ones beside it."""
CLOSED = ("dtrain.comm.ops",)
"""What a flow yields, which every transport performs: a sum type, told apart by `match`."""


@dataclass
class Module:
    """One file. ``names``: what its imports and definitions mean, by the name that they have in it."""

    name: str
    tree: ast.Module
    path: str
    names: dict[str, str] = field(default_factory=dict)
    imports: set[str] = field(default_factory=set)
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """Somebody asks whether a value is of a concrete class."""

    path: str
    line: int
    classes: tuple[str, ...]

    @property
    def what(self) -> str:
        """Without the line, which changes."""
        return f"{self.path} {', '.join(name.rpartition('.')[2] for name in self.classes)}"

    def __str__(self) -> str:
        return f"{self.what}, line {self.line}"


class Architecture:
    """All modules of the checkout at ``root``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.modules: dict[str, Module] = {}
        for path in _files(root):
            name = _module_name(path)
            self.modules[name] = Module(name, ast.parse((root / path).read_text(), path), path)
        for module in self.modules.values():
            self._read(module)

    # ---- figures ---------------------------------------------------------------------------------------------------

    def fan_out(self) -> dict[str, int]:
        """By path."""
        return {module.path: len(module.imports) for module in self.modules.values()}

    def circles(self) -> list[list[str]]:
        """Each a sorted list of modules."""
        return [sorted(group) for group in _strongly_connected({m.name: m.imports for m in self.modules.values()})]

    def lines_of_inheritance(self) -> dict[str, list[str]]:
        """By class, it and its ancestors of ours, nearest first."""
        return {name: self._line(name) for name, _ in self._classes() if not self._is_exception(name)}

    def questions(self) -> list[Question]:
        """All that are asked, in the order of files."""
        return [question for module in self.modules.values() for question in self._asked(module)]

    # ---- how they are found ----------------------------------------------------------------------------------------

    def _read(self, module: Module) -> None:
        for node in _without_type_checking(module.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    module.names[alias.asname or alias.name.partition(".")[0]] = alias.name
                    module.imports.update(self._nearest(alias.name))
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    module.names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                    module.imports.update(self._nearest(f"{node.module}.{alias.name}"))
            elif isinstance(node, ast.ClassDef):
                module.classes[node.name] = node
                module.names.setdefault(node.name, f"{module.name}.{node.name}")
        module.imports.discard(module.name)

    def _nearest(self, name: str) -> list[str]:
        """The module of ours that ``name`` is, or is in."""
        while name and name not in self.modules:
            name = name.rpartition(".")[0]
        return [name] if name else []

    @functools.cache  # noqa: B019  # as long as the one that there is
    def _resolved(self, name: str, depth: int = 0) -> str:
        """Where what is imported by ``name`` is defined, through modules that hand it on."""
        owner, _, last = name.rpartition(".")
        module = self.modules.get(owner)
        if module is None or depth > 9 or last in module.classes or last not in module.names:
            return name
        return self._resolved(module.names[last], depth + 1)

    def _classes(self) -> Iterator[tuple[str, ast.ClassDef]]:
        for module in self.modules.values():
            for name, node in module.classes.items():
                yield f"{module.name}.{name}", node

    def _class(self, name: str) -> ast.ClassDef | None:
        owner, _, last = name.rpartition(".")
        module = self.modules.get(owner)
        return module.classes.get(last) if module is not None else None

    def _bases(self, name: str) -> list[str]:
        node, module = self._class(name), self.modules.get(name.rpartition(".")[0])
        if node is None or module is None:
            return []
        bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
        return [self._meaning(module, base) for base in bases]

    def _meaning(self, module: Module, node: ast.expr) -> str:
        """The full name of what an expression names."""
        text = ast.unparse(node)
        first, dot, rest = text.partition(".")
        return self._resolved(module.names.get(first, first) + dot + rest)

    def _is_protocol(self, name: str) -> bool:
        return any(base.rpartition(".")[2] == "Protocol" for base in self._bases(name))

    def _is_exception(self, name: str) -> bool:
        bases = self._bases(name)
        return any(base.endswith(("Error", "Exception", "Warning")) or self._is_exception(base) for base in bases)

    def _line(self, name: str) -> list[str]:
        if self._class(name) is None or self._is_protocol(name):
            return []
        return [name, *max((self._line(base) for base in self._bases(name)), key=len, default=[])]

    def _asked(self, module: Module) -> Iterator[Question]:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
                after = _alternatives(node.args[1])
            elif isinstance(node, ast.MatchClass):
                after = [node.cls]
            else:
                continue
            names = [self._meaning(module, expression) for expression in after]
            owners = (module.name, *CLOSED)
            concrete = [name for name in names if self._concrete(name) and name.rpartition(".")[0] not in owners]
            if concrete:
                yield Question(module.path, after[0].lineno, tuple(concrete))

    def _concrete(self, name: str) -> bool:
        return self._class(name) is not None and not self._is_protocol(name) and not self._is_exception(name)


def _files(root: Path) -> Iterator[str]:
    for top in TOPS:
        for path in sorted((root / top).rglob("*.py")):
            name = str(path.relative_to(root))
            linked = any(name.startswith(f"dtrain/{other}/") for other in TOPS)
            if not linked and not name.startswith(ELSEWHERE) and "__pycache__" not in name:
                yield name


def _module_name(path: str) -> str:
    parts = Path(path).with_suffix("").parts
    parts = parts if parts[0] == "dtrain" else ("dtrain", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _without_type_checking(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _without_type_checking(node)


def _alternatives(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp):
        return [*_alternatives(node.left), *_alternatives(node.right)]
    if isinstance(node, ast.Tuple):
        return [expression for element in node.elts for expression in _alternatives(element)]
    return [node]


def _strongly_connected(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of more than one; Tarjan's algorithm."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = lowest[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], index[other])
        if lowest[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                groups.append(group)

    sys.setrecursionlimit(max(sys.getrecursionlimit(), 5000))
    for name in sorted(graph):
        if name not in index:
            visit(name)
    return groups


def table(architecture: Architecture) -> str:
    """The figures, for people."""
    fan_out = architecture.fan_out()
    lines = architecture.lines_of_inheritance()
    questions, circles = architecture.questions(), architecture.circles()
    widest = sorted(fan_out.items(), key=lambda item: -item[1])[:10]
    deepest = max(map(len, lines.values()))
    deep = sorted(name for name, line in lines.items() if len(line) > 2)
    text = [
        f"modules {len(fan_out)}",
        f"fan-out, the largest {max(fan_out.values())}; mean {sum(fan_out.values()) / len(fan_out):.1f}; above 15: "
        f"{sum(count > 15 for count in fan_out.values())}",
        *(f"    {count} {path}" for path, count in widest),
        f"depth of inheritance {deepest}; classes deeper than 2: {len(deep)}",
        *(f"    {' <- '.join(name.rpartition('.')[2] for name in reversed(lines[name]))}" for name in deep),
        f"isinstance on concrete classes of other modules {len(questions)}",
        *(f"    {question}" for question in questions),
        f"import circles {len(circles)}, of {sum(map(len, circles))} modules",
        *(f"    {', '.join(circle)}" for circle in circles),
    ]
    return "\n".join(text)


def main(arguments: Sequence[str]) -> None:
    """Print the figures of a checkout, this one by default."""
    root = Path(arguments[0]) if arguments else Path(__file__).resolve().parents[1]
    print(table(Architecture(root)))


if __name__ == "__main__":
    main(sys.argv[1:])
