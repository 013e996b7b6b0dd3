"""One rank of `dtrain bench`: ``python -m dtrain.bench.worker collectives|hooks FOLDER/bench.json``.

Rank 0 appends to rows.jsonl beside it, and writes environment.json: where and with what the figures were made.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from dtrain.bench import hook_rows, table
from dtrain.bench.hook_rows import NCCL_ONLY, HookRow
from dtrain.bench.measure import Bench
from dtrain.bench.ops import Case
from dtrain.bench.rows import Row, append
from dtrain.bench.settings import Settings
from dtrain.comm.channel import Channel
from dtrain.launchers import rendezvous as meeting
from dtrain.report.environment import record
from dtrain.train.mesh import own_device

__all__ = ["main"]


def main(what: str, path: Path) -> None:
    """Measure every op, or every hook, at every size."""
    settings = Settings.read(path)
    device = own_device()
    native = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(native, **meeting.of_environment())
    rank, world = dist.get_rank(), dist.get_world_size()
    control = _group(world, "gloo")
    if settings.transport == "mpi":
        from dtrain.comm.transports.mpi import replicate_transport

        channel = Channel({"replicate": replicate_transport(world, 1, rank)})
    else:
        channel = Channel({"replicate": _group(world, native)})
    bench = Bench(
        settings, channel, device, control=control,
        backends=(native, "mpi" if settings.transport == "mpi" else native),
    )  # fmt: skip
    if rank == 0:
        (path.parent / "environment.json").write_text(json.dumps(record(), indent=1) + "\n")
        print(hook_rows.HEAD if what == "hooks" else table.HEAD, flush=True)
    for row, line in _measured(what, bench, settings, channel, device):
        if rank == 0:
            append(path.parent / "rows.jsonl", row)
            print(line, flush=True)
    channel.close()
    if settings.transport == "mpi":
        from dtrain.comm.transports.mpi import finalize

        finalize()
    dist.destroy_process_group()


def _measured(
    what: str, bench: Bench, settings: Settings, channel: Channel, device: torch.device
) -> Iterator[tuple[Row, str]]:
    """Each row as soon as it is measured, and the line that shows it."""
    hooks: list[HookRow] = []
    for name, size in _cases(what, settings):
        if what == "hooks":
            hooks.append(_hook(bench, settings, name, size, channel, device))
            yield hooks[-1], hook_rows.line(hooks[-1], hooks)
        else:
            row = bench.measure(name, size)
            yield row, table.line(row)


def _cases(what: str, settings: Settings) -> Iterator[tuple[str, int]]:
    """Collectives op by op, as fits need them; hooks size by size, as they are compared."""
    if what == "hooks":
        hooks = [name for name in settings.ops if name not in NCCL_ONLY or dist.get_backend() == "nccl"]
        yield from ((name, size) for size in settings.sizes() for name in hooks)
    else:
        yield from ((name, size) for name in settings.ops for size in settings.sizes())


def _hook(bench: Bench, settings: Settings, name: str, size: int, channel: Channel, device: torch.device) -> HookRow:
    """One row; the first exchange, which is checked, and those of the warm-up are not in its figures."""
    from dtrain.bench import hooks

    place = channel.places["replicate"]
    hook = hooks.prepare(name, size // 4, channel, device)
    hook.exchange()
    first = hook.gradient().clone()
    wrong, error = hook.wrong(first), hooks.error(first, place)
    exchanges, warm = 1, False

    def run() -> None:
        nonlocal exchanges
        exchanges += 1
        hook.exchange()

    def wrong_now() -> int:
        nonlocal wrong, warm
        count, wrong = wrong, 0
        if not warm:  # it is called at the end of the warm-up, and of the measurement
            hook.clock.restart()
        warm = True
        return count + hooks.disagreeing(hook.gradient())

    case = Case(first.nbytes, hook.after, run, wrong_now)
    warmup = max(settings.warmup, hooks.LEAST_WARMUP)
    row = bench.measure_case(name, case, backend=dist.get_backend(), like="all_reduce", warmup=warmup)
    encode, exchange, decode = hook.clock.shares()
    sent = hook.sent_bytes() // exchanges
    hook.close()
    figures = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    wire = sent or row.sent_bytes
    return HookRow(**figures, wire_bytes=wire, error=error, encode=encode, exchange=exchange, decode=decode)


def _group(world: int, backend: str) -> dist.ProcessGroup:
    group = dist.new_group(list(range(world)), backend=backend)
    assert isinstance(group, dist.ProcessGroup)
    return group


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
