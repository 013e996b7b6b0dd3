"""Outer state in pinned host memory: the bits of the one on the card, whatever the streams are busy with."""

from __future__ import annotations

import pytest
import torch

from dtrain.comm.methods.local_update import LocalUpdate
from dtrain.comm.runtime.outer_store.offloaded import OffloadedStore
from dtrain.testing.replicas import SIZES, Replicas, draw, equal, quadratic
from tests.comm.runtime.test_offloaded import MAKERS
from tests.gpu.card import DEVICE
from tests.gpu.jobs import slow


def late(rank: int, step: int, fqn: str, x: torch.Tensor) -> torch.Tensor:
    """A gradient that the card computes long after it was asked to."""
    slow(1)
    return quadratic(rank, step, fqn, x)


def replicas(spec: LocalUpdate) -> Replicas:
    start = {f"layers.{i}.weight": draw(5000 + i, numel).to(DEVICE) for i, numel in enumerate(SIZES)}
    return Replicas(spec, 2, gradient=late, start=start)


@pytest.mark.parametrize("name", MAKERS)
def test_it_is_the_replicated_one_to_the_bit(name: str) -> None:
    if "coded" in name:
        pytest.importorskip("zstandard", reason="zstandard is not installed here: pip install 'dtrain[lossless]'")
    whole, offloaded = (replicas(MAKERS[name](how)) for how in ("replicated", "offloaded"))
    for _ in range(8):
        whole.train(1)
        offloaded.train(1)
        assert all(equal(whole.live(rank), offloaded.live(rank)) for rank in range(2))
    for kept in ("anchor", "momentum"):
        one, other = ({f: t.cpu() for f, t in r.kept(1, kept).items()} for r in (whole, offloaded))
        assert equal(one, other)
    again = offloaded.resumed()
    for _ in range(4):
        whole.train(1)
        again.train(1)
        assert all(equal(whole.live(rank), again.live(rank)) for rank in range(2))
    for used in (whole, offloaded, again):
        used.close()


def test_it_lies_in_pinned_memory_between_rounds() -> None:
    used = replicas(MAKERS["streaming"]("offloaded"))
    used.train(7)
    store = used.attached[0].method.store  # type: ignore[attr-defined]
    assert isinstance(store, OffloadedStore) and store._host
    for host in store._host.values():
        assert host.is_cpu and host.is_pinned() == (DEVICE == "cuda")
    used.close()
