"""The report on `dtrain plan`'s memory: beside what torch's trackers count, and beside the growth of real processes.

Trackers: `FSDPMemTracker` under ``FakeTensorMode`` for fsdp. DDP and DeepSpeed read their tensors' memory, which fake
ones have not, so `MemTracker` counts their real tensors, over a process group that sends nothing: one process stands
for rank 0 of the replica. It is started before the engine is built, as it knows only what it has seen being made.

Processes: two ranks over gloo, built by the trainer's own set-up. A small run of the same kind goes before, so that
libraries, threads and groups are there; then the peak of the resident set is reset, and read after some steps. glibc's
mmap threshold is held at its initial value (mallopt(3)): by default it grows with what is freed, and large tensors then
share heaps whose gaps stay resident, which is no memory that anything holds. One run shows how much.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Session, say
from benchmarks.page import Report, at_most, table
from tests.programs.hosts import ROOT, environment

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dtrain.train.config import Config

ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
SHARDS, MIB = 2, 2**20
TRACKED_LINE, GROWTH_LINE = 0.03, 0.10

MODELS: Mapping[str, tuple[str, ...]] = {
    "transformer": ("model=small", "model.dim=512", "model.layers=8", "model.heads=8", "data.block=128"),
    "gpt2": ("model=hf", "model.weights=false", "data.block=128"),
    "convolutions": (
        "model=custom", "model._target_=benchmarks.plan_memory.Convolutions", "data=custom",
        "data._target_=benchmarks.plan_memory.Images",
    ),
}  # fmt: skip
"""Of each, the words of its configuration."""
SYNCS: Mapping[str, tuple[str, ...]] = {
    "diloco": ("sync=diloco", "sync.every_steps=3"),
    "dense": ("sync=dense",),
    "int8_ef": ("sync=every_step", "compress=int8_ef"),
    "powersgd_ef": ("sync=every_step", "compress=powersgd_ef"),
    "diloco_ef": ("sync=diloco", "sync.every_steps=3", "compress=int8_ef"),
    "streaming_diloco": ("sync=streaming_diloco", "sync.every_steps=4"),
}
FIXED_THRESHOLD = {"MALLOC_MMAP_THRESHOLD_": "131072"}
MESHES = {"1x2": ("mesh.replicate=1", "mesh.shard=2"), "2x1": ("mesh.replicate=2", "mesh.shard=1")}


@dataclass(frozen=True)
class Tracked:
    """Bytes at the peak of a step, of rank 0."""

    model: str
    engine: str
    precision: str
    activations: str
    planned: int
    tracked: int

    @property
    def error(self) -> float:
        return self.planned / self.tracked - 1


@dataclass(frozen=True)
class Grown:
    """Bytes by which the resident set of rank 0 grew, at most."""

    model: str
    engine: str
    mesh: str
    sync: str
    planned: int
    during: str
    measured: int

    @property
    def error(self) -> float:
        return self.planned / self.measured - 1


def tracked_cases() -> list[tuple[str, str, str, str, int]]:
    """Every model under every engine, in fp32 as it is, and in bf16 with activation checkpointing and accumulation."""
    settings = (("fp32", "plain", 1), ("bf16", "checkpointed", 2))
    return [(model, engine, *setting) for model in MODELS for engine in ENGINES for setting in settings]


def grown_cases() -> list[tuple[str, str, str, str]]:
    """Every engine, every model and every one of `SYNCS`."""
    cases = [("transformer", engine, "1x2", "diloco") for engine in ENGINES]
    cases += [("gpt2", "ddp", "1x2", "diloco"), ("gpt2", "fsdp", "1x2", "diloco")]
    cases += [("convolutions", "fsdp", "1x2", "diloco"), ("convolutions", "zero2", "1x2", "diloco")]
    return [*cases, *(("transformer", "ddp", "2x1", sync) for sync in SYNCS)]


def plan_memory(session: Session) -> Report:
    """All cases, each in processes of its own."""
    with ThreadPoolExecutor(2) as two:
        rows = two.map(lambda case: _child("tracked", *map(str, case)), tracked_cases())
        tracked = [Tracked(**row) for row in rows]
    grown = [Grown(**_child("grown", *case)) for case in grown_cases()]
    default = Grown(**_child("grown", "transformer", "fsdp", "1x2", "diloco", "default"))
    return plan_memory_report(tracked, grown, default)


def _child(*words: str) -> dict[str, Any]:
    say(f"python -m benchmarks.plan_memory {' '.join(words)}")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.plan_memory", *words],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def plan_memory_report(tracked: Sequence[Tracked], grown: Sequence[Grown], default: Grown) -> Report:
    """The page. ``default``: one of the cases under glibc's default settings."""
    one = [
        [f"{row.model}, {row.engine}", row.precision, row.activations, f"{row.planned / MIB:.2f}",
         f"{row.tracked / MIB:.2f}", f"{row.error:+.2%}"]
        for row in tracked
    ]  # fmt: skip
    two = [
        [f"{row.model}, {row.engine}", row.mesh, row.sync, row.during, f"{row.planned / MIB:.1f}",
         f"{row.measured / MIB:.1f}", f"{row.error:+.1%}"]
        for row in grown
    ]  # fmt: skip
    body = (
        "Peaks of one rank, in MiB. Planned: `dtrain plan`, from the configuration, without an engine. Two shards.\n\n"
        "Beside torch's trackers: FSDPMemTracker under FakeTensorMode for fsdp; MemTracker over real tensors for ddp "
        "and ZeRO, as their code reads memory that fake tensors have not. The engine is dtrain's own, over a process "
        "group that sends nothing. In bf16 a step has two microbatches, and activations are checkpointed.\n\n"
        + table(["model, engine", "precision", "activations", "planned", "tracked", "difference"], one)
        + "\n\nBeside the growth of the resident set of rank 0 of two processes over gloo, in fp32, AdamW, with "
        "glibc's mmap threshold held at its initial value; a small run of the same kind went before. What is planned "
        "is the largest of building the model, the step, and the exchange between steps.\n\n"
        + table(["model, engine", "mesh", "sync", "peak in", "planned", "measured", "difference"], two)
        + f"\n\nUnder glibc's default, whose threshold grows with what is freed, {default.model} with "
        f"{default.engine} grew by {default.measured / MIB:.1f} MiB, where {default.planned / MIB:.1f} are planned: "
        "the rest are gaps in its heaps. `MALLOC_MMAP_THRESHOLD_=131072` in the workers' environment avoids them."
    )
    worst_tracked = max(abs(row.error) for row in tracked)
    worst_grown = max(abs(row.error) for row in grown)
    models, engines = len({row.model for row in tracked}), len({row.engine for row in tracked})
    checks = (
        at_most(f"largest difference to the trackers, {models} models x {engines} engines", 100 * worst_tracked,
                100 * TRACKED_LINE, " %"),
        at_most(f"largest difference to the growth of a process, {len(grown)} runs", 100 * worst_grown,
                100 * GROWTH_LINE, " %"),
    )  # fmt: skip
    figures = {"tracked": [asdict(row) for row in tracked], "grown": [asdict(row) for row in grown]}
    return Report("Memory, planned and counted", body, ("python -m benchmarks plan_memory",), checks, figures)


# ---- models of its own ---------------------------------------------------------------------------------------------


def _images() -> type:
    import torch

    class Images:
        """Random images of 64 x 64, as a data set."""

        tokens_per_example = 1

        def __init__(self, split: str = "train") -> None:
            self._generator = torch.Generator().manual_seed(0)

        def __len__(self) -> int:
            return 64

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return {"image": torch.full((3, 64, 64), index / 64), "label": torch.tensor(index % 10)}

        def describe(self) -> dict[str, object]:
            return {"images": 64}

    return Images


def _convolutions() -> type:
    import torch.nn.functional as F
    from torch import nn

    class Residual(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(8, width)
            self.one = nn.Conv2d(width, width, 3, padding=1)
            self.two = nn.Conv2d(width, width, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = x + self.two(F.gelu(self.one(self.norm(x))))
            return out

    class Convolutions(nn.Module):
        """Residual blocks of convolutions, and a wide head: about 15 million parameters."""

        def __init__(self, width: int = 256, blocks: int = 8) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, width, 8, stride=8)
            self.blocks = nn.ModuleList(Residual(width) for _ in range(blocks))
            self.hidden = nn.Linear(width * 16, 1024)
            self.head = nn.Linear(1024, 10)

        def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
            x = self.stem(batch["image"].to(self.stem.weight.dtype))
            for block in self.blocks:
                x = block(x)
            x = F.avg_pool2d(x, 2).flatten(1)
            loss: torch.Tensor = F.cross_entropy(self.head(F.gelu(self.hidden(x))).float(), batch["label"])
            return loss

    return Convolutions


def __getattr__(name: str) -> Any:
    """`Images` and `Convolutions`, made when they are asked for, as torch takes seconds to import."""
    made = {"Images": _images, "Convolutions": _convolutions}
    if name not in made:
        raise AttributeError(name)
    globals()[name] = made[name]()
    return globals()[name]


# ---- in a process of its own ---------------------------------------------------------------------------------------


def _words(model: str, folder: Path, *more: str) -> list[str]:
    words = [*MODELS[model], f"run.dir={folder / 'run'}", "optim.inner.lr=0.001", *more]
    if model == "gpt2":
        words.append(f"model.path={_gpt2(folder)}")
    if model != "convolutions":
        text = folder / "text"
        text.mkdir(exist_ok=True)
        (text / "a.txt").write_text("What is planned is what is there. " * 6000)
        words.append(f"data.path={text}")
    return words


def _gpt2(folder: Path) -> Path:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=4096, n_positions=128, n_embd=512, n_layer=8, n_head=8, bos_token_id=None, eos_token_id=None
    )
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(folder / "gpt2")
    return folder / "gpt2"


def _fit(config: Config) -> Any:
    from dtrain.plan.machine import GPUS
    from dtrain.plan.planned import Planned

    return Planned.of(config).fit(GPUS["h100"])


def tracked(model: str, engine: str, precision: str, activations: str, microbatches: str) -> Tracked:
    """One case, in this process."""
    os.environ |= {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": str(SHARDS), "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = "29771"  # DeepSpeed asks for them; nothing is opened
    with tempfile.TemporaryDirectory() as folder:
        from dtrain.train.config import compose

        size = 4 * int(microbatches) * SHARDS
        config = compose(_words(
            model, Path(folder), f"engine={engine}", f"engine.precision={precision}", "mesh.replicate=1",
            f"mesh.shard={SHARDS}", f"engine.activation_checkpointing={str(activations == 'checkpointed').lower()}",
            f"train.batch_size={size}", "train.microbatch_size=4", "sync=diloco",
        ))  # fmt: skip
        planned = _planned_step(config)
        counted = _counted(config)
    return Tracked(model, engine, precision, activations, planned, counted)


def _planned_step(config: Config) -> int:
    """Without the sync, which no tracker runs, and without the batches of later microbatches, which it has not."""
    from dtrain.plan.memory import replayed
    from dtrain.plan.placement import Placement
    from dtrain.plan.planned import Planned

    planned = Planned.of(config)
    layout = planned.layout()
    reentrant = layout.checkpointed and layout.engine == "zero3"
    placement = Placement(
        shards=SHARDS, bf16=layout.bf16, bucket_mib=layout.bucket_mib, microbatches=layout.microbatches, exchanged=False
    )
    model = planned.describe(layout.casts, layout.checkpointed, reentrant)
    return replayed(model, layout.runs, placement, planned.optimizer).step


def _counted(config: Config) -> int:
    import torch
    import torch.distributed as dist
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.distributed._tools.mem_tracker import MemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from dtrain.plan.planned import Planned

    dist.init_process_group("fake", rank=0, world_size=SHARDS, store=FakeStore())
    planned, fsdp = Planned.of(config), config.engine.name == "fsdp"
    mesh = _silent_mesh()
    batch = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in planned.batch.items()}
    tracker: Any = MemTracker()
    with FakeTensorMode(allow_non_fake_inputs=True) if fsdp else tracker:
        engine = _engine(config, planned.build(), mesh)
        engine.pieces.set_gradient_exchange(None)
        if fsdp:
            limit = config.train.clip_norm
            # The engine reads the norm, which a fake tensor has not.
            engine.clip = lambda: torch.nn.utils.clip_grad_norm_(engine.model.parameters(), limit)
            # In the first step DTensor computes shapes on fake tensors of whole parameters, which would be counted.
            _step(engine, [batch] * planned.microbatches)
            tracker = FSDPMemTracker(engine.model, engine.optimizer)
            tracker.track_inputs((batch,))
        else:
            tracker.track_external(*batch.values())
        with tracker:
            for _ in range(3):
                _step(engine, _Batches([batch] * planned.microbatches, tracker.reset_mod_stats))
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return int(peak["Total"])


def _step(engine: Any, batches: Sequence[Any]) -> None:
    engine.forward_backward(batches)
    engine.pieces.finish()
    engine.clip()
    engine.pieces.step()


class _Batches(list[Any]):
    """The tracker wants to be told of each forward pass."""

    def __init__(self, items: Sequence[Any], before: Callable[[], None]) -> None:
        super().__init__(items)
        self._before = before

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            self._before()
            yield item


def _engine(config: Config, model: nn.Module, mesh: Any) -> Any:
    import torch.distributed as dist

    import dtrain.train.engines.zero as zero
    from dtrain.train.setup import _engine as made

    model.to = lambda *_: model  # type: ignore[method-assign]  # it is there, and fake tensors cannot be moved
    vars(zero)["kept_group"] = lambda ranks: dist.new_group(list(ranks))
    return made(config, model, mesh)


def _silent_mesh() -> Any:
    """Rank 0 of one replica; its channel answers with what it was sent."""
    import torch
    import torch.distributed as dist

    from dtrain.comm.channel import Channel
    from dtrain.comm.ops import AllGather, Op
    from dtrain.comm.transports.transport import CompletedWork, SelfTransport
    from dtrain.train.mesh import Mesh

    class Echo:
        rank, size, in_stream_order = 0, SHARDS, False

        def issue(self, op: Op) -> CompletedWork:
            if isinstance(op, AllGather):
                return CompletedWork(tuple(t.unsqueeze(0).repeat(self.size, *[1] * t.dim()) for t in op.payload))
            return CompletedWork(tuple(tensor.clone() for tensor in op.payload))

        def clone(self) -> Echo:
            return self

        def close(self) -> None: ...

    replica = dist.group.WORLD
    assert replica is not None
    mesh = Mesh(
        replicas=1, shards=SHARDS, replica=0, shard=0, device=torch.device("cpu"), engine_group=replica,
        channel=Channel({"replicate": SelfTransport(), "shard": Echo()}),
        control=Channel({"replicate": SelfTransport()}),
    )  # fmt: skip
    shards = mesh.shard_mesh()  # made of real tensors
    object.__setattr__(mesh, "shard_mesh", lambda: shards)
    return mesh


def grown(model: str, engine: str, mesh: str, sync: str, threshold: str = "fixed") -> Grown:
    """One case: two processes, of which this one is the parent."""
    heap = FIXED_THRESHOLD if threshold == "fixed" else {}
    with tempfile.TemporaryDirectory() as folder:
        words = _words(
            model, Path(folder), f"engine={engine}", *MESHES[mesh], *SYNCS[sync], "train.batch_size=8",
            "launcher.workers=2",
        )  # fmt: skip
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.plan_memory", "rank", str(rank), folder, model, *words],
                cwd=ROOT, env={**environment(), "OMP_NUM_THREADS": "1", **heap}, stdout=subprocess.PIPE, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        printed = [rank.communicate(timeout=600)[0] for rank in ranks]
        if any(rank.returncode for rank in ranks):
            raise RuntimeError(
                f"the ranks of {model} {engine} {mesh} {sync} ended with {[r.returncode for r in ranks]}"
            )
        from dtrain.train.config import compose

        memory = _fit(compose(words)).memory
    return Grown(model, engine, mesh, sync, memory.peak, memory.during, int(printed[0].splitlines()[-1]))


def _rank(rank: str, folder: str, model: str, *words: str) -> None:
    import torch.distributed as dist

    from dtrain.train.config import compose
    from dtrain.train.mesh import build_mesh

    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=int(rank), world_size=2)
    config = compose(list(words))
    small = {"transformer": ("model.dim=64", "model.layers=2", "model.heads=2"), "gpt2": (),
             "convolutions": ("model.width=16", "model.blocks=2")}[model]  # fmt: skip
    before = compose([*words, *small, "data.block=32"] if small and model != "convolutions" else [*words, *small])
    for each in (before, config):
        gc.collect()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        start = _resident("VmRSS")
        mesh = build_mesh(each.mesh.replicate, each.mesh.shard)
        _some_steps(each, mesh)
        growth = _resident("VmHWM") - start
    print(growth)
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)


def _some_steps(config: Config, mesh: Any, steps: int = 6) -> None:
    from dtrain.train.setup import build

    parts = build(config, mesh)
    for step in range(steps):
        parts.engine.set_learning_rate(parts.learning_rate(step))
        parts.engine.forward_backward(parts.share.microbatches(step))
        parts.attached.finish()
        parts.engine.clip()
        parts.attached.step()
    parts.attached.detach(saved=True)
    parts.engine.close()
    mesh.control.close()
    mesh.close()


def _resident(what: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    if kind == "rank":
        _rank(*rest)
    else:
        print(json.dumps(asdict(tracked(*rest) if kind == "tracked" else grown(*rest))))
        sys.stdout.flush()
        os._exit(0)  # DeepSpeed's and the fake group's threads would be waited for
