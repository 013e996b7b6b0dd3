"""The examples in the docstrings do what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import dtrain

ROOT = Path(next(iter(dtrain.__path__)))


def modules_with_examples() -> list[str]:
    names = []
    for path in sorted(file for folder in (ROOT, ROOT / "comm") for file in folder.rglob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        if any(">>>" in line and "doctest: +SKIP" not in line for line in lines):
            relative = path.relative_to(ROOT).with_suffix("")
            names.append(".".join(("dtrain", *(part for part in relative.parts if part != "__init__"))))
    return sorted(set(names))


STARTS_PROCESSES = "dtrain.testing.workers"
PARAMETERS = [
    pytest.param(name, marks=[pytest.mark.processes] if name == STARTS_PROCESSES else [])
    for name in modules_with_examples()
]


@pytest.mark.parametrize("name", PARAMETERS)
def test_examples(name: str) -> None:
    failed, attempted = doctest.testmod(importlib.import_module(name), verbose=False)
    assert attempted > 0 and failed == 0


def test_all_of_comm_is_searched() -> None:
    assert {"dtrain.comm.ops", "dtrain.comm.feedback", "dtrain.comm.methods.diloco"} <= set(modules_with_examples())
