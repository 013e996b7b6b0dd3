"""Machines that come and go under one_byte: real processes, one killed, others started from the first weights or later.

Survivors and newcomers have the same digest after every step, and the log makes the same weights again.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from dtrain import Members, attach, ferret, one_byte
from dtrain.comm.runtime.membership.members import serve
from dtrain.comm.shared_seed.replay import replay
from dtrain.comm.shared_seed.update_log import LogError, from_bytes, read, to_bytes
from dtrain.testing.workers import Forked
from tests.programs.machine import Asked, built, main
from tests.programs.progress import wait_for

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]


@contextmanager
def machines(*asked: Asked) -> Iterator[dict[str, Forked]]:
    """Their processes by name; none of them outlives the test."""
    started = {one.name: Forked(main, one) for one in asked}
    try:
        yield started
    finally:
        for process in started.values():
            process.kill()


@pytest.mark.parametrize(("width", "slow_seconds", "came_by"), [(16, 0.0, "log"), (16, 1e6, "weights")])
def test_one_is_killed_and_another_comes(tmp_path: Path, width: int, slow_seconds: float, came_by: str) -> None:
    store = serve(0, "127.0.0.1")
    base = Asked(str(tmp_path), f"127.0.0.1:{store.port}", "a", hold_at=30, hold_for=4, width=width, digests=True)
    if came_by == "log":  # any link is slower than walking along a log
        slow_seconds = -1.0
    asked = [
        base,
        dataclasses.replace(base, name="b"),
        dataclasses.replace(base, name="c", die_at=15),
        # It comes with the first weights, when the others have waited for it at step 30.
        dataclasses.replace(base, name="d", slow_seconds=slow_seconds),
    ]
    with machines(*asked[:3]) as early:
        assert early["c"].wait(60) == -9
        wait_for(lambda: any(len(read(log).records) >= 20 for log in tmp_path.glob("*.log")))  # without it
        with machines(asked[3]) as late:
            assert late["d"].wait(60) == 0
        assert [early[name].wait(60) for name in "ab"] == [0, 0]
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in "abd"}
    assert found["a"]["digests"] == found["b"]["digests"] and len(found["a"]["digests"]) == 60
    began = found["d"]["began"]
    assert 30 <= began <= 40 and found["d"]["came_by"] == came_by
    assert found["d"]["digests"] == {step: d for step, d in found["a"]["digests"].items() if int(step) > began}
    assert found["a"]["losses"][-1] < 4.0  # of about 8

    logs = {name: read(tmp_path / found[name]["log"]) for name in "abd"}
    first = {fqn: p.detach() for fqn, p in built(base).named_parameters()}
    made, start, end = replay(logs["a"], first)
    last = torch.load(tmp_path / "d.pt")
    assert (start, end) == (0, 60) and all(torch.equal(made[fqn], last[fqn]) for fqn in made)
    assert [record.digest for record in logs["a"].records] == list(found["a"]["digests"].values())
    if came_by == "log":
        assert logs["d"].records == logs["a"].records and logs["d"].header.first == logs["a"].header.first
    else:
        assert logs["d"].records == logs["a"].records[began:]
    crowds = [record.step.workers for record in logs["a"].records]
    assert len(crowds[0]) == 3 and len(crowds[20]) == 2 and len(crowds[-1]) == 3 and len(set(crowds)) == 3
    # One byte for each sample and other machine; what was sent again after the loss comes on top.
    exact = sum(2 * (len(crowd) - 1) for crowd in crowds)
    assert exact <= found["a"]["payload"] <= exact + 8


def test_a_tail_is_a_piece_of_a_log(tmp_path: Path) -> None:
    store = serve(0, "127.0.0.1")
    with machines(Asked(str(tmp_path), f"127.0.0.1:{store.port}", "a", steps=10, machines=1)) as alone:
        assert alone["a"].wait(60) == 0
    (path,) = tmp_path.glob("machine-*.log")
    records = read(path).records
    steps = range(4, len(records))
    assert from_bytes(to_bytes(records[4:]), steps) == records[4:] and from_bytes(b"", range(3, 3)) == []
    for lost in (records[4:-1], records[5:], [*records[4:6], *records[7:]], []):
        with pytest.raises(LogError, match="and not those of the"):
            from_bytes(to_bytes(lost), steps)
    with pytest.raises(LogError, match="ends within record 5"):
        from_bytes(to_bytes(records[4:])[:-1], steps)
    with pytest.raises(LogError, match=r"record 0, at byte 0, is damaged"):
        from_bytes(to_bytes(records)[:30] + b"?" + to_bytes(records)[31:], range(len(records)))


@pytest.mark.parametrize(
    ("sync", "said"), [(one_byte(), r"one_byte\(log=FOLDER\)"), (ferret(), "directions of a round belong")]
)
def test_what_cannot_come_and_go(sync: object, said: str) -> None:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    store, model = serve(0, "127.0.0.1"), built(Asked(""))
    try:
        members = Members(f"127.0.0.1:{store.port}", replicas=1)
        with pytest.raises(ValueError, match=said):
            attach(model, torch.optim.SGD(model.parameters(), lr=0.1), sync, members=members)  # type: ignore[arg-type]
    finally:
        dist.destroy_process_group()
