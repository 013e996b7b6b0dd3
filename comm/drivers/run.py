"""Performs flows on torch.distributed: `Channel.run` now, `Channel.start` in the background.

One channel has one worker thread (with CUDA tensors: one side stream too) and one queue, so a flow that was started
really travels while the model computes. Its process groups belong to it alone: two threads that enqueue collectives
on one group in different orders would hang.

The ops of flows that are under way together are enqueued in the order (wave, flow), where op r of flow b belongs to
wave b + r: all ranks start the same flows in the same order, so all ranks enqueue the same ops in the same order, and
flow b + 1 is encoded while the ops of flow b travel. `flush`, and every wait, ends a batch of flows on all ranks.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dtrain.comm.drivers.meter import Meter, metered
from dtrain.comm.ops import (
    AllGather,
    AllReduce,
    AllToAll,
    Axis,
    Broadcast,
    Flow,
    Op,
    Payload,
    Place,
    Shift,
    one_dtype,
)

R = TypeVar("R")


class Handle(Generic[R]):
    """A flow under way. `wait` returns its result, or raises what it raised."""

    def __init__(self, channel: Channel, label: str, then: Callable[[Handle[R]], None] | None = None) -> None:
        self.label = label
        self.ended_at = 0.0  # time.perf_counter()
        self._channel = channel
        self._then = then
        self._done = threading.Event()
        self._result: R | None = None
        self._error: BaseException | None = None
        self._ready: torch.cuda.Event | None = None

    def wait(self) -> R:
        """Block until the flow has ended; the time blocked counts as exposed. Every rank must wait at this place."""
        self._channel.flush()
        started = time.perf_counter()
        self._done.wait()
        self._channel.meter.wait(time.perf_counter() - started, self.label)
        return self.result()

    def result(self) -> R:
        """The result of a flow that has ended."""
        if self._error is not None:
            raise RuntimeError(f"a collective flow failed: {self._error}") from self._error
        if self._ready is not None:
            torch.cuda.current_stream().wait_event(self._ready)
        return cast(R, self._result)

    def _finish(self, result: R | None, error: BaseException | None) -> None:
        self._result, self._error = result, error
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self._ready = torch.cuda.current_stream().record_event()
        self.ended_at = time.perf_counter()
        self._done.set()
        if self._then is not None:
            try:
                self._then(self)
            except Exception as failure:  # the worker thread must live on; whoever comes next hears of it
                self._error = self._error or failure
                self._channel._failure = self._channel._failure or failure


@dataclass
class _Job:
    flow: Flow[object]
    handle: Handle[object]
    ready: torch.cuda.Event | None  # what the caller's stream had computed when it started the flow


@dataclass
class _Running:
    job: _Job
    travelling: _Travelling


class Channel:
    """The transport of one rank: a process group for each axis, a worker thread, and a meter.

    Args:
        groups: a process group for each axis, used by nothing else. Created on the main thread, on every rank in the
            same order.
        meter: counts every op; a fresh one by default.
    """

    def __init__(self, groups: Mapping[Axis, dist.ProcessGroup], meter: Meter | None = None) -> None:
        self.groups = dict(groups)
        self.meter = meter if meter is not None else Meter()
        self.places = {axis: Place(group.rank(), group.size()) for axis, group in self.groups.items()}
        self._queue: queue.SimpleQueue[_Job | Channel | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="dtrain-channel", daemon=True)
        self._thread.start()
        # A thread that is still inside the transport while the interpreter goes down aborts the whole process.
        atexit.register(self.close, timeout_seconds=2.0)

    def run(self, flow: Flow[R], label: str) -> R:
        """Perform ``flow`` and return its result. ``label`` names its traffic in the meter."""
        return self.start(flow, label).wait()

    def start(self, flow: Flow[R], label: str, then: Callable[[Handle[R]], None] | None = None) -> Handle[R]:
        """Perform ``flow`` in the background; ``then`` is called on the worker thread when it has ended.

        The flow's own Python code runs on the worker thread too. Tensors that it reads must not change until it ends.
        """
        if self._closed:
            raise RuntimeError("this channel is closed; a flow can only be started before close() or detach()")
        handle: Handle[R] = Handle(self, label, then)
        ready = None
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            ready = torch.cuda.current_stream().record_event()
        counted = metered(flow, self.meter, self.places, label)
        self._queue.put(_Job(cast(Flow[object], counted), cast(Handle[object], handle), ready))
        return handle

    def flush(self) -> None:
        """Let every flow that was started come to its end before the next one begins. Called by all ranks alike."""
        self._queue.put(None)

    def close(self, timeout_seconds: float | None = None) -> None:
        """Finish what was started and end the worker thread. The process groups stay as they are."""
        atexit.unregister(self.close)
        self._closed = True
        if self._thread.is_alive():
            self._queue.put(self)
            self._thread.join(timeout_seconds)

    def _serve(self) -> None:
        stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        with torch.cuda.stream(stream):
            while self._batch():
                pass

    def _batch(self) -> bool:
        """Serve flows up to the next flush; False if the channel was closed."""
        running: list[_Running] = []
        item = self._queue.get()
        while isinstance(item, _Job):
            running = [after for flow in running if (after := self._advance(flow)) is not None]
            if (first := self._begin(item)) is not None:
                running.append(first)
            item = self._queue.get()
        while running:
            running = [after for flow in running if (after := self._advance(flow)) is not None]
        return item is None

    def _begin(self, job: _Job) -> _Running | None:
        if job.ready is not None:
            torch.cuda.current_stream().wait_event(job.ready)
        return self._issue(job, lambda: next(job.flow))

    def _advance(self, running: _Running) -> _Running | None:
        return self._issue(running.job, lambda: running.job.flow.send(running.travelling.wait()))

    def _issue(self, job: _Job, resume: Callable[[], Op]) -> _Running | None:
        """Resume a flow and put its next op on the wire; None if it has ended."""
        try:
            if self._failure is not None:
                # After a failure the ranks no longer agree on what comes next, and a collective would hang.
                raise RuntimeError(f"an earlier flow on this channel failed: {self._failure}") from self._failure
            op = resume()
            return _Running(job, _Travelling(op, self.groups[op.axis]))
        except StopIteration as done:
            job.handle._finish(done.value, None)
        except BaseException as error:  # the caller gets it from `Handle.wait`, on its own thread
            self._failure = self._failure or error
            job.handle._finish(None, error)
        return None


class _Travelling:
    """An op that was handed to torch.distributed, as one packed message."""

    def __init__(self, op: Op, group: dist.ProcessGroup) -> None:
        self.op, self.world = op, group.size()
        self.works: list[dist.Work] = []
        match op:
            case AllReduce():
                one_dtype(op)
                flat = [tensor.reshape(-1) for tensor in op.payload]
                self.buffer = torch.cat(flat) if flat else torch.empty(0)
                if self.buffer.numel():
                    self._add(dist.all_reduce(self.buffer, group=group, async_op=True))
            case AllGather():
                mine = pack(op.payload, rows=1)
                self.buffer = mine.new_empty(self.world, mine.shape[1])
                if mine.numel():
                    self._add(dist.all_gather(list(self.buffer.unbind()), mine[0], group=group, async_op=True))
            case AllToAll():
                sent = pack(op.payload, rows=self.world)
                self.buffer = torch.empty_like(sent)
                if sent.numel():
                    self._add(dist.all_to_all_single(self.buffer, sent, group=group, async_op=True))
            case Broadcast(source=source):
                self.buffer = pack(op.payload, rows=1).clone()
                if self.buffer.numel():
                    root = dist.get_global_rank(group, source)
                    self._add(dist.broadcast(self.buffer, src=root, group=group, async_op=True))
            case Shift(destination=destination, source=source):
                sent = pack(op.payload, rows=1)
                self.buffer = torch.empty_like(sent)
                self._shift(sent, destination, source, group)

    def _add(self, work: dist.Work | None) -> None:
        if work is not None:
            self.works.append(work)

    def _shift(self, sent: Tensor, destination: int, source: int, group: dist.ProcessGroup) -> None:
        if destination == source == group.rank():
            self.buffer.copy_(sent)
        elif sent.numel():
            to, origin = dist.get_global_rank(group, destination), dist.get_global_rank(group, source)
            pair = [dist.P2POp(dist.isend, sent, to, group), dist.P2POp(dist.irecv, self.buffer, origin, group)]
            self.works.extend(dist.batch_isend_irecv(pair))

    def wait(self) -> Payload:
        for work in self.works:
            work.wait()
        match self.op:
            case AllReduce(payload=payload, combine=combine):
                total = self.buffer / self.world if combine == "mean" else self.buffer
                parts = total.split([tensor.numel() for tensor in payload])
                return tuple(part.view(tensor.shape) for part, tensor in zip(parts, payload, strict=True))
            case AllGather(payload=payload):
                return unpack(self.buffer, payload, leading=(self.world,))
            case AllToAll(payload=payload) | Broadcast(payload=payload) | Shift(payload=payload):
                return unpack(self.buffer, payload, leading=())


def pack(payload: Payload, *, rows: int) -> Tensor:
    """All tensors of a payload as bytes, ``[rows, bytes]`` uint8; unless it is 1, ``rows`` is their leading dim."""
    if not payload:
        return torch.empty(rows, 0, dtype=torch.uint8)
    parts = [
        _dense(tensor).view(torch.uint8).view(rows, tensor.numel() * tensor.element_size() // rows)
        for tensor in payload
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _dense(tensor: Tensor) -> Tensor:
    """Flat with stride 1. One element counts as contiguous whatever its stride, and then cannot be viewed as bytes."""
    flat = tensor.contiguous().reshape(-1)
    return flat if flat.stride(0) == 1 else flat.new_empty(flat.shape).copy_(flat)


def unpack(buffer: Tensor, payload: Payload, *, leading: tuple[int, ...]) -> Payload:
    """Undo `pack`: tensors like those of ``payload``, their shapes preceded by ``leading``."""
    rows = buffer.shape[0]
    out, start = [], 0
    for tensor in payload:
        shape = (*leading, *tensor.shape)
        width = tensor.numel() * tensor.element_size() // (1 if leading else rows)
        part = buffer[:, start : start + width].contiguous().view(-1)
        # A slice may begin at any byte, and a view as a wider dtype wants it aligned.
        aligned = part if part.storage_offset() % tensor.element_size() == 0 else part.clone()
        out.append(aligned.view(tensor.dtype).view(shape))
        start += width
    return tuple(out)
