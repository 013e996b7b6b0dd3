"""The pure parts of the MPI transport. That it carries every flow is shown under mpirun, in tests/system."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrain.comm.ops import AllGather, AllReduce
from dtrain.comm.transports import mpi
from dtrain.comm.transports.simulate import simulate
from dtrain.comm.transports.transport import Pauses
from dtrain.launchers import probe
from dtrain.train import mesh
from tests.comm.zoo import once, same, seeds

HALVES = [torch.bfloat16, torch.float16]


@given(
    world=st.integers(1, 5), seed=seeds, sizes=st.lists(st.integers(0, 9), max_size=3), dtype=st.sampled_from(HALVES)
)
def test_a_sum_in_halves_is_the_fp32_sum_in_rank_order_rounded_once(
    world: int, seed: int, sizes: list[int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sent = [[torch.randn(n, generator=generator).to(dtype) for n in sizes] for _ in range(world)]
    for got in simulate([mpi._sum_in_rank_order(AllReduce(tuple(mine)), world) for mine in sent]):
        for index, total in enumerate(got):
            wanted = sent[0][index].float()
            for other in sent[1:]:
                wanted = wanted + other[index].float()
            assert total.dtype == dtype and torch.equal(total, wanted.to(dtype))


@given(world=st.integers(1, 5), seed=seeds, combine=st.sampled_from(["sum", "mean"]))
def test_for_exact_sums_two_phases_are_an_all_reduce(world: int, seed: int, combine: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    sent = [torch.randint(-9, 9, (7,), generator=generator).to(torch.bfloat16) for _ in range(world)]
    ops = [AllReduce((mine,), combine) for mine in sent]  # type: ignore[arg-type]
    in_phases = simulate([mpi._sum_in_rank_order(op, world) for op in ops])
    for one, other in zip(in_phases, simulate([once(op) for op in ops]), strict=True):
        assert same(one, other)


@given(rows=st.integers(1, 4), width=st.integers(0, 40), at_once=st.integers(1, 100), world=st.integers(1, 5))
def test_columns_are_whole_and_small_enough(rows: int, width: int, at_once: int, world: int) -> None:
    buffer = torch.arange(rows * width, dtype=torch.int16).view(rows, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mpi, "BYTES_AT_ONCE", at_once)
        parts = mpi._columns(buffer, world)
    assert torch.equal(torch.cat(parts, dim=1), buffer)
    assert all(part.is_contiguous() for part in parts)
    assert all(part.shape[1] <= max(1, at_once // (2 * world)) for part in parts)


def test_pauses_begin_with_none_grow_and_end_at_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("dtrain.comm.transports.transport.time.perf_counter", lambda: now[0])
    pauses = Pauses()
    seen = []
    for now[0] in (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 10.0):
        seen.append(pauses.next())
    assert seen == pytest.approx([0.0, 0.0, 1e-5, 1e-4, Pauses.LONGEST_SECONDS, Pauses.LONGEST_SECONDS])


def library(monkeypatch: pytest.MonkeyPatch, *, rank: int = 0, size: int = 1, level: int = 2) -> None:
    """An mpi4py that has no MPI behind it."""
    world = SimpleNamespace(rank=rank, size=size)
    found = SimpleNamespace(
        COMM_WORLD=world,
        THREAD_SERIALIZED=2,
        Query_thread=lambda: level,
        Is_initialized=lambda: True,
        Get_library_version=lambda: "Some MPI 1.0\nof today",
    )
    package = ModuleType("mpi4py")
    package.__dict__.update(MPI=found, rc=lambda **_: None)
    monkeypatch.setitem(sys.modules, "mpi4py", package)
    monkeypatch.setitem(sys.modules, "mpi4py.MPI", found)


def test_without_mpi4py_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(RuntimeError, match=r"needs mpi4py .*pip install 'dtrain\[mpi\]'"):
        mpi.replicate_transport(2, 1, 0)


def test_without_a_library_the_error_says_how_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> object:
        raise RuntimeError("cannot load MPI library")

    package = ModuleType("mpi4py")
    package.__dict__.update(rc=lambda **_: None, __getattr__=load)
    monkeypatch.setitem(sys.modules, "mpi4py", package)
    with pytest.raises(RuntimeError, match=r"finds no MPI library.*MPI4PY_LIBMPI="):
        mpi.replicate_transport(2, 1, 0)


def test_a_library_without_threads_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, size=2, level=1)
    with pytest.raises(RuntimeError, match=r"Some MPI 1\.0 gives thread level 1 of 2.*MPI_THREAD_SERIALIZED"):
        mpi.replicate_transport(2, 1, 0)


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2), (0, 4)])
def test_ranks_that_mpi_counts_otherwise_are_refused(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    """Each alone: the library is not mpirun's. Another order, or another number."""
    library(monkeypatch, rank=rank, size=size)
    said = rf"process {rank} of {size}, the launcher that it is rank 0 of 2.*belongs to Some MPI 1\.0"
    with pytest.raises(RuntimeError, match=said):
        mpi.replicate_transport(2, 1, 0)


def test_finalize_does_nothing_where_mpi_was_never_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mpi4py.MPI", raising=False)
    mpi.finalize()
    assert "mpi4py.MPI" not in sys.modules


class Request:
    """A message of which the fake library says at once whether it has arrived."""

    arrived = False

    @classmethod
    def Testall(cls, requests: list[Request]) -> bool:
        return cls.arrived


def watched(monkeypatch: pytest.MonkeyPatch, noted: list[tuple[object, ...]]) -> mpi.MpiTransport:
    """A transport over the fake library whose ops are noted when they set out and when they are over."""
    library(monkeypatch)
    sys.modules["mpi4py.MPI"].__dict__.update(BYTE="byte", buffer=SimpleNamespace(fromaddress=lambda *_: None))
    monkeypatch.setattr(Request, "arrived", False)
    comm = SimpleNamespace(rank=0, size=2, Iallgather=lambda *_: Request())

    def watch(*what: object) -> Callable[[], None]:
        noted.append(what)
        return lambda: noted.append(("over", what[1]))

    return mpi.MpiTransport(comm, 0.01, watch)  # type: ignore[arg-type]  # all of a communicator that is used


def test_what_is_under_way_is_told_until_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[tuple[object, ...]] = []
    transport = watched(monkeypatch, noted)
    op = AllGather((torch.zeros(3), torch.zeros(2, 2, dtype=torch.int8)))
    one, two = transport.issue(op), transport.issue(op)
    assert noted == [("AllGather", 1, 7, "float32 int8"), ("AllGather", 2, 7, "float32 int8")]
    assert not one.poll() and len(noted) == 2
    Request.arrived = True
    assert one.poll() and two.poll() and noted[2:] == [("over", 1), ("over", 2)]


def test_what_takes_too_long_is_named_with_its_number_and_size(monkeypatch: pytest.MonkeyPatch) -> None:
    transport = watched(monkeypatch, [])
    transport.issue(AllGather((torch.zeros(1),)))
    late = transport.issue(AllGather((torch.zeros(3),)))
    with pytest.raises(RuntimeError, match=r"has not finished AllGather #2 \(3 float32\) within 0\.01 s: a rank"):
        late.wait()
    mpi._under_way.clear()


@pytest.mark.parametrize(
    ("said", "seconds"), [("3600", 3630.0), ("0", mpi.TIMEOUT_SECONDS), (None, mpi.TIMEOUT_SECONDS)]
)
def test_the_launchers_limit_is_that_of_the_replicate_axis(
    said: str | None, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(mesh, "replicate_transport", lambda *place, **how: given.update(how, place=place))
    monkeypatch.delenv("DTRAIN_HANG_SECONDS", raising=False)
    if said is not None:
        monkeypatch.setenv("DTRAIN_HANG_SECONDS", said)
    mesh._over_mpi(2, 4, 7)
    assert given["place"] == (2, 4, 7) and given["timeout_seconds"] == seconds
    given["watch"]("AllReduce", 4, 10, "float32")()
    assert probe._noted[-1]["process_group"] == ["replicate-3 over MPI"] and probe._noted[-1]["retired"]
