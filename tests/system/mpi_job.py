"""One rank of the program that test_mpi_driver.py runs under mpirun: what MPI carries, against gloo and `simulate`.

Each rank compares what it got with what it should have got, to the last bit.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dtrain import every_step
from dtrain.comm.adapters.adapter import pieces_of
from dtrain.comm.channel import Channel
from dtrain.comm.ops import AllGather, AllReduce, Broadcast, Flow, Op, Payload
from dtrain.comm.transports import mpi
from dtrain.comm.transports.simulate import simulate
from dtrain.comm.transports.transport import Transport
from dtrain.launchers.environment import Environment
from dtrain.train.mesh import Mesh, build_mesh
from tests.comm.transports.flows import LAYOUTS, ROUNDS, Layout, chained, ops_for, payload
from tests.comm.zoo import once, same
from tests.laws import test_simulate_equals_processes as law

HALVES = (torch.bfloat16, torch.float16)
SOON = 20.0  # seconds that nothing here takes unless it hangs


class Rank:
    """What the checks need: this rank's place, a gloo group and a transport by MPI of all ranks."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.over_mpi = mpi.replicate_transport(self.world, 1, self.rank)

    def gloo(self) -> dist.ProcessGroup:
        group = dist.new_group()
        assert isinstance(group, dist.ProcessGroup)
        return group

    def replies(self, ops: list[Op]) -> list[Payload]:
        channel = Channel({"replicate": self.over_mpi})
        replies = [channel.run(once(op), type(op).__name__) for op in ops]
        channel.close()
        return replies

    def expected(self, seed: int, layout: Layout) -> list[Payload]:
        ops = [ops_for(rank, self.world, seed, layout) for rank in range(self.world)]
        return [simulate([once(op) for op in same_op])[self.rank] for same_op in zip(*ops, strict=True)]


def every_op_is_what_simulate_says(here: Rank, layouts: Sequence[Layout] = LAYOUTS) -> None:
    for number, layout in enumerate(layouts):
        ops = ops_for(here.rank, here.world, 17 * number, layout)
        for op, got, wanted in zip(ops, here.replies(ops), here.expected(17 * number, layout), strict=True):
            if isinstance(op, AllReduce) and here.world > 2:  # MPI sums in an order of its own
                torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
            else:
                assert same(got, wanted), (layout, op)


def messages_beyond_what_one_call_takes_arrive_whole(here: Rank) -> None:
    before = mpi.BYTES_AT_ONCE
    for mpi.BYTES_AT_ONCE, layouts in ((24, LAYOUTS[:3]), (50_000, LAYOUTS[-1:])):
        every_op_is_what_simulate_says(here, layouts)
    mpi.BYTES_AT_ONCE = before


def sums_of_whole_numbers_are_exact_whatever_their_type(here: Rank) -> None:
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float64):
        sent = [torch.arange(11).to(dtype) + rank for rank in range(here.world)]
        (total,) = here.replies([AllReduce((sent[here.rank],))])[0]
        assert total.dtype == dtype and torch.equal(total, torch.stack(sent).sum(0).to(dtype))
        assert torch.equal(sent[here.rank], torch.arange(11).to(dtype) + here.rank)  # and still the caller's own


def sums_of_types_that_mpi_lacks_are_rounded_once(here: Rank) -> None:
    for dtype in HALVES:
        layout = [((5,), dtype), ((0, 3), dtype), ((2, 11), dtype)]
        everybody = [payload(100 + rank, layout) for rank in range(here.world)]
        total, mean = here.replies([AllReduce(everybody[here.rank], "sum"), AllReduce(everybody[here.rank], "mean")])
        for got, average, *sent in zip(total, mean, *everybody, strict=True):
            wanted = sent[0].float()
            for other in sent[1:]:
                wanted = wanted + other.float()
            assert got.dtype == dtype and torch.equal(got, wanted.to(dtype))
            assert torch.equal(average, wanted.to(dtype) / here.world)
    flags = torch.tensor([True, here.rank == 0, False])
    assert here.replies([AllReduce((flags,))])[0][0].tolist() == [True, True, False]


def a_sum_in_halves_costs_what_a_ring_costs(here: Rank) -> None:
    channel = Channel({"replicate": here.over_mpi})
    for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2)):
        channel.run(once(AllReduce((torch.ones(1000, dtype=dtype),))), str(dtype))
        assert channel.meter.sent_as(str(dtype)) == 2 * (here.world - 1) * 1000 * width // here.world
    channel.close()


def flows_under_way_together_keep_to_themselves(here: Rank) -> None:
    expected = [
        simulate([chained(name, rounds, rank) for rank in range(here.world)])[here.rank]
        for name, rounds in enumerate(ROUNDS)
    ]
    for slow_rank in (-1, 0, here.world - 1):
        channel = Channel({"replicate": here.over_mpi, "shard": here.gloo()})
        handles = []
        for name, rounds in enumerate(ROUNDS):
            if here.rank == slow_rank:
                time.sleep(0.01)
            handles.append(channel.start(chained(name, rounds, here.rank), "x"))
            if name == 3:
                channel.flush()
        for handle, wanted in reversed(list(zip(handles, expected, strict=True))):
            assert torch.equal(handle.wait(), wanted)
        channel.close()


def a_message_travels_while_nobody_waits_for_it(here: Rank) -> None:
    """MPI moves it in its own calls only, and the channel has nothing else to do: it must poll."""
    channel = Channel({"replicate": here.over_mpi})
    handle = channel.start(once(AllGather((torch.ones(1 << 20),))), "x")  # not flushed: nobody has asked for it
    deadline = time.monotonic() + SOON
    while not mpi._under_way or any(message._requests for message in mpi._under_way):
        assert time.monotonic() < deadline, "nothing has moved"
        time.sleep(0.002)
    assert handle.ended_at == 0.0
    dist.barrier()  # all have seen it, before anybody asks
    handle.wait()
    channel.close()


def train(name: str, transport: Transport | dist.ProcessGroup) -> Tensor:
    """`law.real` over any transport: the parameters after each step, [STEPS, n]."""
    ddp = DistributedDataParallel(law.model(), bucket_cap_mb=0.004)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=0.01)
    channel = Channel({"replicate": transport, "shard": dist.new_subgroups(1)[0]})
    attached = law.SYNCS[name]().bind(pieces_of(ddp, optimizer, channel, overlap=False), 5)
    seen = []
    for step in range(law.STEPS):
        x, y = law.batch(step, dist.get_rank())
        F.mse_loss(ddp(x), y).backward()
        assert attached.step()
        seen.append(law.flat(dict(ddp.module.named_parameters())))
    attached.detach()
    return torch.stack(seen)


def training_is_bitwise_that_of_gloo_and_of_simulate(here: Rank) -> None:
    law.WORLD = here.world
    for number, name in enumerate(("dense", "int8_ef", "stochastic", "diloco", "streaming")):
        over_mpi = train(name, here.over_mpi)
        assert torch.equal(over_mpi, train(name, here.gloo())), name
        if number % here.world == here.rank:  # one rank simulates them all, while the others go on
            alone = law.in_threads(name) if name in ("diloco", "streaming") else law.simulated(name)
            assert torch.equal(over_mpi, alone[here.rank]), name
    over_mpi, over_gloo = train("native", here.over_mpi), train("native", here.gloo())
    torch.testing.assert_close(over_mpi[0], over_gloo[0], rtol=1e-6, atol=1e-6)


def sharded(mesh: Mesh) -> Tensor:
    """FSDP2 within each replica, over gloo; this rank's part of the parameters after some steps."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(13, 37), nn.Tanh(), nn.Linear(37, 5))
    fully_shard(model, mesh=mesh.shard_mesh())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    attached = every_step().bind(pieces_of(model, optimizer, mesh.channel, overlap=False), 0)
    for step in range(4):
        x, y = law.batch(step, mesh.rank)
        F.mse_loss(model(x), y).backward()
        assert attached.step()
    parts = [parameter.detach().to_local().reshape(-1) for parameter in model.parameters()]  # type: ignore[attr-defined]
    mine = torch.cat(parts).clone()
    attached.detach()
    mesh.control.close()
    return mine


def a_mesh_sends_its_replicate_axis_over_mpi(here: Rank) -> None:
    shards = here.world // 2
    mesh = build_mesh(2, shards, "mpi")
    place = mesh.channel.places["replicate"]
    assert (place.rank, place.size) == (here.rank // shards, 2)
    assert torch.equal(sharded(mesh), sharded(build_mesh(2, shards)))


def another_order_of_ranks_is_refused(here: Rank) -> None:
    with pytest.raises(RuntimeError, match=rf"process {here.rank} of {here.world}, .* mpirun that belongs to .*MPI"):
        mpi.replicate_transport(here.world, 1, (here.rank + 1) % here.world)


def an_error_in_a_flow_leaves_mpi_usable(here: Rank) -> None:
    def broken() -> Flow[None]:
        yield AllGather((torch.zeros(1),))
        raise ZeroDivisionError("the third gradient")

    channel = Channel({"replicate": here.over_mpi})
    bad, beside = channel.start(broken(), "x"), channel.start(chained(1, 3, here.rank), "x")
    for wait in (bad.wait, beside.wait):
        with pytest.raises(RuntimeError, match="the third gradient"):
            wait()
    channel.close()
    op = AllReduce((torch.ones(3),))
    assert here.replies([op])[0][0].tolist() == [here.world] * 3
    with pytest.raises(RuntimeError, match="source 7 is none of the"):
        here.replies([Broadcast((torch.zeros(1),), source=7)])


def an_op_that_others_never_join_fails_after_its_time(here: Rank) -> None:
    late = mpi.MpiTransport(here.over_mpi._comm, timeout_seconds=0.2)
    op = AllGather((torch.full((3,), float(here.rank)),))
    if here.rank == 0:
        travelling = late.issue(op)
        with pytest.raises(RuntimeError, match=r"has not finished AllGather #1 \(3 float32\) within 0\.2 s"):
            travelling.wait()
    dist.barrier()
    if here.rank:
        here.over_mpi.issue(op).wait()
    else:  # the others have come after all
        while not travelling.poll():
            time.sleep(0.001)


CHECKS: list[Callable[[Rank], None]] = [
    every_op_is_what_simulate_says,
    messages_beyond_what_one_call_takes_arrive_whole,
    sums_of_whole_numbers_are_exact_whatever_their_type,
    sums_of_types_that_mpi_lacks_are_rounded_once,
    a_sum_in_halves_costs_what_a_ring_costs,
    flows_under_way_together_keep_to_themselves,
    a_message_travels_while_nobody_waits_for_it,
    training_is_bitwise_that_of_gloo_and_of_simulate,
    a_mesh_sends_its_replicate_axis_over_mpi,
    another_order_of_ranks_is_refused,
    an_error_in_a_flow_leaves_mpi_usable,
    an_op_that_others_never_join_fails_after_its_time,
]


def main() -> None:
    torch.set_num_threads(1)
    os.environ.update(Environment.read(os.environ).export())
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    here = Rank()
    for check in CHECKS:
        started = time.perf_counter()
        check(here)
        if here.rank == 0:
            print(f"passed {check.__name__} {time.perf_counter() - started:.2f} s", flush=True)
    dist.barrier()
    mpi.finalize()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
