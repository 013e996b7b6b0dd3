"""Every example runs, learns, and sends what it says; dtrain takes at most five of its lines.

Lines that end in `# dtrain` are what it takes. Without them, or with what the mark says is to stand in their place, an
example is the program that its owner had before.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import dataclasses
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from _pytest.mark import ParameterSet
from torch import Tensor

from dtrain import every_step
from dtrain.comm.collectives.two_phase import two_phase_bytes
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.membership.members import serve
from dtrain.compress import cast, quantize
from dtrain.testing import WorkerPool
from tests.torch_versions import MUON

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
METHODS = "methods"
"""What examples share: no example itself."""
OWN = {"notebook", "lora", "come_and_go", "one_byte_members"}
"""Programs around dtrain's own trainer, or its runs that meet at a store: without dtrain nothing would be left."""
MARK = re.compile(r" *# dtrain(?:: .*|, in place of: (?P<before>.*))?$")


def source(name: str) -> str:
    return (ROOT / "examples" / f"{name}.py").read_text()


def before_dtrain(text: str) -> tuple[str, list[str]]:
    """The program without dtrain's lines, and those lines."""
    kept, ours = [], []
    for line in text.splitlines():
        mark = MARK.search(line)
        if mark is None:
            kept.append(line)
            continue
        ours.append(line[: mark.start()])
        if mark["before"]:
            kept.append(line[: len(line) - len(line.lstrip())] + mark["before"])
    return "\n".join(kept) + "\n", ours


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in {*OWN, METHODS}])
def test_dtrain_takes_at_most_five_lines_without_which_a_program_is_left(name: str) -> None:
    plain, ours = before_dtrain(source(name))
    assert 0 < len(ours) <= 5
    tree = ast.parse(plain)
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(str(module).startswith("dtrain") for module in imported)
    made = {part.group() for line in ours for part in re.finditer(r"\w+(?= = )|(?<=import ).*", line)}
    names = {name for part in made for name in part.split(", ")}
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    left = {node.id for node in used if isinstance(node.ctx, ast.Store)}  # "in place of" may give the same name
    assert not (names - left) & {node.id for node in used}


# ---- in the workers of the pool, which have imported torch -----------------------------------------------------------


@dataclass
class Ran:
    """What a rank has after an example. ``losses``: of each backward pass. ``weights``: one sum for each replica."""

    said: str
    losses: list[float]
    weights: float
    digest: int = 0
    exchanges: dict[str, tuple[int, int]] | None = None
    """By label: bytes sent, and what the formula says."""
    report: str = ""


@contextlib.contextmanager
def with_gpus_for_accelerate(name: str) -> Iterator[None]:
    """Accelerate takes FSDP2 on GPUs alone, and is told here that there are some."""
    if name != "accelerate_fsdp2":
        yield
        return
    import accelerate
    from accelerate.utils import DistributedType

    accelerate.PartialState(cpu=True)
    accelerate.PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    with mock.patch.object(accelerate, "Accelerator", partial(accelerate.Accelerator, cpu=True)):
        yield


@contextlib.contextmanager
def launched(name: str, arguments: list[str]) -> Iterator[tuple[io.StringIO, list[float]]]:
    """As torchrun starts a program, but within this process and its group; what it says, and its losses."""
    said, losses = io.StringIO(), list[float]()
    backward: Any = Tensor.backward

    def recorded(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        losses.append(float(loss.detach()))
        backward(loss, *args, **kwargs)

    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    variables = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world, "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "pool",
    }  # fmt: skip
    with (
        mock.patch.dict(os.environ, variables),
        mock.patch.object(sys, "argv", [f"examples/{name}.py", *arguments]),
        mock.patch.object(sys, "path", [str(ROOT / "examples"), *sys.path]),
        mock.patch.object(dist, "init_process_group", return_value=None),
        mock.patch.object(dist, "destroy_process_group", return_value=None),
        mock.patch.object(Tensor, "backward", recorded),
        contextlib.redirect_stdout(said),
        with_gpus_for_accelerate(name),
    ):
        try:
            yield said, losses
        finally:
            if "accelerate" in sys.modules:
                from accelerate.state import AcceleratorState, GradientState, PartialState

                AcceleratorState._reset_state(reset_partial_state=True)
                GradientState._reset_state()
                PartialState._reset_state()


def run(name: str, arguments: list[str], kind: str) -> Ran:
    """``kind``: "plain", before dtrain; "dense", with the mean of the gradients at every step; or "" as it is."""
    text = before_dtrain(source(name))[0] if kind == "plain" else source(name)
    variables: dict[str, Any] = {"__name__": "__main__"}
    ended, detached = list[dict[str, Any]](), Attached.detach
    with launched(name, arguments) as (said, losses):
        import methods  # type: ignore[import-not-found]  # of examples

        def detach(sync: Attached) -> None:
            ended.append(seen(sync, kind))
            detached(sync)

        with (
            mock.patch.object(methods, "chosen", every_step if kind == "dense" else methods.chosen),
            mock.patch.object(Attached, "detach", detach),
        ):
            exec(compile(text, f"examples/{name}.py", "exec"), variables)
    sync: Attached | None = variables.get("sync")
    if isinstance(sync, Attached) and not ended:
        sync.close_round()
        ended.append(seen(sync, kind))
    model: Any = variables["model"] if "model" in variables else variables["trainer"].model
    local = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    ran = Ran(said.getvalue(), losses, sum(float(p.detach().double().sum()) for p in local))
    return dataclasses.replace(ran, **ended[0]) if ended else ran


def seen(sync: Attached, kind: str) -> dict[str, Any]:
    """Of a sync whose round is closed: what `Ran` has of it."""
    exchanges = exchanged(sync) if kind == "" else None
    return {"report": sync.report(), "exchanges": exchanges, "digest": sync.digest()}


def exchanged(sync: Attached) -> dict[str, tuple[int, int]]:
    """By the label of what is exchanged: the bytes that were sent, and those of as many exchanges by the formula."""
    loop = getattr(sync.method, "cadence", None)
    numels = {fqn: segment.numel for fqn, segment in sync.pieces.segments.items()}
    groups = {"gradients": list(numels)} if loop is None else {loop.label(f): f.fqns for f in loop.fragments}
    coder = quantize(bits=8) if loop is None else cast("fp32")
    rows = {}
    for label, fqns in groups.items():
        counts = {op: count for (axis, its, op), count in sync.meter.by.items() if (axis, its) == ("replicate", label)}
        messages = counts["AllToAll"].messages
        empty = two_phase_bytes([], coder, 2, weighted=loop is not None)
        whole = two_phase_bytes([numels[fqn] for fqn in fqns if fqn in numels], coder, 2, weighted=loop is not None)
        exchanges = messages if loop is not None else sync.steps
        rows[label] = sync.meter.sent_as(label), exchanges * (whole - empty) + messages * empty
    return rows


def in_pool(pool: WorkerPool, name: str, *arguments: str, kind: str = "", world: int = 2) -> list[Ran]:
    return pool.run(run, name, list(arguments), kind, world=world)


@dataclass(frozen=True)
class Framework:
    """An example that takes a method by name. ``falls``: its last losses are below that share of its first.

    ``arguments``: {} is a folder of its own. ``also``: what else it must have left there and said.
    """

    ranks: int = 2
    arguments: tuple[str, ...] = ()
    falls: float = 0.3
    also: Callable[[str, Path, int], None] = lambda said, folder, shards: None


def logged_by_hugging_face(said: str, folder: Path, shards: int) -> None:
    losses, evaluated = (
        [float(loss) for loss in re.findall(rf"'{label}': '(\S+)'", said)] for label in ("loss", "eval_loss")
    )
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.5
    # The first comes before the first round of a stream has ended, at the outer parameters: those of the start.
    assert len(evaluated) == 3 and max(evaluated[1:]) < 4.5  # a byte drawn evenly has log(256), 5.5
    assert re.findall(r"'dtrain_sent_bytes': (\d+), 'dtrain_skipped_steps': 0", said)
    assert (folder / "checkpoint-30" / "dtrain" / "replica-1-of-2.shard-0-of-1.safetensors").exists()


def logged_by_lightning(said: str, folder: Path, shards: int) -> None:
    rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    losses, values = ([float(row[name]) for row in rows if row[name]] for name in ("loss", "val_loss"))
    assert losses[-1] < 0.2 * losses[0] and values[-1] == min(values) and f"val_loss {values[-1]:.3f}" in said
    sent = [float(row["dtrain_sent_bytes"]) for row in rows if row["dtrain_sent_bytes"]]
    assert sent == sorted(sent) and sent[-1] > sent[0]
    assert {row["dtrain_skipped_steps"] for row in rows} == {"", "0.0"}
    (checkpoint,) = folder.glob("*.ckpt")
    files = {path.name for path in Path(f"{checkpoint}.dtrain").iterdir()}
    places = [(replica, shard) for replica in range(2) for shard in range(shards)]
    assert files == {f"replica-{replica}-of-2.shard-{shard}-of-{shards}.safetensors" for replica, shard in places}


HUGGING_FACE = Framework(arguments=("{}",), falls=0.8, also=logged_by_hugging_face)
FRAMEWORKS = {
    "nanogpt_compile": Framework(arguments=("--backend", "aot_eager"), falls=0.8),
    "two_optimizers": Framework(),
    "torchtitan_style": Framework(4, ("{}", "57")),
    "hsdp_fsdp2": Framework(4),
    "accelerate_loop": Framework(),
    "accelerate_fsdp2": Framework(4),
    "hf_trainer": HUGGING_FACE,
    "hf_lora": HUGGING_FACE,
    "trl_sft": HUGGING_FACE,
    "lightning_trainer": Framework(arguments=("{}",), also=logged_by_lightning),
    "lightning_fsdp2": Framework(4, ("{}",), also=logged_by_lightning),
    "fabric_loop": Framework(),
}
NEEDS = {"two_optimizers": [MUON]}
"""What an example needs that the oldest torch has not."""
BITWISE = ("nanogpt_compile", "two_optimizers", "torchtitan_style")
"""Those whose dense runs are compared here; tests/integrations does so for the others."""


def params(names: Iterable[str]) -> list[ParameterSet]:
    return [pytest.param(name, marks=NEEDS.get(name, [])) for name in names]


def arguments(name: str, folder: Path) -> list[str]:
    return [str(folder) if word == "{}" else word for word in FRAMEWORKS[name].arguments]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("sync", ["diloco", "streaming", "int8"])
@pytest.mark.parametrize("name", params(FRAMEWORKS))
def test_each_method_learns_and_ends_with_equal_replicas(
    pool: WorkerPool, name: str, sync: str, tmp_path: Path
) -> None:
    example = FRAMEWORKS[name]
    ranks = in_pool(pool, name, *arguments(name, tmp_path), "--sync", sync, world=example.ranks)
    assert len({ran.digest for ran in ranks}) == 1 and ranks[0].digest
    assert ranks[0].weights == ranks[example.ranks // 2].weights
    for ran in ranks:
        assert sum(ran.losses[-6:]) < example.falls * sum(ran.losses[:6])
        assert "0 skipped, sent" in ran.report and ran.exchanges
        assert all(sent == declared > 0 for sent, declared in ran.exchanges.values()), ran.exchanges
    example.also(ranks[0].said, tmp_path, example.ranks // 2)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", params(BITWISE))
def test_dense_is_the_program_without_dtrain(pool: WorkerPool, name: str, tmp_path: Path) -> None:
    world = FRAMEWORKS[name].ranks
    plain, dense = (
        in_pool(pool, name, *arguments(name, tmp_path / kind), kind=kind, world=world) for kind in ("plain", "dense")
    )
    for theirs, ours in zip(plain, dense, strict=True):
        assert theirs.report == "" != ours.report
        assert ours.losses[:30] == pytest.approx(theirs.losses[:30], rel=1e-5, abs=1e-5) and len(ours.losses) > 30


@pytest.mark.timeout(300)
def test_a_trainer_as_torchtitans_goes_on_bitwise_within_a_round(pool: WorkerPool, tmp_path: Path) -> None:
    name, sync = "torchtitan_style", ("--sync", "streaming")
    in_pool(pool, name, str(tmp_path / "twice"), "27", *sync, world=4)
    twice = in_pool(pool, name, str(tmp_path / "twice"), "53", *sync, world=4)
    once = in_pool(pool, name, str(tmp_path / "once"), "53", *sync, world=4)
    for rank, resumed in zip(once, twice, strict=True):
        assert rank.losses[27:] == resumed.losses and rank.digest == resumed.digest
        assert rank.said.splitlines()[-1] == resumed.said.splitlines()[-1]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "world"), [("diloco_fsdp2", 4), ("deepspeed_zero", 4)])
def test_runs_and_learns(pool: WorkerPool, name: str, world: int) -> None:
    ranks = in_pool(pool, name, world=world)
    losses = [float(loss) for loss in re.findall(r"step \d+: loss (\S+)", ranks[0].said)]
    assert losses[-1] < 0.2 * losses[0]
    assert "0 skipped, sent" in (ranks[0].report or ranks[0].said)
    assert ranks[0].weights == ranks[world // 2].weights


@pytest.mark.timeout(300)
def test_going_on_within_a_round_is_never_having_stopped(pool: WorkerPool, tmp_path: Path) -> None:
    in_pool(pool, "save_and_resume", str(tmp_path / "twice"), "27")
    again = in_pool(pool, "save_and_resume", str(tmp_path / "twice"), "50")
    once = in_pool(pool, "save_and_resume", str(tmp_path / "once"), "50")
    assert again[0].said == once[0].said and "step 50" in once[0].said
    assert [rank.losses for rank in again] == [rank.losses[27:] for rank in once]


# ---- started as the examples say -------------------------------------------------------------------------------------


def torchrun(workers: int, name: str, *arguments: str) -> str:
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    command = [*run, f"examples/{name}.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_is_launched_and_learns() -> None:
    said = torchrun(2, "plain_ddp")
    losses = [float(loss) for loss in re.findall(r"step \d+: loss (\S+)", said)]
    assert losses[-1] < 0.2 * losses[0]
    assert "0 skipped, sent" in said


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_replicas_that_are_runs_of_their_own_meet_and_learn() -> None:
    said = three_members("come_and_go")
    assert {slot for text in said for slot in re.findall(r"replica (\d) of 3", text)} == {"0", "1", "2"}
    for text in said:
        losses = [float(loss) for loss in re.findall(r"loss (\S+)", text)]
        assert losses[-1] < 0.2 * losses[0]


@pytest.mark.processes
@pytest.mark.timeout(120)
def test_machines_that_tell_a_byte_end_with_the_same_weights(tmp_path: Path) -> None:
    said = three_members("one_byte_members", str(tmp_path), "200")
    assert len({digest for text in said for digest in re.findall(r"with the weights (\w{16})", text)}) == 1
    for text in said:
        losses = [float(loss) for loss in re.findall(r"loss (\S+)", text)]
        assert losses[-1] < 0.2 * losses[0]
        assert "its log of 200 steps reproduces them" in text


@pytest.mark.processes
@pytest.mark.timeout(240)
@pytest.mark.parametrize("workers", [1, 2])
def test_the_cells_of_a_notebook_run_in_one_process_and_in_several(workers: int, tmp_path: Path) -> None:
    said = torchrun(2, "notebook", str(tmp_path)) if workers == 2 else alone("notebook", str(tmp_path))
    losses = [float(loss) for loss in re.findall(r"step \d+/200  loss (\S+)", said)]
    assert losses[-1] < 0.5 * losses[0] and "finished at step 200" in said and "loaded True" in said


@pytest.mark.processes
@pytest.mark.timeout(240)
def test_adapters_are_trained_measured_continued_and_exported() -> None:
    pytest.importorskip("peft")
    said = alone("lora")
    first, last = map(float, re.findall(r"validation loss (\S+) to (\S+)", said)[0])
    assert last < first and "bits per byte" in said and "adapter_model.safetensors" in said


def alone(name: str, *arguments: str) -> str:
    command = [sys.executable, f"examples/{name}.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=220)
    assert done.returncode == 0, done.stderr
    return done.stdout


def three_members(name: str, *arguments: str) -> list[str]:
    store = serve(0)
    command = [sys.executable, f"examples/{name}.py", f"localhost:{store.port}", *arguments]
    started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=100)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    return said


TESTED = {*FRAMEWORKS, *OWN, "diloco_fsdp2", "plain_ddp", "deepspeed_zero", "save_and_resume"}


def test_all_are_tested() -> None:
    assert {*EXAMPLES} - {METHODS} == TESTED
