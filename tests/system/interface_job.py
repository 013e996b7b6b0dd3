"""One rank of test_interface_bytes, in a network namespace of its own: trains, and tells what was counted meanwhile.

It prints "ready", waits for a line on stdin (by then the namespaces are joined) and prints its counts as JSON.
Environment: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, and GLOO_SOCKET_IFNAME, the interface that is read.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dtrain import attach, diloco, every_step
from dtrain.comm.compressors.cast import cast
from dtrain.comm.compressors.compressor import Compressor
from dtrain.comm.runtime.method import Sync
from dtrain.comm.transports.meter import Meter
from dtrain.compress import error_feedback, quantize

STEPS, ROUND = 8, 2  # STEPS is a multiple of ROUND


@dataclass(frozen=True)
class Method:
    """A sync, the compressor that its bytes follow from, and how often everything is exchanged in STEPS steps."""

    sync: Callable[[], Sync]
    compressor: Compressor
    exchanges: int


INT8 = quantize(bits=8, block=512)
METHODS = {
    "dense": Method(every_step, cast("fp32"), STEPS),
    "int8_ef": Method(lambda: every_step(compress=error_feedback(INT8)), INT8, STEPS),
    "diloco": Method(lambda: diloco(every_steps=ROUND, compress=INT8), INT8, STEPS // ROUND),
}


@dataclass(frozen=True)
class Counts:
    """What STEPS steps cost one rank. ``messages``: by name of the op, across the replicate axis."""

    numels: list[int]
    buckets: int
    messages: dict[str, int]
    meter_bytes: int
    interface_bytes: int


def model() -> nn.Module:
    """About 600 thousand parameters, with biases and a width that is no multiple of a block."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(130, 600), nn.Tanh(), nn.Linear(600, 600), nn.Tanh(), nn.Linear(600, 257))


def counted(method: Method) -> Counts:
    """Train with one method, and count from a moment at which nothing is under way to the next such moment."""
    ddp = DistributedDataParallel(model(), bucket_cap_mb=0.5)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-3)
    attached = attach(ddp, optimizer, method.sync())
    generator = torch.Generator().manual_seed(dist.get_rank())

    def train(steps: int) -> None:
        for _ in range(steps):
            ddp(torch.randn(4, 130, generator=generator)).square().mean().backward()
            attached.step()

    train(ROUND)  # DDP lays its buckets out anew at the beginning of the second step
    dist.barrier()  # a rank that comes here has received all that was sent to it, so all of it has left the sender
    messages, meter, interface = messages_of(attached.meter), attached.meter.sent_bytes, transmitted()
    train(STEPS)
    dist.barrier()
    interface = transmitted() - interface
    meter = attached.meter.sent_bytes - meter
    new = {op: count - messages.get(op, 0) for op, count in messages_of(attached.meter).items()}
    sizes = ddp._get_ddp_logging_data().get("rebuilt_bucket_sizes", "")  # none where DDP leaves gradients alone
    attached.detach()
    return Counts(
        numels=[parameter.numel() for parameter in ddp.parameters()],
        buckets=len(str(sizes).split(",")),
        messages={op: count for op, count in new.items() if count},
        meter_bytes=meter,
        interface_bytes=interface,
    )


def messages_of(meter: Meter) -> dict[str, int]:
    found: dict[str, int] = {}
    for (axis, _, op), count in meter.by.items():
        if axis == "replicate":
            found[op] = found.get(op, 0) + count.messages
    return found


def transmitted() -> int:
    """The interface's tx_bytes. /proc/self/net is this process's namespace; /sys stays that of whoever mounted it."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == os.environ["GLOO_SOCKET_IFNAME"]:
            return int(figures.split()[8])
    raise RuntimeError(f"there is no interface {os.environ['GLOO_SOCKET_IFNAME']} in this namespace")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("ready", flush=True)
    sys.stdin.readline()
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    print(json.dumps({name: asdict(counted(method)) for name, method in METHODS.items()}), flush=True)
    dist.barrier()
    dist.destroy_process_group()
