"""Replicas that come and go: real processes that are killed, frozen and started in the middle of rounds."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import signal
import socket
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore
from torch.nn.parallel import DistributedDataParallel

from dtrain import Members, attach, co2, diloco, every_step
from dtrain.comm.methods.local_update import LocalUpdate
from dtrain.comm.runtime.local_updates import require_elastic
from dtrain.comm.runtime.loop import LocalUpdateLoop
from dtrain.comm.runtime.membership.elastic import Unfit
from dtrain.comm.runtime.membership.elastic_rounds import CHECKSUM, ElasticRounds
from dtrain.comm.runtime.membership.members import NOBODY, Epoch, propose, serve
from dtrain.comm.runtime.membership.secret import read_secret
from dtrain.comm.runtime.membership.store_client import GuardedStore, Line
from dtrain.compress import ef21, error_feedback, quantize
from dtrain.plans import lgreco
from dtrain.rounds import qsr
from dtrain.testing.workers import Forked
from tests.programs.member import LR, Asked, built, main
from tests.programs.progress import wait_for
from tests.programs.tasks import squared_error

EVERY = 5
FIRST = built(Asked("", "", ""))


@contextmanager
def replicas(out: Path, *asked: Asked) -> Iterator[dict[str, list[Forked]]]:
    """The processes of each, by name; none of them outlives the test."""
    started: dict[str, list[Forked]] = {}
    for one in asked:
        ranks = [dataclasses.replace(one, rank=rank) for rank in range(one.shards)]
        started[one.name] = [Forked(main, rank) for rank in ranks]
    try:
        yield started
    finally:
        for process in (process for ranks in started.values() for process in ranks):
            process.kill()


def ended(out: Path, name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads((out / f"{name}.json").read_text())
    return found


def among(members: dict[int, list[int]]) -> list[list[float]]:
    """DiLoCo by hand: ``members``: the slots that count in the round that ends at a step. Returns the parameters."""
    anchor = [p.detach().clone() for p in FIRST.parameters()]
    momentum = [torch.zeros_like(p) for p in anchor]
    for begin, end in itertools.pairwise([0, *members]):
        deltas = [torch.zeros_like(p) for p in anchor]
        for slot in members[end]:
            model = copy.deepcopy(FIRST)
            with torch.no_grad():
                for p, a in zip(model.parameters(), anchor, strict=True):
                    p.copy_(a)
            optimizer = torch.optim.SGD(model.parameters(), lr=LR)
            for step in range(begin, end):
                squared_error(model, step, slot).backward()
                optimizer.step()
                optimizer.zero_grad()
            for delta, a, p in zip(deltas, anchor, model.parameters(), strict=True):
                delta += (a - p.detach()) / len(members[end])
        for number, delta in enumerate(deltas):
            momentum[number] = 0.9 * momentum[number] + delta
            anchor[number] = anchor[number] - 0.7 * (delta + 0.9 * momentum[number])
    return [p.flatten().tolist() for p in anchor]


@pytest.mark.processes
@pytest.mark.timeout(120)
@pytest.mark.parametrize("sync", ["diloco", "diloco, offloaded", "diloco, lengths", "diloco, everything gathered"])
def test_one_dies_in_a_round_and_another_comes_and_only_that_round_of_the_dead_is_lost(
    sync: str, tmp_path: Path
) -> None:
    store = serve(0)
    common = Asked(f"127.0.0.1:{store.port}", str(tmp_path), "", sync=sync, hold_at=23, hold_for=4)
    names = [dataclasses.replace(common, name=name) for name in ("a", "b")]
    dies = dataclasses.replace(common, name="c", strike="die", strike_at=12)
    late = dataclasses.replace(common, name="late", after="die-c")
    with replicas(tmp_path, *names, dies, late) as processes:
        assert [processes[name][0].wait(90) for name in ("a", "b", "late")] == [0, 0, 0]
        assert processes["c"][0].wait(10) == -signal.SIGKILL
    found = {name: ended(tmp_path, name) for name in ("a", "b", "late")}
    assert len({found[name]["digest"] for name in found}) == 1
    rows = {step: (size, slot) for step, size, slot in found["late"]["rows"]}  # type: ignore[attr-defined]
    free = next(iter(rows.values()))[1]
    ends = [5, 13, 17, 21, 25, 29, 33, 37, 40] if "lengths" in sync else list(range(EVERY, 41, EVERY))
    assert min(rows) - 1 in [end for end in ends if 12 < end <= 30] and rows[40] == (3, free)
    alive = [slot for slot in range(3) if slot != free]
    joined = min(rows) - 1  # at the end of this round
    who = {end: [0, 1, 2] if end <= 10 or end > joined else alive for end in ends}
    for own, expected in zip(found["a"]["parameters"], among(who), strict=True):  # type: ignore[call-overload]
        torch.testing.assert_close(torch.tensor(own), torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.processes
@pytest.mark.timeout(120)
@pytest.mark.parametrize("sync", ["streaming", "streaming, 2 bits, coded", "diloco, top-k"])
def test_one_that_was_frozen_comes_back_as_a_newcomer(sync: str, tmp_path: Path) -> None:
    store = serve(0)
    common = Asked(f"127.0.0.1:{store.port}", str(tmp_path), "", sync=sync, every_steps=6, steps=60, hold_at=33,
                   hold_for=4)  # fmt: skip
    names = [dataclasses.replace(common, name=name) for name in ("a", "b")]
    frozen = dataclasses.replace(common, name="c", hold_at=-1, strike="freeze", strike_at=12)
    with replicas(tmp_path, *names, frozen) as processes:
        wait_for(
            lambda: all((tmp_path / f"holds-{name}").exists() for name in ("a", "b")), 60
        )  # they went on without it
        os.kill(processes["c"][0].pid, signal.SIGCONT)
        assert [processes[name][0].wait(60) for name in ("a", "b", "c")] == [0, 0, 0]
    found = [ended(tmp_path, name) for name in ("a", "b", "c")]
    assert len({one["digest"] for one in found}) == 1
    sizes = {size for _, size, _ in found[0]["rows"]}  # type: ignore[attr-defined]
    assert sizes == {2, 3}


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_one_that_dies_in_the_last_part_of_a_round_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    store = serve(0)
    common = Asked(f"127.0.0.1:{store.port}", str(tmp_path), "", steps=12)  # the last two steps are closed by hand
    dies = dataclasses.replace(common, name="c", strike="die", strike_at=11)
    with replicas(tmp_path, *(dataclasses.replace(common, name=name) for name in ("a", "b")), dies) as processes:
        assert [processes[name][0].wait(90) for name in ("a", "b", "c")] == [0, 0, -signal.SIGKILL]
    assert ended(tmp_path, "a")["digest"] == ended(tmp_path, "b")["digest"]


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_a_slow_one_ends_its_rounds_with_the_steps_that_it_has_made(tmp_path: Path) -> None:
    store = serve(0)
    common = Asked(f"127.0.0.1:{store.port}", str(tmp_path), "", replicas=2, steps=10, grace=0.5)
    slow = dataclasses.replace(common, name="slow", pause=1.0)
    with replicas(tmp_path, dataclasses.replace(common, name="fast"), slow) as processes:
        assert [processes[name][0].wait(90) for name in ("fast", "slow")] == [0, 0]
    fast, behind = ended(tmp_path, "fast"), ended(tmp_path, "slow")
    assert fast["digest"] == behind["digest"] and [row[0] for row in fast["rows"]] == list(range(1, 11))  # type: ignore[attr-defined]
    steps = [row[0] for row in behind["rows"]]  # type: ignore[attr-defined]
    assert len(steps) < 10 and steps[-1] == 10 and {5, 10} <= set(steps)


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_a_replica_of_two_shards_goes_with_all_its_ranks_and_comes_with_all(tmp_path: Path) -> None:
    store = serve(0)
    common = Asked(f"127.0.0.1:{store.port}", str(tmp_path), "", replicas=2, shards=2, steps=25, hold_at=13, hold_for=3)
    stays, dies = (
        dataclasses.replace(common, name="a"),
        dataclasses.replace(common, name="b", strike="die", strike_at=7),
    )
    with replicas(tmp_path, stays, dies, dataclasses.replace(common, name="late", after="die-b")) as processes:
        assert [process.wait(90) for name in ("a", "late") for process in processes[name]] == [0, 0, 0, 0]
    assert ended(tmp_path, "a")["digest"] == ended(tmp_path, "late")["digest"]


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_whoever_reaches_the_store_changes_nothing_in_a_run(tmp_path: Path) -> None:
    """A stranger who has read the code: fake newcomers, a counter out of all bounds, and junk where epochs are."""
    digests = []
    for attacked in (False, True):
        store, out = serve(0, "127.0.0.1"), tmp_path / str(attacked)
        out.mkdir()
        common = Asked(f"127.0.0.1:{store.port}", str(out), "", replicas=2, steps=20, hold_at=7, hold_for=3)
        with replicas(out, *(dataclasses.replace(common, name=name) for name in ("a", "b"))) as processes:
            wait_for(functools.partial(both_hold, out), 60)
            if attacked:
                strangers_say(store.port)
            line = Line("127.0.0.1", store.port, read_secret(), 5.0)
            GuardedStore(line, "dtrain/", timedelta(seconds=5)).add("arrivals", 1)  # they go on
            assert [processes[name][0].wait(30) for name in ("a", "b")] == [0, 0]
        found = [ended(out, name) for name in ("a", "b")]
        assert {size for one in found for _, size, _ in one["rows"]} == {2}  # type: ignore[attr-defined]
        digests.append({one["digest"] for one in found})
    assert digests[0] == digests[1] and len(digests[0]) == 1


def both_hold(out: Path) -> bool:
    return all((out / f"holds-{name}").exists() for name in ("a", "b"))


def strangers_say(port: int) -> None:
    """All that a client of torch's can say to a store of torch's, as far as it is let."""
    said = {"epoch/1": "junk", "ready/1/5": "1000000000", "beat/5": "1", "beat/0": "gone", "called/0/2": "yes"}
    with suppress(RuntimeError):
        store = PrefixStore("dtrain", TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=1)))
        for key, value in said.items():
            store.set(key, value)
        store.add("arrivals", 5_000_000)
    for noise in (b"", b"\0" * 100, b"GET / HTTP/1.1\r\n\r\n", b"dtrain members 1" + b"\xff" * 1000):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(noise)


@pytest.mark.parametrize(
    "change", ["nothing", "junk", "names", "shapes", "nan", "counters", "position", "parts", "cycle"]
)
def test_a_state_that_cannot_be_the_donors_is_refused_whole(change: str) -> None:
    store = serve(0, "127.0.0.1")
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(nn.Linear(2, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        members = Members(f"127.0.0.1:{store.port}", replicas=1)
        sync = attach(model, optimizer, diloco(every_steps=2), members=members)
        loop = sync.method
        assert isinstance(loop, LocalUpdateLoop)
        rounds = loop.meeting
        assert isinstance(rounds, ElasticRounds)
        content = torch.load(io.BytesIO(rounds.packed(loop)[:-CHECKSUM].numpy().tobytes()), weights_only=True)
        named = next(iter(content["tensors"].values()))
        changed: dict[str, Callable[[], object]] = {
            "nothing": lambda: content.update(position=3),
            "junk": lambda: content.clear(),
            "names": lambda: named.update(strange=torch.zeros(1)),
            "shapes": lambda: named.update(anchor=torch.zeros(7)),
            "nan": lambda: named["anchor"].view(-1)[0:1].fill_(math.nan),
            "counters": lambda: content["counters"].update(steps=-777),
            "position": lambda: content.update(position=1 << 60),
            "parts": lambda: content.update(parts=[]),
            "cycle": lambda: content.update(cycle=(-1, 3)),
        }
        changed[change]()
        buffer = io.BytesIO()
        torch.save(content, buffer)
        made = buffer.getvalue() + zlib.crc32(buffer.getvalue()).to_bytes(CHECKSUM, "little")
        packed = torch.frombuffer(bytearray(made), dtype=torch.uint8)
        before = {fqn: tensor.clone() for fqn, tensor in sync.pieces.read().items()}
        if change == "nothing":
            rounds.unpack(loop, packed, 3)
            assert rounds.membership.position == 3
        else:
            with pytest.raises(Unfit, match="no state of this run"):
                rounds.unpack(loop, packed, None)
            assert sync.steps == 0 and rounds.membership.position == 0
        with pytest.raises(Unfit):
            rounds.unpack(loop, packed[:50], None)
        with pytest.raises(Unfit):
            rounds.unpack(loop, packed, 4)
        assert all(torch.equal(tensor, before[fqn]) for fqn, tensor in sync.pieces.read().items())
        sync.detach()
    finally:
        dist.destroy_process_group()


# ---- what is decided, and what is refused --------------------------------------------------------------------------


@given(
    st.dictionaries(st.integers(0, 7), st.integers(0, 3), min_size=1),
    st.dictionaries(st.integers(0, 9), st.integers(-1, 5)),
    st.sets(st.integers(0, 9)),
)
def test_an_epoch_has_who_is_alive_and_ready_and_a_donor_who_is_as_far_as_any(
    old: dict[int, int], ready: dict[int, int], alive: set[int]
) -> None:
    slots = {member: slot for slot, member in enumerate(old)}
    found = propose(3, Epoch(2, slots, NOBODY, ()), ready, alive.__contains__, wanted=2)
    if any(member in alive and member not in ready for member in slots):
        assert found is None  # it is on its way
        return
    there = alive & ready.keys()
    if found is None:
        assert not there & slots.keys() and len(there) < 2
        return
    assert found.slots.keys() == there and len(set(found.slots.values())) == len(there)
    assert all(found.slots[member] == slots[member] for member in there & slots.keys())
    furthest = max(ready[member] for member in there)
    assert found.donor == (NOBODY if furthest < 0 else min(m for m in there if ready[m] == furthest))
    assert furthest < 0 or set(found.behind) == {member for member in there if ready[member] < furthest}
    assert Epoch.from_json(found.to_json().encode()) == found


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (co2(every_steps=4), "delay"),
        (diloco(every_steps=qsr(alpha=0.01, base=4)), "follows from the learning rate"),
        (diloco(every_steps="auto"), "'auto'"),
        (diloco(every_steps=4, outer_state="sharded"), "sharded"),
        (diloco(every_steps=4, compress=lgreco(error_feedback(quantize(bits=4, block=64)))), "changes by itself"),
        (diloco(every_steps=4, compress=ef21(quantize(bits=4, block=64))), "keeps the replicas' mean"),
    ],
)
def test_what_keeps_replicas_together_is_refused(spec: LocalUpdate, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        require_elastic(spec)


def test_a_sync_of_every_step_is_refused_before_anybody_is_waited_for() -> None:
    store = serve(0)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(nn.Linear(2, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        members = Members(f"localhost:{store.port}", replicas=2)
        with pytest.raises(TypeError, match="rounds of a local update"):
            attach(model, optimizer, every_step(), members=members)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("address", "error"), [("nowhere", ValueError), ("localhost:1", ConnectionError)])
def test_a_store_that_is_not_there_is_told(address: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"host:port|dtrain members"):
        Members(address, replicas=2, timeout_seconds=1.0)
