"""What tests/conftest.py does to the list of tests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from tests.conftest import _few


def test_few_cases_are_spread_over_all_of_them_and_no_test_is_left_out() -> None:
    names = ["a.py::one", *(f"a.py::many[{number}]" for number in range(10)), "b.py::two[x]", "b.py::two[y]"]
    items = cast(list[pytest.Item], [SimpleNamespace(nodeid=name) for name in names])
    assert sorted(_few(items, 3)) == sorted(
        ["a.py::one", "a.py::many[0]", "a.py::many[3]", "a.py::many[6]", "b.py::two[x]", "b.py::two[y]"]
    )
    assert _few(items, 10) == set(names)
