"""The parts of ranks on another mesh: nothing is lost where replicas stay, and means where they do not."""

from __future__ import annotations

import itertools
import math
import os
import pickle
import tempfile
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adafactor, AdamW

from dtrain import attach, diloco, every_step, streaming_diloco
from dtrain.comm import tensor_file
from dtrain.comm.adapters.dcp_parts import parts_of_checkpoint
from dtrain.comm.adapters.other_mesh import Wanted, mesh_of, remade
from dtrain.comm.layout import Segment
from dtrain.comm.ops import Place
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.method import Sync
from dtrain.comm.state import Kind
from dtrain.compress import error_feedback, powersgd, topk
from dtrain.testing import WorkerPool
from tests.comm.adapters.test_attach import backward, small

SHAPES = {"a": (5, 3), "b": (4,)}
KINDS: dict[str, Kind] = {"anchor": "replicated", "residual": "per_worker", "factor": "opaque"}
MESHES = [(1, 1), (2, 1), (2, 2), (3, 2), (2, 3)]


# ---- pure ------------------------------------------------------------------------------------------------------------


def segments(shard: int, shards: int) -> dict[str, Segment]:
    """Rows of dim 0, as FSDP2 cuts them; empty ones are left out."""
    cut = {}
    for fqn, (rows, *rest) in SHAPES.items():
        width, row = -(-rows // shards), math.prod(rest)
        begin, end = min(shard * width, rows), min((shard + 1) * width, rows)
        if end > begin:
            cut[fqn] = Segment(fqn, begin * row, (end - begin) * row)
    return cut


def values(fqn: str, replica: int, salt: int) -> Tensor:
    """Of a whole parameter."""
    return torch.arange(math.prod(SHAPES[fqn]), dtype=torch.float32) + 100 * salt + 10 * replica


def part(replica: int, shard: int, shards: int) -> dict[str, Any]:
    """As a rank saves it, under a local update."""
    cut = segments(shard, shards)

    def piece(fqn: str, salt: int, replica: int = replica) -> Tensor:
        return values(fqn, replica, salt)[cut[fqn].offset : cut[fqn].stop]

    lies = {fqn: [segment.offset, segment.numel] for fqn, segment in cut.items()}
    state = {
        number: {
            "step": torch.tensor(3.0 + replica),
            "exp_avg": piece(fqn, 2).view(-1, *SHAPES[fqn][1:]),
            "momentum_buffer": None,
        }
        for number, fqn in enumerate(SHAPES)
        if fqn in cut
    }
    tensors = {fqn: {"anchor": piece(fqn, 3, 0), "residual": piece(fqn, 4), "factor": torch.ones(2)} for fqn in cut}
    return {
        "format": 1, "segments": lies, "held": lies, "parameters": {fqn: piece(fqn, 1) for fqn in cut},
        "buffers": {"mean": torch.tensor([float(replica)]), "count": torch.tensor(replica)},
        "optimizer": {"state": state, "groups": [{"lr": 0.1}]},
        "sync": {"its place": {"tensors": tensors, "numbers": {"steps": 7, "own": replica}, "sync": "diloco"}},
    }  # fmt: skip


def wanted(replica: int, replicas: int, shard: int, shards: int, **others: Any) -> Wanted:
    cut = segments(shard, shards)
    stepped = []
    for fqn, shape in SHAPES.items():
        numel = cut[fqn].numel if fqn in cut else 0
        stepped.append((fqn, torch.Size([numel // math.prod(shape[1:]), *shape[1:]])))
    every: dict[str, Any] = {"shapes": SHAPES, "stepped": stepped, "kinds": KINDS, "live": "per_worker", **others}
    return Wanted(segments=cut, held=cut, place=Place(replica, replicas), **every)


@pytest.mark.parametrize(("saved", "now"), [*itertools.product(MESHES, repeat=2)])
def test_every_rank_gets_its_pieces_or_their_mean(saved: tuple[int, int], now: tuple[int, int]) -> None:
    for replica, shard in itertools.product(*map(range, now)):
        need = wanted(replica, now[0], shard, now[1])
        content = remade(lambda r, s: part(r, s, saved[1]), saved, need)
        of = replica if saved[0] == now[0] else (saved[0] - 1) / 2  # `values` is linear in the replica
        assert content["parameters"].keys() == need.segments.keys()
        for number, fqn in enumerate(SHAPES):
            if fqn not in need.segments:
                continue
            where = slice(need.segments[fqn].offset, need.segments[fqn].stop)
            kept, state = content["sync"]["tensors"][fqn], content["optimizer"]["state"][number]
            found = [content["parameters"][fqn], state["exp_avg"].reshape(-1), kept["anchor"], kept["residual"]]
            for salt, tensor in enumerate(found, start=1):
                expected = values(fqn, 0, salt) + (0 if salt == 3 else 10 * of)
                assert torch.equal(tensor, expected[where])
            assert state["step"] == 3.0 + (replica if saved[0] == now[0] else 0) and "factor" not in kept
            assert state["exp_avg"].shape[1:] == SHAPES[fqn][1:] and "momentum_buffer" not in state
        first = replica if saved[0] == now[0] else 0
        assert content["buffers"]["mean"] == of and content["buffers"]["count"] == first
        assert content["sync"]["numbers"] == {"steps": 7, "own": first} and content["sync"]["sync"] == "diloco"


def test_parameters_that_are_equal_on_all_replicas_are_taken_from_the_first() -> None:
    content = remade(lambda r, s: part(r, s, 1), (3, 1), wanted(1, 2, 0, 1, live="replicated"))
    assert torch.equal(content["parameters"]["a"], values("a", 0, 1))
    assert torch.equal(content["sync"]["tensors"]["a"]["residual"], values("a", 1, 4))  # the mean of three


def with_factored_state(replica: int, shard: int) -> dict[str, Any]:
    saved = part(replica, shard, 2)
    saved["optimizer"]["state"][0]["row_var"] = torch.ones(3, 1)
    return saved


def of_an_earlier_version(replica: int, shard: int) -> dict[str, Any]:
    return {name: value for name, value in part(replica, shard, 2).items() if name not in ("segments", "held")}


@pytest.mark.parametrize(
    ("read", "others", "words"),
    [
        (with_factored_state, {}, "row_var of a has shape"),
        (of_an_earlier_version, {}, "an earlier version of dtrain saved this"),
        (None, {"shapes": {**SHAPES, "c": (2,)}}, "parameters of another model: c is only here"),
        (None, {"stepped": None}, "saved in another engine"),
        (None, {"kinds": {"anchor": "partitioned"}}, "kept by one rank for all"),
    ],
)
def test_what_cannot_be_cut_is_refused(read: Any, others: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        remade(read or (lambda r, s: part(r, s, 2)), (2, 2), wanted(0, 3, 0, 1, **others))


@pytest.mark.parametrize(
    ("names", "mesh"),
    [
        ([], None),
        (["dtrain.replica-0-of-1.shard-0-of-2", "dtrain.replica-0-of-1.shard-1-of-2"], (1, 2)),
        (["replica-0-of-1.shard-0-of-1", "replica-0-of-2.shard-0-of-1"], None),
    ],
)
def test_a_mesh_is_told_by_the_names_of_all_its_parts(names: list[str], mesh: tuple[int, int] | None) -> None:
    assert mesh_of(names) == mesh


# ---- in processes ----------------------------------------------------------------------------------------------------

SPECS: dict[str, Sync] = {
    "top-k": every_step(compress=error_feedback(topk(0.2))),
    "low rank": every_step(compress=error_feedback(powersgd(1))),
    "diloco": diloco(every_steps=4),
    "streaming": streaming_diloco(every_steps=4, overlap_steps=2, layers_per_fragment=0),
}
STEPS = 6


def attached(kind: str, name: str, seed: int = 0, make: Any = AdamW) -> tuple[nn.Module, Attached]:
    """Two replicas if sharded ("fsdp"), else one on each rank."""
    net = small(seed)
    model = cast(nn.Module, DistributedDataParallel(net)) if kind == "ddp" else cast(nn.Module, net)
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
        for layer in (net[0], net[2], net):
            fully_shard(layer, mesh=mesh)
    return model, attach(model, make(model.parameters(), lr=0.01), SPECS[name])


def saved_on(kind: str, name: str, folder: str, by_dcp: bool) -> None:
    model, sync = attached(kind, name)
    for step in range(STEPS):
        backward(model, dist.get_rank(), step)
        sync.step()
    if by_dcp:
        save({"sync": sync.checkpoint}, checkpoint_id=f"{folder}/dcp")
    sync.save(folder)
    sync.detach()


def resumed_on(kind: str, name: str, folder: str) -> tuple[int, dict[str, Tensor], dict[str, Tensor], int, int]:
    """The step, this rank's parameters and residuals or anchors, and digests of the replicas some steps later."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, sync = attached(kind, name, seed=1)
        sync.load(folder)
    assert len([w for w in caught if "was saved on" in str(w.message)]) == (dist.get_rank() == 0)
    steps, parameters = sync.steps, sync.pieces.read()
    kept = "residual" if "residual" in sync.state.kinds else "anchor"
    tensors = {fqn: named[kept].clone() for fqn, named in sync.state.tensors.items()}
    for step in range(STEPS, STEPS + 4):
        backward(model, dist.get_rank(), step)
        sync.step()
    sync.close_round()
    digest = sync.digest()
    sync.detach()
    return steps, parameters, tensors, sync.skipped, digest


def in_files(folder: str) -> list[dict[str, Any]]:
    """The parts of replicas that are one rank each."""
    paths = sorted(Path(folder).glob("replica-*.safetensors"))
    return [cast("dict[str, Any]", tensor_file.read(path)) for path in paths]


@pytest.mark.processes
@pytest.mark.parametrize(("name", "kind"), [("top-k", "ddp"), ("low rank", "ddp"), ("diloco", "plain")])
def test_more_replicas_begin_with_the_mean_of_those_there_were(pool: WorkerPool, name: str, kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pool.run(saved_on, kind, name, folder, False, world=2)
        saved = in_files(folder)
        ranks = pool.run(resumed_on, kind, name, folder, world=4)
    assert len({digest for *_, digest in ranks}) == 1
    for steps, parameters, tensors, skipped, _ in ranks:
        assert (steps, skipped) == (STEPS, 0)
        for fqn, value in parameters.items():
            first, second = (content["parameters"][fqn] for content in saved)
            assert torch.equal(value, ((first.double() + second.double()) / 2).float())
            if fqn not in tensors:  # sent as it is, without a residual
                continue
            kept = "anchor" if name == "diloco" else "residual"
            one, other = (next(iter(content["sync"].values()))["tensors"][fqn][kept] for content in saved)
            assert torch.equal(tensors[fqn], ((one.double() + other.double()) / 2).float())


@pytest.mark.processes
@pytest.mark.parametrize("by_dcp", [True, False])
def test_as_many_replicas_of_fewer_ranks_have_exactly_what_they_had(pool: WorkerPool, by_dcp: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pool.run(saved_on, "fsdp", "streaming", folder, by_dcp, world=4)
        saved = in_files(folder)  # replica 0's two, then replica 1's
        ranks = pool.run(resumed_on, "fsdp", "streaming", f"{folder}/dcp" if by_dcp else folder, world=2)
    assert len({digest for *_, digest in ranks}) == 1
    for replica, (steps, parameters, tensors, _, _) in enumerate(ranks):
        assert steps == STEPS
        shards = saved[2 * replica : 2 * replica + 2]
        for fqn, value in parameters.items():
            assert torch.equal(value, torch.cat([s["parameters"][fqn] for s in shards if fqn in s["parameters"]]))
            anchors = [next(iter(s["sync"].values()))["tensors"] for s in shards]
            assert torch.equal(tensors[fqn], torch.cat([each[fqn]["anchor"] for each in anchors if fqn in each]))


def by_dcp_alone(folder: str) -> str:
    model, sync = attached("plain", "diloco")
    backward(model, dist.get_rank(), 0)
    sync.step()
    if dist.get_world_size() == 2:
        save({"sync": sync.checkpoint}, checkpoint_id=folder)
        return ""
    try:
        load({"sync": sync.checkpoint}, checkpoint_id=folder)
    except CheckpointException as error:
        return str(error)
    return "loaded"


@pytest.mark.processes
def test_dcp_itself_does_not_load_on_another_number_of_ranks(pool: WorkerPool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pool.run(by_dcp_alone, folder, world=2)
        assert all("Missing key" in said for said in pool.run(by_dcp_alone, folder, world=3))


def adafactor_elsewhere(folder: str) -> str:
    model, sync = attached("plain", "diloco", make=Adafactor)
    if dist.get_world_size() == 2:
        for step in range(2):
            backward(model, dist.get_rank(), step)
            sync.step()
        sync.save(folder)
        return ""
    try:
        sync.load(folder)
    except ValueError as error:
        return str(error)
    return "loaded"


@pytest.mark.processes
def test_what_is_not_elementwise_is_refused_on_all_ranks(pool: WorkerPool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        pool.run(adafactor_elsewhere, folder, world=2)
        assert all("what is not elementwise" in said for said in pool.run(adafactor_elsewhere, folder, world=3))


def test_a_damaged_list_of_dcp_is_a_value_error(tmp_path: Path) -> None:
    for content in (b"", b"no pickle", b"\x80\x04\x95"):
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(ValueError, match=r"\.metadata is damaged"):
            parts_of_checkpoint(tmp_path)


class Runs:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


class Part:
    """As `Attached.checkpoint`; ``content`` may be what no rank has saved."""

    def __init__(self, content: object) -> None:
        self.content = content

    def state_dict(self) -> dict[str, object]:
        return {"dtrain.replica-0-of-1.shard-0-of-1": self.content}

    def load_state_dict(self, state: dict[str, object]) -> None:
        raise NotImplementedError


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_nothing_in_a_checkpoint_of_dcp_is_run(tmp_path: Path) -> None:
    made, folder = tmp_path / "made", tmp_path / "dcp"
    save({"sync": Part(tensor_file.encoded({"a": 1}))}, checkpoint_id=folder, no_dist=True)
    assert [read() for read in parts_of_checkpoint(folder).values()] == [{"a": 1}]
    folder = tmp_path / "other"
    save({"sync": Part(Runs(made))}, checkpoint_id=folder, no_dist=True)
    (read,) = parts_of_checkpoint(folder).values()
    with pytest.raises(ValueError, match="cannot be read"):
        read()
    (folder / ".metadata").write_bytes(pickle.dumps(Runs(made)))
    with pytest.raises(ValueError, match="mkdir, which no list of DCP has"):
        parts_of_checkpoint(folder)
    assert not made.exists()
