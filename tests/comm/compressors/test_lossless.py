"""Lossless coding changes no bit of what arrives, and sends less where there is something to save."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import pytest
import torch
import zstandard
from hypothesis import example, given, settings
from torch import Tensor

from dtrain import diloco, every_step, local_update, streaming_diloco
from dtrain.comm.aggregators.mean import rank_order_mean
from dtrain.comm.channel import Channel
from dtrain.comm.collectives.exchange import exchange
from dtrain.comm.compressors.lossless import HEAD, _alike, _decode, packed
from dtrain.comm.methods.local_update import LocalUpdate
from dtrain.comm.ops import AllGather, AllReduce, AllToAll, Flow, Op, Payload, Place
from dtrain.comm.plans.plan import Plan, as_plan
from dtrain.comm.runtime.method import Sync
from dtrain.comm.seeds import Key
from dtrain.comm.state import State
from dtrain.comm.transports.meter import Meter, metered
from dtrain.comm.transports.simulate import simulate
from dtrain.comm.transports.transport import CompletedWork, SelfTransport
from dtrain.compress import cast, error_feedback, powersgd, quantize, topk
from dtrain.outer import nesterov
from dtrain.testing.replicas import Replica, Replicas, equal, quadratic
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

    def flow() -> Flow[Tensor | None]:
        return (yield from _alike([part], AllGather(part), 1))

    (found,) = simulate([flow()])
    assert found is not None
    return found[0]


PART = (torch.arange(300.0), torch.zeros(40, dtype=torch.int16))


@given(seeds)
@settings(max_examples=200)
@example(4192)  # cut within its head
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
def test_a_peer_that_announces_what_no_code_has_is_refused(longest: int) -> None:
    flow = _alike([PART], AllGather(PART), 1)
    next(flow)
    with pytest.raises(ValueError, match=f"a peer announces a lossless code of {longest:,} bytes"):
        flow.send((torch.tensor([[500], [longest]]),))


def test_what_gets_no_shorter_is_sent_as_it_is() -> None:
    """It costs the gather of the lengths, 8 bytes for each peer and op, and no more."""
    values, plan = per_rank(1, [40_000], 2), as_plan(quantize("least_squares", bits=1, block=1 << 20))
    plain, coded = (exchanged(values, plan, level)[1] for level in (None, 1))
    assert coded == plain + 2 * 8


# ---- local updates -------------------------------------------------------------------------------------------------

FOUR_BITS = error_feedback(quantize(bits=4, block=128))
FEW_BITS = error_feedback(quantize("least_squares", bits=2, block=64))
START = {
    "layers.0.weight": torch.randn(60_000, generator=torch.Generator().manual_seed(0)),
    "layers.1.bias": torch.ones(7),
}
LOOPS: dict[str, Callable[[int | None], LocalUpdate]] = {
    "diloco": lambda level: diloco(every_steps=2, compress=FOUR_BITS, lossless=level),
    "diloco, few bits": lambda level: diloco(every_steps=2, compress=FEW_BITS, lossless=level),
    "offloaded": lambda level: diloco(every_steps=2, compress=FEW_BITS, outer_state="offloaded", lossless=level),
    "sharded": lambda level: diloco(every_steps=2, outer_state="sharded", lossless=level),
    "low rank": lambda level: diloco(every_steps=2, compress=error_feedback(powersgd(2)), lossless=level),
    "streaming": lambda level: streaming_diloco(
        every_steps=4, layers_per_fragment=1, overlap_steps=2, compress=FEW_BITS, lossless=level
    ),
    "stale": lambda level: local_update(
        every_steps=2, outer=nesterov(), delay="stale", compress=FEW_BITS, lossless=level
    ),
    "after a warm-up": lambda level: diloco(every_steps=2, compress=FEW_BITS, warmup_steps=3, lossless=level),
}


@pytest.mark.parametrize("name", LOOPS)
def test_local_updates_keep_every_bit_and_send_less(name: str) -> None:
    plain, coded = (Replicas(LOOPS[name](level), 3, start=START) for level in (None, 1))
    for replicas in (plain, coded):
        replicas.train(9)
    assert all(equal(plain.live(rank), coded.live(rank)) for rank in range(3))
    assert all(equal(plain.kept(rank, "residual"), coded.kept(rank, "residual")) for rank in range(3))
    sent = [replicas.pieces[0].channel.meter.sent_bytes for replicas in (plain, coded)]
    assert sent[1] < sent[0] or name == "low rank"  # whose factors are too small here


@pytest.mark.parametrize(
    "make", [diloco, streaming_diloco, lambda **words: local_update(every_steps=2, outer=nesterov(), **words)]
)
def test_local_updates_refuse_other_levels(make: Callable[..., LocalUpdate]) -> None:
    with pytest.raises(ValueError, match="lossless is 99; give zstandard's level, 1 to 22"):
        make(lossless=99)


def test_an_all_reduce_of_deltas_has_nothing_to_code() -> None:
    with pytest.raises(ValueError, match="lossless codes messages, which an all-reduce has to add up"):
        diloco(route="all_reduce", lossless=1)


class Damaging(SelfTransport):
    """Changes what arrives in the messages that are codes, once it is ``armed``."""

    armed = False

    def __init__(self, damage: Callable[[Tensor], object]) -> None:
        self.damage = damage

    def clone(self) -> SelfTransport:
        return self

    def issue(self, op: Op) -> CompletedWork:
        (*others, last) = super().issue(op).wait()
        if self.armed and not others and last.dtype == torch.uint8 and last.shape[-1] > HEAD:
            last = last.clone()
            self.damage(last)
        return CompletedWork((*others, last))


DAMAGES: dict[str, Callable[[Tensor], object]] = {
    "cut off": lambda rows: rows[..., rows.shape[-1] // 2 :].zero_(),
    "a longer length": lambda rows: rows[..., 0].add_(1),
    "a length of 2^56": lambda rows: rows[..., 7].add_(1),
    "a flipped bit": lambda rows: rows[..., HEAD + 3].bitwise_xor_(4),
    "zeros": lambda rows: rows.zero_(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["every_step", "diloco", "sharded", "streaming"])
def test_a_damaged_code_ends_the_step_in_words(name: str, damage: str) -> None:
    spec: Sync = every_step(compress=FOUR_BITS, lossless=1) if name == "every_step" else LOOPS[name](1)
    transport = Damaging(DAMAGES[damage])
    replica = Replica(Channel({"replicate": transport, "shard": SelfTransport()}), START, 0.05)
    attached = spec.bind(replica, 0)
    transport.armed = True

    def train(steps: int) -> None:
        for step in range(steps):
            replica.gradients = {fqn: quadratic(0, step, fqn, x) for fqn, x in replica.values.items()}
            attached.step()

    with pytest.raises(RuntimeError, match=r"from rank 0 of the replicate axis: a lossless code of .* bytes"):
        train(8)
