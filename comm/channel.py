"""Performs flows: `Channel.run` now, `Channel.start` in the background.

A channel has one worker thread (with CUDA also a side stream) and one queue, so that communication overlaps compute. It
shares its process groups with nothing else: two threads that enqueue collectives on one group in different orders would
hang. Any axis may have another transport than torch.distributed.

Ops of concurrent flows are issued in waves: op r of flow b belongs to wave b + r, and within a wave the newest flow
comes first. All ranks start the same flows in the same order, so they issue the same ops in the same order; flow b + 1
is encoded, and another flow decoded, while the ops of flow b are on the wire. With NCCL the newest comes last, as the
others would wait in the stream until its tensors are computed. `flush`, and every wait, ends a batch of flows on all
ranks.

With CUDA a flow begins, on the side stream, when what its caller's stream had enqueued is done, and the stream of
whoever asks for its result waits for its end. The allocator knows of neither: it gives memory that is freed to the
stream it was allocated on, at once. So what a flow was given is kept until its result is asked for, and the result's
memory until the stream that got it has come past its use.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import inspect
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from dtrain.comm.ops import Axis, Flow, Op, Payload, Place
from dtrain.comm.transports.meter import Meter
from dtrain.comm.transports.process_group import TorchTransport
from dtrain.comm.transports.transport import Pauses, Transport, Work

R = TypeVar("R")

PEER_LEFT = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
"""Texts in the errors of gloo and NCCL when another rank has ended."""


class Handle(Generic[R]):
    """A flow that was started. `wait` returns its result, or raises what it raised."""

    def __init__(self, channel: Channel, label: str, then: Callable[[Handle[R]], None] | None = None) -> None:
        self.label = label
        self.ended_at = 0.0  # time.perf_counter()
        self._channel = channel
        self._then = then
        self._done = threading.Event()
        self._result: R | None = None
        self._error: BaseException | None = None
        self._ready: torch.cuda.Event | None = None
        self._given: object = None
        """What the flow was given, where the side stream may read it after the flow has ended."""

    def wait(self) -> R:
        """Block until the flow has ended; the time blocked counts as exposed. Every rank must call it at this place."""
        self._channel.flush()
        started = time.perf_counter()
        self._done.wait()
        self._channel.meter.wait(time.perf_counter() - started, self.label)
        return self.result()

    def result(self) -> R:
        """The result of a flow that has ended."""
        if self._error is not None:
            left = any(sign in f"{self._error}" for sign in PEER_LEFT)
            why = "; a peer has left: do all ranks make the same number of steps? Its own log says more" if left else ""
            raise RuntimeError(f"a collective flow failed: {self._error}{why}") from self._error
        if self._ready is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self._ready)
            for tensor in _tensors(self._result):
                if tensor.is_cuda:
                    tensor.record_stream(stream)
            self._given = None
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
            except Exception as failure:  # the worker thread must live on; the next flow fails with it
                self._error = self._error or failure
                self._channel._failure = self._channel._failure or failure


@dataclass
class _Job:
    flow: Flow[object]
    handle: Handle[object]
    ready: torch.cuda.Event | None  # what the caller's stream had computed when it started the flow


@dataclass
class _Renewal:
    """A break in the queue, reached when all earlier flows have ended or failed."""

    done: threading.Event


@dataclass
class _Running:
    job: _Job
    work: Work
    axis: Axis


_OPEN: weakref.WeakSet[Channel] = weakref.WeakSet()


def close_all(timeout_seconds: float) -> None:
    """Close every channel of this process that is still open."""
    for channel in list(_OPEN):
        channel.close(timeout_seconds)


class Channel:
    """Everything that one rank sends: a transport for each axis, a worker thread, and a meter.

    Args:
        axes: a process group, or another transport, for each axis; used by nothing else. Created on the main thread,
            on every rank in the same order. Transports are closed with the channel; groups stay as they are.
        meter: counts every op; a fresh one by default.
    """

    def __init__(self, axes: Mapping[Axis, dist.ProcessGroup | Transport], meter: Meter | None = None) -> None:
        self.transports: dict[Axis, Transport] = {
            axis: TorchTransport(by) if isinstance(by, dist.ProcessGroup) else by for axis, by in axes.items()
        }
        self.meter = meter if meter is not None else Meter()
        self.places = _places(self.transports)
        self._newest_first = not any(transport.in_stream_order for transport in self.transports.values())
        self._queue: queue.SimpleQueue[_Job | _Renewal | Channel | None] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._closed = False
        self._under_way, self._since = 0, 0.0  # ops of the replicate axis, and until when their time is metered
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread = threading.Thread(target=self._serve, args=(device,), name="dtrain-channel", daemon=True)
        self._thread.start()
        _OPEN.add(self)
        # A thread that is inside the transport while the interpreter shuts down aborts the process.
        atexit.register(self._end, timeout_seconds=2.0)

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
            handle._given = inspect.getgeneratorlocals(flow) if inspect.isgenerator(flow) else None
        self._queue.put(_Job(cast(Flow[object], flow), cast(Handle[object], handle), ready))
        return handle

    def seconds(self) -> float:
        """The time now, from some moment on."""
        return time.perf_counter()

    def clone(self) -> Channel:
        """Another channel to the same peers, with the same meter, whose flows do not wait for this one's.

        Every rank must call it at the same place: it makes a process group.
        """
        return Channel({"replicate": self.transports["replicate"].clone()}, self.meter)

    def flush(self) -> None:
        """Finish all flows that were started before the next one begins. Called by all ranks at the same place."""
        self._queue.put(None)

    def renew(self) -> None:
        """Once all earlier flows have ended or failed: clear a failure, and read each axis's ranks again."""
        item = _Renewal(threading.Event())
        self._queue.put(item)
        item.done.wait()

    def close(self, timeout_seconds: float | None = None) -> None:
        """Finish all flows, end the worker thread, close the transports. Every rank must call it at the same place.

        Where a flow has failed, or is still under way after ``timeout_seconds``, the transports stay open: closing one
        would wait for ranks that may be gone.
        """
        self._end(timeout_seconds)
        if self._thread.is_alive() or self._failure is not None:
            return
        for transport in self.transports.values():
            transport.close()

    def _end(self, timeout_seconds: float | None) -> None:
        atexit.unregister(self._end)
        _OPEN.discard(self)
        self._closed = True
        if self._thread.is_alive():
            self._queue.put(self)
            self._thread.join(timeout_seconds)

    def _serve(self, device: int | None) -> None:
        """Serve flows on ``device``, the GPU of the thread that made the channel: a new thread begins on GPU 0."""
        if device is not None:
            torch.cuda.set_device(device)
        stream = torch.cuda.Stream() if device is not None else None
        with torch.cuda.stream(stream):
            while self._batch():
                pass

    def _batch(self) -> bool:
        """Serve flows up to the next flush; False if the channel was closed."""
        running: list[_Running] = []
        item = self._next(running)
        while isinstance(item, _Job):
            running = self._wave(running, item)
            item = self._next(running)
        while running:
            running = self._wave(running)
        if isinstance(item, _Renewal):
            self._failure, self._under_way = None, 0
            self.places.update(_places(self.transports))
            item.done.set()
        return not isinstance(item, Channel)

    def _wave(self, running: list[_Running], new: _Job | None = None) -> list[_Running]:
        """Advance every flow by one op, and ``new`` to its first; returns those that have not ended, oldest first."""
        moves = [partial(self._advance, flow) for flow in running]
        if new is not None:
            moves.append(partial(self._begin, new))
        if self._newest_first:
            advanced = [move() for move in reversed(moves)][::-1]
        else:
            advanced = [move() for move in moves]
        return [flow for flow in advanced if flow is not None]

    def _next(self, running: list[_Running]) -> _Job | _Renewal | Channel | None:
        """The next item of the queue. Until it comes, ops that make progress only while polled (MPI) are polled."""
        pauses = Pauses()
        while not all(flow.work.poll() for flow in running):
            with contextlib.suppress(queue.Empty):
                return self._queue.get(timeout=pauses.next())
        return self._queue.get()

    def _begin(self, job: _Job) -> _Running | None:
        if job.ready is not None:
            torch.cuda.current_stream().wait_event(job.ready)
        return self._issue(job, None)

    def _advance(self, running: _Running) -> _Running | None:
        return self._issue(running.job, running)

    def _resume(self, job: _Job, running: _Running | None) -> Op:
        """The next op of a flow; how long the flow took for it, and its last op, goes into the meter.

        Raises ``StopIteration`` at the end of the flow.
        """
        reply = running.work.wait() if running is not None else None
        worked, began = self.meter.worked, self._meter_exchange()
        self._under_way -= running is not None and running.axis == "replicate"
        try:
            return next(job.flow) if running is None else job.flow.send(cast(Payload, reply))
        finally:
            self._since = time.perf_counter()
            if running is None:
                worked.encode += self._since - began
            else:
                worked.decode += self._since - began

    def _meter_exchange(self) -> float:
        """Count the time since a flow was last at work, if an op is under way; returns what the clock says."""
        now = time.perf_counter()
        if self._under_way > 0:
            self.meter.worked.exchange += now - self._since
        return now

    def _issue(self, job: _Job, running: _Running | None) -> _Running | None:
        """Resume a flow, ``running`` or not yet begun, meter and issue its next op; None if it has ended."""
        try:
            if self._failure is not None:
                # After a failure the ranks no longer agree on what comes next, and a collective would hang.
                raise RuntimeError(f"an earlier flow on this channel failed: {self._failure}") from self._failure
            op = self._resume(job, running)
            self.meter.record(op, self.places[op.axis], job.handle.label)
            work = self.transports[op.axis].issue(op)
            self._under_way += op.axis == "replicate"
            return _Running(job, work, op.axis)
        except StopIteration as done:
            job.handle._finish(done.value, None)
        except BaseException as error:  # `Handle.wait` raises it on the caller's thread
            self._failure = self._failure or error
            job.handle._finish(None, error)
        return None


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors in what a flow has returned."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from _tensors([getattr(value, field.name) for field in dataclasses.fields(value)])


def _places(transports: Mapping[Axis, Transport]) -> dict[Axis, Place]:
    return {axis: Place(transport.rank, transport.size) for axis, transport in transports.items()}
