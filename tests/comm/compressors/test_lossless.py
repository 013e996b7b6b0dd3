"""Lossless coding changes no bit of what arrives, and sends less where there is something to save."""

from __future__ import annotations

import zlib

import pytest
import torch
import zstandard
from hypothesis import given, settings
from torch import Tensor

from dtrain import every_step
from dtrain.comm.aggregators.mean import rank_order_mean
from dtrain.comm.collectives.exchange import exchange
from dtrain.comm.compressors.lossless import _alike, _decode, packed
from dtrain.comm.ops import AllGather, AllReduce, AllToAll, Flow, Payload, Place
from dtrain.comm.plans.plan import Plan, as_plan
from dtrain.comm.seeds import Key
from dtrain.comm.state import State
from dtrain.comm.transports.meter import Meter, metered
from dtrain.comm.transports.simulate import simulate
from dtrain.compress import cast, error_feedback, quantize, topk
from tests.comm.zoo import bits, compressors, kinds_of_values, numels, per_rank, seeds, worlds


def exchanged(values: list[dict[str, Tensor]], plan: Plan, level: int | None) -> tuple[list[dict[str, Tensor]], int]:
    """What every rank gets, and the bytes that rank 0 sends."""
    world = len(values)
    meters = [Meter() for _ in range(world)]
    flows = []
    for rank, mine in enumerate(values):
        flow = exchange(mine, plan, rank_order_mean, Place(rank, world), Key(0, 0, rank), State({}), lossless=level)
        places = {"replicate": Place(rank, world), "shard": Place(0, 1)}
        flows.append(metered(flow, meters[rank], places, "x"))  # type: ignore[arg-type]
    return [found.values for found in simulate(flows)], meters[0].sent_bytes


@given(worlds, numels, kinds_of_values, compressors, seeds)
@settings(max_examples=30)
def test_no_bit_changes(world: int, sizes: list[int], kind: str, compressor: object, seed: int) -> None:
    values, plan = per_rank(seed, sizes, world, kind), as_plan(compressor)  # type: ignore[arg-type]
    plain, coded = exchanged(values, plan, None)[0], exchanged(values, plan, 1)[0]
    for one, other in zip(plain, coded, strict=True):
        assert all(torch.equal(bits(one[fqn]), bits(other[fqn])) for fqn in one)


@pytest.mark.parametrize(("name", "saved"), [("zeros", 0.9), ("sparse", 0.9), ("normal", -0.1)])
def test_what_is_far_from_random_gets_smaller(name: str, saved: float) -> None:
    values = per_rank(1, [40_000], 2, name)
    plain, coded = (exchanged(values, as_plan(cast("fp32")), level)[1] for level in (None, 1))
    assert 1 - coded / plain > saved


def test_every_op_and_every_dtype_comes_through() -> None:
    payload = (torch.arange(6.0).view(2, 3).bfloat16(), torch.zeros(2, 0), torch.ones(2, 2, dtype=torch.int16))

    def flow(rank: int) -> Flow[tuple[Payload, Payload, Payload]]:
        mine = tuple(tensor + rank for tensor in payload)
        return (yield AllToAll(mine)), (yield AllGather(mine)), (yield AllReduce((mine[0],), "sum"))

    plain, coded = simulate([flow(r) for r in range(2)]), simulate([packed(flow(r), 3) for r in range(2)])
    for one, other in zip(plain, coded, strict=True):
        for part, like in zip(one, other, strict=True):
            assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(part, like, strict=True))


@pytest.mark.parametrize("level", [0, 23, 1.5, True])
def test_levels_that_zstandard_does_not_know_are_refused(level: object) -> None:
    with pytest.raises(ValueError, match="give zstandard's level, 1 to 22"):
        every_step(compress=quantize(bits=4), lossless=level)  # type: ignore[arg-type]


def test_an_all_reduce_has_nothing_to_code() -> None:
    with pytest.raises(ValueError, match="lossless codes messages, which an all-reduce has to add up"):
        every_step(compress=cast("bf16"), route="all_reduce", lossless=1)
    assert every_step(compress=error_feedback(topk(0.1)), lossless=1).lossless == 1


def coded(part: Payload) -> Tensor:
    """One part, as it travels."""

    def flow() -> Flow[Payload]:
        return (yield from _alike([part], AllGather(part), 1))

    return simulate([flow()])[0][0][0]


PART = (torch.arange(300.0), torch.zeros(40, dtype=torch.int16))


@given(seeds)
@settings(max_examples=200)
def test_a_damaged_part_is_an_error_in_words(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    row = coded(PART)
    place = int(torch.randint(row.numel(), (), generator=generator))
    match seed % 3:
        case 0:
            row[place] ^= 1 << int(torch.randint(8, (), generator=generator))
        case 1:
            row = row[:place]
        case _:
            row[place:] = torch.randint(0, 256, (row.numel() - place,), generator=generator).to(torch.uint8)
            row[0] ^= 1
    with pytest.raises(ValueError, match=r"a lossless code of .* does not have the checksum it was sent with"):
        _decode(row, PART)


@pytest.mark.parametrize("size", [0, 100, 1279, 1281, 1 << 28])
def test_nothing_is_inflated_beyond_what_is_due(size: int) -> None:
    """A code of another size, with a right checksum: of a bomb only the head is read."""
    blob = zstandard.ZstdCompressor(level=1).compress(bytes(size))
    whole = len(blob).to_bytes(8, "little") + zlib.crc32(blob).to_bytes(4, "little") + blob
    with pytest.raises(ValueError, match=f"says that it holds {size:,} bytes, where 1,280 are due"):
        _decode(torch.frombuffer(bytearray(whole), dtype=torch.uint8), PART)


def test_a_code_that_announces_no_size_or_is_none_is_refused() -> None:
    for blob in (zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1280)), b"", b"not zstandard"):
        whole = len(blob).to_bytes(8, "little") + zlib.crc32(blob).to_bytes(4, "little") + blob
        with pytest.raises(ValueError, match="a lossless code"):
            _decode(torch.frombuffer(bytearray(whole), dtype=torch.uint8), PART)


@pytest.mark.parametrize("longest", [-1, 1 << 40])
def test_a_peer_that_announces_too_much_is_refused(longest: int) -> None:
    flow = _alike([PART], AllGather(PART), 1)
    next(flow)
    with pytest.raises(ValueError, match=f"a peer announces a lossless code of {longest:,} bytes"):
        flow.send((torch.tensor([[longest]]),))
