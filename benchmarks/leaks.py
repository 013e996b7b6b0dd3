"""What attaching and training leave behind in a process that goes on: threads, descriptors, memory.

``python -m benchmarks.leaks`` measures in two worker processes, `ATTACHED` times for each method and `TRAINED`
whole trainings.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.harness import Session, say
from benchmarks.page import Report, at_most, table
from dtrain.launchers.probe import RING, RING_ENTRIES
from tests.sync_words import sync_words

ATTACHED, TRAINED = 500, 200
LOOKS = 5  # rows of a page: at the start, when what is loaded once is loaded, to the end
SETTLED = 40  # times after which nothing more is loaded: kernels, caches of torch
METHODS = ("dense", "int8_ef", "diloco", "streaming", "co2", "fsdp", "plain")
KINDS = (("ddp", "int8_ef"), ("fsdp", "diloco"), ("zero1", "streaming_diloco"), ("ddp", "dense"))
SMALL = (
    "model.dim=16", "model.layers=1", "model.heads=2", "data.block=16", "train.batch_size=4", "train.steps=3",
    "train.evaluation_examples=4", "train.checkpoint_every_steps=0", "mesh.replicate=2", "mesh.shard=1",
    "launcher.workers=2",
)  # fmt: skip

Held = tuple[int, int, float]
"""Threads, descriptors, MiB of this process."""


def held() -> Held:
    """Of this process, now."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["Threads"]), len(os.listdir("/proc/self/fd")), round(int(status["VmRSS"].split()[0]) / 1024, 1)


def looks(times: int) -> list[int]:
    """After how many times it is looked, `SETTLED` first.

    >>> looks(500)
    [40, 155, 270, 385, 500]
    """
    first = min(SETTLED, times)
    return [first + (times - first) * number // (LOOKS - 1) for number in range(LOOKS)]


def attached(method: str, times: int) -> list[Held]:
    """Attach, three steps, detach, so many times on one rank of two."""
    import torch
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from dtrain import attach, co2, diloco, every_step, local_sgd, streaming_diloco
    from dtrain.compress import error_feedback, quantize

    specs: Mapping[str, Callable[[], object]] = {
        "dense": every_step,
        "int8_ef": lambda: every_step(compress=error_feedback(quantize(bits=8))),
        "diloco": lambda: diloco(every_steps=2),
        "streaming": lambda: streaming_diloco(every_steps=2, overlap_steps=1),
        "co2": lambda: co2(every_steps=2),
        "fsdp": every_step,
        "plain": lambda: local_sgd(every_steps=2),
    }
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    model: nn.Module = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
    group = None
    if method == "fsdp":
        fully_shard(model, mesh=mesh["shard"])
        group = mesh.get_group("replicate")
    elif method != "plain":
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters())
    rows = []
    for number in range(1, times + 1):
        sync = attach(model, optimizer, specs[method](), replicate_group=group)  # type: ignore[arg-type]
        for _ in range(3):
            model(torch.ones(4, 64)).square().mean().backward()
            sync.step()
        sync.detach()
        rows += [held()] * looks(times).count(number)
    return rows


def trained(folder: str, text: str, times: int) -> list[Held]:
    """Whole trainings, one after the other, on one rank of two."""
    import torch.distributed as dist

    from dtrain.train.config import compose
    from dtrain.train.trainer import train

    rows = []
    for number in range(1, times + 1):
        engine, sync = KINDS[number % len(KINDS)]
        run = Path(folder) / f"{number}"
        if dist.get_rank() == 0:
            run.mkdir()
        dist.barrier()
        train(compose([f"engine={engine}", *sync_words(sync), f"run.dir={run}", f"data.path={text}", *SMALL]))
        rows += [held()] * looks(times).count(number)
    return rows


def measured(attach_times: int = ATTACHED, train_times: int = TRAINED) -> dict[str, list[Held]]:
    """Rank 0's rows by what was done."""
    from dtrain.testing import WorkerPool

    os.environ.setdefault(RING, RING_ENTRIES)
    rows: dict[str, list[Held]] = {}
    for method in METHODS:
        say(f"{attach_times} times attach and detach: {method}")
        with WorkerPool(2) as pool:
            rows[f"attach, detach: {method}"] = pool.run(attached, method, attach_times, seconds=3600)[0]
    with WorkerPool(2) as pool, tempfile.TemporaryDirectory() as folder:
        say(f"{train_times} trainings")
        text = Path(folder) / "text"
        text.mkdir()
        (text / "words.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 500)
        rows["training"] = pool.run(trained, folder, str(text), train_times, seconds=7200)[0]
    return rows


def leaks(session: Session) -> Report:
    """Threads, descriptors and memory over hundreds of times."""
    return leaks_report(measured())


def leaks_report(rows: Mapping[str, Sequence[Held]]) -> Report:
    """By what was done, the rows in the order of `looks`."""
    body, checks = [], []
    for name, series in rows.items():
        times = looks(TRAINED if name == "training" else ATTACHED)
        shown = [
            [str(number), str(threads), str(files), f"{memory:.1f}"]
            for number, (threads, files, memory) in zip(times, series, strict=True)
        ]
        body.append(f"## {name}\n\n{table(['times', 'threads', 'descriptors', 'MiB'], shown)}")
        for place, what in enumerate(("threads", "descriptors", "MiB")):
            first = series[0][place]
            growth = 100 * (max(row[place] for row in series) - first) / first
            checks.append(at_most(f"{name}: growth of {what}", growth, 2, " %"))
    text = (
        f"Two ranks over gloo, each a process that goes on: {ATTACHED} times attach, three steps and detach of a small "
        f"model for each method, and {TRAINED} trainings by `dtrain.train.trainer.train` over "
        f"{', '.join(f'{engine} with {sync}' for engine, sync in KINDS)} in turn. The first row is after {SETTLED} "
        "times, when all that is loaded once has been; growth is that of the largest later row over it. torch's flight "
        f"recorder keeps {RING_ENTRIES} collectives, as in all that dtrain launches; its own default is 2,000, which "
        "take 2 MiB once they are there, whoever makes them.\n\n"
    )
    return Report(
        "What attaching and training leave behind",
        text + "\n\n".join(body),
        ("python -m benchmarks leaks",),
        tuple(checks),
        {name: [list(row) for row in series] for name, series in rows.items()},
    )
