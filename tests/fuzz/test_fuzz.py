"""A short run of every parser over damaged inputs; ``make fuzz`` is the long one. And the harness's own eyes."""

from __future__ import annotations

import json
import random
import time

import pytest

from tests.fuzz import harness
from tests.fuzz.damage import damaged, damaged_json
from tests.fuzz.harness import Case, Target, run
from tests.fuzz.targets import TARGETS

INPUTS = 60


@pytest.mark.processes
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_what_is_damaged_is_refused_in_words_or_read_as_what_it_is(target: Target) -> None:
    counts = run(target, INPUTS, seed=1)
    assert counts.inputs == INPUTS and not counts.failures, "\n".join(counts.examples)


def _target(read: object) -> Target:
    def check(found: object, intact: bool) -> None:
        assert found == {"a": 1}

    return Target("t", lambda folder: Case(b'{"a": 1}', read, (ValueError,), check, json=True))  # type: ignore[arg-type]


@pytest.mark.processes
def test_a_traceback_a_changed_value_and_a_dead_process_are_failures() -> None:
    counts = run(_target(json.loads), 60)
    assert any(place.startswith("AssertionError") for place in counts.failures)

    def dies(data: bytes) -> object:
        import os

        if data[:1] != b"{":
            os._exit(9)
        return {"a": 1}

    counts = run(_target(dies), 30)
    assert counts.failures["the process ended with status 9"] > 0 and counts.inputs == 30


@pytest.mark.processes
def test_memory_and_time_have_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(data: bytes) -> object:
        if data != b'{"a": 1}':
            bytearray(600 * 2**20)
        return {"a": 1}

    counts = run(_target(hungry), 20)
    assert any(place.startswith("MemoryError") for place in counts.failures)

    def slow(data: bytes) -> object:
        if data != b'{"a": 1}':
            time.sleep(60)
        return {"a": 1}

    monkeypatch.setattr(harness, "SECONDS", 0.5)
    counts = run(_target(slow), 1)
    assert counts.failures == {"too slow": 1}


def test_damage_is_drawn_from_the_seed_alone() -> None:
    text = b'{"a": [1, 2, {"b": "c"}], "n": 12345}'
    for way in (damaged, damaged_json):
        first = [way(text, random.Random(seed)) for seed in range(50)]
        assert first == [way(text, random.Random(seed)) for seed in range(50)]
        assert len(set(first)) > 30
