"""Times of whole training steps with several exchanges, one after the other in the same processes, in rotating order.

``python -m benchmarks.step_timing JSON`` on every rank, under any launcher. Rank 0 writes what it found to the file
that JSON names. What is exchanged: "nothing" (in "nothing/10" ten steps are timed as one); a hook of torch
("torch.all_reduce", "torch.powersgd"); or a choice of the group compress, by `attach`, on the two-phase route or, as in
"bf16:all_reduce", on another. "local_sgd/8:int4_ef" is an average of parameters every 8 steps; what is timed is a step
of whole rounds then. A method that overlaps its rounds is timed from its second round on, and what it has under way at
the end is waited for before another one has its turn. With ``beside``, that exchange is timed before and after each
other one (before only, where that is a single step), and of local updates as many rounds as come next to its steps: a
machine's speed changes from minute to minute, and blocks of fewer steps come out slower.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from dtrain.bench import wire
from dtrain.comm.attach import attach
from dtrain.comm.transports.json_gather import gather_json
from dtrain.train.config import compose, instantiate
from dtrain.train.models.transformer import Transformer

ONE_BUCKET_MIB = 1 << 14
VOCABULARY = 257


@dataclass(frozen=True)
class Asked:
    """What to measure. ``model``: dim, layers and heads. ``batch``: sequences of ``length`` tokens for each rank.

    ``apart``: every rank keeps to one processor, which it shares with equally many others.
    """

    out: str
    exchanges: tuple[str, ...]
    rounds: int
    batch: int = 1
    length: int = 64
    model: tuple[int, int, int] = (480, 6, 8)
    bucket_mib: float = 25
    warmup: int = 4
    beside: str = ""
    apart: bool = False


@dataclass(frozen=True)
class Took:
    """Of one exchange: seconds of each step, the slowest rank's; ``sent_bytes``: of the busiest interface, per step.

    ``payload_bytes``: per step, what our meter counted, or torch's PowerSGD hook; 0 for others. ``beside``: seconds of
    a step of the exchange that was timed before and after it, the mean of both.
    """

    seconds: list[float]
    sent_bytes: int
    payload_bytes: int
    beside: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def utilization(self) -> float:
        """The step beside it over its own, the median of all rounds."""
        return statistics.median(alone / seconds for alone, seconds in zip(self.beside, self.seconds, strict=True))


class _Training:
    """A model of its own, trained with one exchange."""

    def __init__(self, name: str, asked: Asked) -> None:
        torch.manual_seed(0)
        dim, layers, heads = asked.model
        model = Transformer(dim=dim, layers=layers, heads=heads, vocab_size=VOCABULARY, max_length=asked.length)
        # Over gloo, torch's PowerSGD hook dies with two buckets: their all-reduces are paired up wrongly.
        cap = ONE_BUCKET_MIB if name == "torch.powersgd" else asked.bucket_mib
        self.model = DistributedDataParallel(model, bucket_cap_mb=cap)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.local, self.steps, self.before = name.startswith("nothing"), 1, 0
        if self.local:
            self.steps = _steps_of(name)
        self.attached = None
        self.theirs = PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
        if name == "torch.powersgd":
            self.model.register_comm_hook(self.theirs, powerSGD_hook)
        elif not name.startswith("torch.") and not self.local:
            choice, _, more = name.partition(":")
            if "/" in choice:
                method, _, every = choice.partition("/")
                self.steps = int(every)
                chosen = compose([f"sync={method}", f"sync.every_steps={every}", f"compress={more}"]).sync
            else:
                chosen = compose(["sync=every_step", f"compress={choice}"]).sync
                chosen = {**chosen, **({"route": more} if more else {})}
            sync = instantiate(chosen, "sync")
            self.attached = attach(self.model, optimizer, sync)  # type: ignore[arg-type]
            if getattr(sync, "overlap_steps", 0):
                self.before = self.steps
            if getattr(sync, "delay", "none") != "none":
                self.steps *= 2
            if asked.beside and self.steps > 1:
                self.steps *= max(1, round(_steps_of(asked.beside) / self.steps))
        self.finish: Callable[[], object] = optimizer.step if self.attached is None else self.attached.step
        self.optimizer = optimizer

    def step(self, batch: dict[str, torch.Tensor]) -> None:
        with self.model.no_sync() if self.local else nullcontext():
            self.model(batch).backward()
        self.finish()
        if self.attached is None:
            self.optimizer.zero_grad()

    def settle(self) -> None:
        """Leave nothing under way."""
        if self.attached is not None:
            self.attached.method.settle()

    def payload(self) -> int:
        """Bytes so far. Theirs counts the numbers that it all-reduces; of each a ring sends 2 (n - 1) / n."""
        if self.attached is not None:
            return self.attached.meter.sent_bytes
        world = dist.get_world_size()
        return 4 * 2 * (world - 1) * self.theirs.total_numel_after_compression // world


def main(asked: Asked) -> None:
    """Measure, on every rank alike."""
    if asked.apart:  # before there are other threads, which do as the one that starts them
        processors = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {processors[int(os.environ["RANK"]) % len(processors)]})
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    os.environ["DTRAIN_COMPILE"] = "early"  # a long run has its kernels compiled; here they are in the warm-up
    _measure(asked)  # whose models are gone before their group is: the other way round some ranks never end
    dist.destroy_process_group()


def _measure(asked: Asked) -> None:
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    tokens = torch.randint(0, VOCABULARY, (asked.batch, asked.length + 1), generator=generator)
    batch = {"input": tokens[:, :-1], "target": tokens[:, 1:]}
    trainings = {name: _Training(name, asked) for name in asked.exchanges}
    names = list(trainings)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    alone: dict[str, list[float]] = {name: [] for name in names}  # before and after, one after the other
    sent = dict.fromkeys(names, 0)
    payload = dict.fromkeys(names, 0)
    for number in range(asked.warmup + asked.rounds):
        beside = _timed(trainings[asked.beside], batch)[0] if asked.beside else 0.0
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if name == asked.beside:
                continue
            training = trainings[name]
            for _ in range(training.before):
                training.step(batch)
            took, moved, paid = _timed(training, batch)
            earlier, again = beside, bool(asked.beside) and training.steps > 1 and number >= asked.warmup
            beside = _timed(trainings[asked.beside], batch)[0] if again else earlier
            if number >= asked.warmup:
                seconds[name].append(took)
                alone[name].extend((earlier, beside))
                sent[name] += moved
                payload[name] += paid
                if again:
                    seconds[asked.beside].append(beside)
    slowest, longest = _slowest(seconds), _slowest(alone)
    if rank == 0:
        times = {
            name: Took(
                slowest[name], sent[name] // asked.rounds, payload[name] // asked.rounds,
                [(a + b) / 2 for a, b in zip(longest[name][::2], longest[name][1::2], strict=True)],
            )
            for name in names
        }  # fmt: skip
        Path(asked.out).write_text(json.dumps({name: asdict(took) for name, took in times.items()}))
    for training in trainings.values():
        if training.attached is not None:
            training.attached.detach()


def _steps_of(name: str) -> int:
    """Steps that are timed as one of "nothing/10"."""
    return int(name.partition("/")[2] or 1)


def _slowest(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    """Of each time the slowest rank's. Every rank must call it."""
    everybody = gather_json(seconds)
    return {
        name: [max(of_ranks) for of_ranks in zip(*(one[name] for one in everybody), strict=True)] for name in seconds
    }


def _timed(training: _Training, batch: dict[str, torch.Tensor]) -> tuple[float, int, int]:
    """Of one of its steps on this rank, in a whole round: seconds, bytes sent and payload. Then nothing is under way.

    A method that overlaps its rounds has one under way at the beginning, too.
    """
    dist.barrier()
    before, counted, started = wire.sent(), training.payload(), time.perf_counter()
    for _ in range(training.steps):
        training.step(batch)
    took = time.perf_counter() - started
    moved, paid = wire.busiest(before, wire.sent())[1], training.payload() - counted
    training.settle()
    dist.barrier()
    return took / training.steps, moved // training.steps, paid // training.steps


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    lists = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    main(Asked(**{**given, **lists}))
