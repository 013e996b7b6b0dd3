"""What `Attached.load` makes of the parts of another mesh, and of a folder of ``torch.distributed.checkpoint``."""

from __future__ import annotations

import functools
import json
import pickle
import struct
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from dtrain import attach, every_step
from dtrain.comm import tensor_file
from dtrain.comm.adapters.dcp_parts import LIST, parts_of_checkpoint
from dtrain.compress import error_feedback, topk
from tests.comm.zoo import draw
from tests.fuzz.harness import Case, Target
from tests.fuzz.targets.weights import opened, sealed


class Part:
    """As `Attached.checkpoint`."""

    def __init__(self, replica: int) -> None:
        self.replica = replica

    def state_dict(self) -> dict[str, bytes]:
        return {f"dtrain.replica-{self.replica}-of-2.shard-0-of-1": tensor_file.encoded(_content(self.replica))}

    def load_state_dict(self, state: dict[str, bytes]) -> None:
        raise NotImplementedError


def _content(replica: int) -> dict[str, object]:
    return {"w": torch.arange(6.0).view(2, 3) + replica, "format": 1}


class Runs:
    """Whoever unpickles it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.mkdir, (self.path,)


def dcp(name: str, folder: Path) -> Case:
    """One of its files, the list or that of the parts: no code is run, and what is read is what was saved."""
    warnings.simplefilter("ignore")
    save({"one": Part(0), "other": Part(1), "w": torch.ones(2), "step": 3}, checkpoint_id=folder / "dcp", no_dist=True)
    file = folder / "dcp" / name
    made = folder / "made"
    bombs = (
        pickle.dumps(Runs(made)), pickle.dumps([Runs(made)], 0), b"cposix\nsystem\n(S'true'\ntR.",
        b"\x80\x04Nr\xff\xff\xff\x7f.", b"\x80\x04\x96" + struct.pack("<Q", 2**40) + b".",
        b"\x80\x04" + b"\x8e" + struct.pack("<Q", 2**62), b"(" * 100_000 + b".", b"\x80\x04]" + b"2a" * 1000 + b".",
    )  # fmt: skip

    def read(data: bytes) -> object:
        file.write_bytes(data)
        return {place: part() for place, part in parts_of_checkpoint(folder / "dcp").items()}

    def check(found: object, intact: bool) -> None:
        assert isinstance(found, dict) and not made.exists()
        expected = {f"replica-{replica}-of-2.shard-0-of-1": repr(_content(replica)) for replica in range(2)}
        assert all(repr(value) in expected.values() for value in found.values())
        assert not intact or {place: repr(value) for place, value in found.items()} == expected

    return Case(file.read_bytes(), read, (ValueError, FileNotFoundError), check, extra=bombs)


def other_mesh(folder: Path) -> Case:
    """One of two replicas' parts, sealed anew, loaded by one: what fits model, optimizer and sync, or no change."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    optimizer = AdamW(model.parameters(), lr=0.01)
    sync = attach(model, optimizer, every_step(compress=error_feedback(topk(0.5))))
    for seed in range(2):
        model(draw(seed, 12).view(4, 3)).square().mean().backward()
        sync.step()
    sync.save(folder)
    (saved,) = folder.glob("*.safetensors")
    parts = [folder / f"replica-{replica}-of-2.shard-0-of-1.safetensors" for replica in range(2)]
    for part in parts:
        part.write_bytes(saved.read_bytes())
    saved.unlink()
    header, described, tensors = opened(parts[1].read_bytes())

    def state() -> str:
        return repr([model.state_dict(), optimizer.state_dict(), sync.state.tensors, sync.numbers])

    def read(data: bytes) -> object:
        try:
            content = json.loads(data)
            parts[1].write_bytes(sealed(content["header"], json.dumps(content["value"]), tensors))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise tensor_file.DamagedFile(str(error)) from error
        before = state()
        try:
            sync.load(folder)
        except Exception:
            assert state() == before, "a refused part changed something"
            raise
        return sync

    def check(found: object, intact: bool) -> None:
        values: list[Any] = [*model.parameters(), *(t for named in sync.state.tensors.values() for t in named.values())]
        assert {str(value.dtype) for value in values} == {"torch.float32"}

    intact = json.dumps({"header": header, "value": json.loads(described)}).encode()
    return Case(intact, read, (ValueError,), check, json=True)


TARGETS = (
    Target("checkpoint of DCP: list", functools.partial(dcp, LIST)),
    Target("checkpoint of DCP: parts", functools.partial(dcp, "__0_0.distcp")),
    Target("sync.load: part of another mesh sealed anew", other_mesh),
)
