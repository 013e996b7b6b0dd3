"""MPI as a transport, by mpi4py: for sites whose interconnect is fast under MPI only.

It carries one axis, as a rule the replicate axis; engines keep gloo or NCCL inside a replica. What MPI needs:

    threads    one thread at a time calls MPI (under a lock), and not the main one: MPI_THREAD_SERIALIZED
    progress   MPI moves a message only inside its own calls, so the channel's thread polls, with pauses in between
    sums       MPI adds the types of C. Others (fp16, bf16, bool) go through two phases instead, an all-to-all and an
               all-gather: the same bytes, summed in rank order in fp32 and rounded once
    devices    CUDA tensors are staged through pinned host memory, so the library need not know CUDA
    size       messages above 1 GiB travel in several, as counts are 32 bit up to MPI 3.1

Sums of C types use MPI's own all-reduce: its order of summation and its bytes are the library's choice. The meter
charges a ring, and trees for 3 or more ranks send more.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dtrain.comm.ops import AllGather, AllReduce, AllToAll, Broadcast, Flow, Op, Payload, Shift, one_dtype
from dtrain.comm.transports.transport import Pauses, Work, outgoing, reply

if TYPE_CHECKING:
    from mpi4py import MPI

BYTES_AT_ONCE = 1 << 30  # of one MPI call, all its rows together
TIMEOUT_SECONDS = 1800.0  # that of torch.distributed's groups

Watch = Callable[[str, int, int, str], Callable[[], None]]
"""Called for each op that is issued (its name, its number on this axis, its elements, their dtypes); returns a function
to call at the op's end. `dtrain.launchers.probe.note_collective` is one, for a group."""

_NATIVE = {
    torch.float32: "FLOAT",
    torch.float64: "DOUBLE",
    torch.int8: "INT8_T",
    torch.int16: "INT16_T",
    torch.int32: "INT32_T",
    torch.int64: "INT64_T",
    torch.uint8: "UINT8_T",
}
_calls = threading.Lock()
_under_way: set[_MpiWork] = set()
"""Kept alive: MPI writes into their memory even after an error in a flow, when nobody waits for them."""


def replicate_transport(
    replicas: int, shards: int, rank: int, *, timeout_seconds: float = TIMEOUT_SECONDS, watch: Watch | None = None
) -> MpiTransport:
    """The replicate axis of the mesh over MPI: the ``replicas`` ranks that hold the same shard. Collective over all.

    ``rank`` = replica * shards + shard is this process's, as the launcher counts. ``timeout_seconds``: how long an op
    may take. Raises ``RuntimeError`` if there is no usable MPI, or if MPI counts the processes in another way.
    """
    world = _begin()
    if (world.rank, world.size) != (rank, replicas * shards):
        raise RuntimeError(
            f"MPI says that this is process {world.rank} of {world.size}, the launcher that it is rank {rank} of "
            f"{replicas * shards}. Start it with the mpirun that belongs to {_version()} (under another one each "
            "process is alone) and without options that reorder ranks, or name mpirun's library in MPI4PY_LIBMPI"
        )
    with _calls:
        return MpiTransport(world.Split(color=rank % shards, key=rank // shards), timeout_seconds, watch)


def finalize() -> None:
    """End MPI, on all ranks, after a successful run; nothing happens if it was not initialised.

    A rank that failed exits without it: mpirun takes that for a crash and ends the others, which would wait for ever
    if it waited for them in MPI_Finalize.
    """
    if "mpi4py.MPI" not in sys.modules:
        return
    from mpi4py import MPI

    with _calls:
        if MPI.Is_initialized() and not MPI.Is_finalized():
            MPI.Finalize()


class MpiTransport:
    """A communicator of its own. ``timeout_seconds``: how long `wait` waits before it fails."""

    in_stream_order = False

    def __init__(self, comm: MPI.Comm, timeout_seconds: float = TIMEOUT_SECONDS, watch: Watch | None = None) -> None:
        self._comm = comm
        self._timeout_seconds = timeout_seconds
        self._watch: Watch = watch or (lambda *_: lambda: None)
        self._issued = 0
        self.rank: int = comm.rank
        self.size: int = comm.size

    def issue(self, op: Op) -> Work:
        """Issue ``op`` by non-blocking calls. Raises ``ValueError`` for a rank that does not exist."""
        for name in ("source", "destination"):
            if not 0 <= getattr(op, name, 0) < self.size:
                raise ValueError(f"{name} {getattr(op, name)} is none of the {self.size} ranks on this axis")
        if isinstance(op, AllReduce):
            one_dtype(op)
            if any(tensor.dtype not in _NATIVE for tensor in op.payload):
                return _Chain(self, _sum_in_rank_order(op, self.size))
        self._issued += 1
        size = sum(tensor.numel() for tensor in op.payload)
        dtypes = " ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in op.payload}))
        label = f"{type(op).__name__} #{self._issued} ({size} {dtypes})"
        message = _MpiWork(op, self._comm, self._timeout_seconds, label)
        message.over = self._watch(type(op).__name__, self._issued, size, dtypes)
        _under_way.add(message)
        return message

    def clone(self) -> MpiTransport:
        with _calls:
            return MpiTransport(self._comm.Dup(), self._timeout_seconds, self._watch)

    def close(self) -> None:
        """All ranks free a communicator together, which they do when MPI ends."""


class _MpiWork:
    """An op under way in MPI's non-blocking calls, cut by columns where it is larger than MPI takes at once."""

    over: Callable[[], None]

    def __init__(self, op: Op, comm: MPI.Comm, timeout_seconds: float, label: str) -> None:
        self._op, self._world, self._timeout_seconds, self._label = op, comm.size, timeout_seconds, label
        sent = outgoing(op, comm.size)
        self._device = sent.device
        self._requests: list[MPI.Request] = []
        self._failure: Exception | None = None
        rows = _on_host(sent).unsqueeze(0) if isinstance(op, AllReduce) else _on_host(sent)
        self._sent = _columns(rows, comm.size)
        self._arrived = [self._issue(columns, comm) for columns in self._sent]

    def poll(self) -> bool:
        """Make progress; True once it is done or has failed."""
        if self._requests and self._failure is None:
            try:
                with _calls:
                    done = type(self._requests[0]).Testall(self._requests)
            except Exception as error:  # raised by `wait`, in the flow that it belongs to
                self._failure = error
            else:
                if done:
                    self._requests = []
        if self._requests and self._failure is None:
            return False
        self.over()
        return True

    def wait(self) -> Payload:
        """Block until the reply is there. Raises ``RuntimeError`` after ``timeout_seconds``, or when MPI fails."""
        pauses, deadline = Pauses(), time.monotonic() + self._timeout_seconds
        while not self.poll():
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"MPI has not finished {self._label} within {self._timeout_seconds:g} s: a rank has "
                    "ended, hangs or has taken another branch"
                )
            time.sleep(pauses.next())
        if self._failure is not None:
            raise RuntimeError(f"MPI failed in {type(self._op).__name__}: {self._failure}") from self._failure
        _under_way.discard(self)
        arrived = self._arrived[0] if len(self._arrived) == 1 else torch.cat(self._arrived, dim=1)
        arrived = arrived.to(self._device, non_blocking=True)
        return reply(self._op, arrived.view(-1) if isinstance(self._op, AllReduce) else arrived, self._world)

    def _issue(self, sent: Tensor, comm: MPI.Comm) -> Tensor:
        """Begin to send some columns ``[rows, n]``; returns the buffer of the reply to them."""
        from mpi4py import MPI

        if isinstance(self._op, AllReduce):
            arrived = sent  # a copy of the payload: summed in place
        else:
            rows = comm.size if isinstance(self._op, AllGather | AllToAll) else 1
            arrived = torch.empty(rows, sent.shape[1], dtype=sent.dtype, pin_memory=self._device.type == "cuda")
        if not sent.numel():
            return arrived
        outbox, inbox = _memory(sent), _memory(arrived)
        with _calls:
            match self._op:
                case AllReduce():
                    kind = getattr(MPI, _NATIVE[sent.dtype])
                    self._requests.append(comm.Iallreduce(MPI.IN_PLACE, [inbox, kind], op=MPI.SUM))
                case AllGather():
                    self._requests.append(comm.Iallgather([outbox, MPI.BYTE], [inbox, MPI.BYTE]))
                case AllToAll():
                    self._requests.append(comm.Ialltoall([outbox, MPI.BYTE], [inbox, MPI.BYTE]))
                case Broadcast(source=source):
                    arrived.copy_(sent)
                    self._requests.append(comm.Ibcast([inbox, MPI.BYTE], root=source))
                case Shift(destination=destination, source=source):
                    self._requests.append(comm.Irecv([inbox, MPI.BYTE], source=source))
                    self._requests.append(comm.Isend([outbox, MPI.BYTE], dest=destination))
        return arrived


class _Chain:
    """An op that takes several, written as a flow. The next one is issued in `wait`, in the same order on all ranks."""

    def __init__(self, transport: MpiTransport, flow: Flow[Payload]) -> None:
        self._transport, self._flow = transport, flow
        self._now = transport.issue(next(flow))

    def poll(self) -> bool:
        return self._now.poll()

    def wait(self) -> Payload:
        try:
            while True:
                self._now = self._transport.issue(self._flow.send(self._now.wait()))
        except StopIteration as done:
            total: Payload = done.value
            return total


def _begin() -> MPI.Intracomm:
    """All processes of this run, with MPI initialised for threads. Raises ``RuntimeError`` with the way out."""
    try:
        import mpi4py
    except ImportError as error:
        raise RuntimeError(f"the MPI transport needs mpi4py ({error}): pip install 'dtrain[mpi]'") from error
    if "mpi4py.MPI" not in sys.modules:
        mpi4py.rc(thread_level="serialized", finalize=False)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(
            "mpi4py is installed and finds no MPI library. Load the module of your site's MPI, or name the library: "
            f"MPI4PY_LIBMPI=/path/to/libmpi.so. It said: {error}"
        ) from error
    if not MPI.Is_initialized() or MPI.Query_thread() < MPI.THREAD_SERIALIZED:
        raise RuntimeError(
            f"{_version()} gives thread level {MPI.Query_thread()} of {MPI.THREAD_SERIALIZED} that dtrain needs, since "
            "a thread beside the main one calls MPI. Initialise MPI with MPI_THREAD_SERIALIZED or more, or use an MPI "
            "that was built for threads"
        )
    return MPI.COMM_WORLD


def _version() -> str:
    from mpi4py import MPI

    return str(MPI.Get_library_version()).splitlines()[0].rstrip("\0")


def _sum_in_rank_order(op: AllReduce, world: int) -> Flow[Payload]:
    """An all-reduce in two phases; chunk j of the payload is summed by rank j."""
    flat = outgoing(op, world)
    width = -(-flat.numel() // world)
    padded = flat.new_zeros(world * width)
    padded[: flat.numel()] = flat
    (rows,) = yield AllToAll((padded.view(world, width),))
    summed = torch.float32 if rows.dtype.is_floating_point else rows.dtype
    total = rows[0].to(summed, copy=True)
    for row in rows[1:]:
        total += row.to(summed)
    (chunks,) = yield AllGather((total.to(flat.dtype),))
    return reply(op, chunks.view(-1)[: flat.numel()], world)


def _columns(rows: Tensor, world: int) -> list[Tensor]:
    """``rows``, cut by columns into tensors that are small enough for one call on every rank."""
    width = max(1, BYTES_AT_ONCE // (world * rows.element_size()))
    if rows.shape[1] <= width:
        return [rows]
    return [columns.contiguous() for columns in rows.split(width, dim=1)]


def _on_host(tensor: Tensor) -> Tensor:
    """``tensor``, or its copy in pinned host memory once the stream has computed it."""
    if tensor.device.type != "cuda":
        return tensor
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    copy.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return copy


def _memory(tensor: Tensor) -> MPI.buffer:
    from mpi4py import MPI

    return MPI.buffer.fromaddress(tensor.data_ptr(), tensor.numel() * tensor.element_size())
