"""Checkpoints, exports and token files: all that holds weights or data, and says by a digest that it is whole."""

from __future__ import annotations

import functools
import json
import struct
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW

from dtrain import attach, diloco
from dtrain.comm import tensor_file
from dtrain.comm.layout import Segment, even_slice
from dtrain.errors import CheckpointError, DataError, ResumeError
from dtrain.train.checkpoint import Placement, load, newest
from dtrain.train.checkpoint.manifest import MANIFEST, _seal, data_name
from dtrain.train.checkpoint.state import RankState
from dtrain.train.checkpoint.weights import weights_of
from dtrain.train.data.tokenize import tokenize
from dtrain.train.data.tokens import MANIFEST as DESCRIPTION
from dtrain.train.data.tokens import TOKENS, TokenFile
from tests.comm.zoo import draw
from tests.fakes.checkpoint_threads import write_together
from tests.fuzz.harness import Case, Target

SHAPES = {"a.weight": (3, 2), "b.bias": (5,)}
_NUMEL = {"a.weight": 6, "b.bias": 5}
_WHOLE = {fqn: Segment(fqn, 0, numel) for fqn, numel in _NUMEL.items()}


def saved(folder: Path, step: int = 1, *, replicas: int = 2, shards: int = 2) -> Path:
    """A checkpoint of a small model; returns its step folder."""
    states = []
    for rank in range(replicas * shards):
        segments = {fqn: even_slice(fqn, n, part=rank % shards, parts=shards) for fqn, n in _NUMEL.items()}
        values = {
            fqn: (torch.arange(_NUMEL[fqn]) + 100.0 * step)[part.offset : part.stop] for fqn, part in segments.items()
        }
        states.append(
            RankState(
                segments=segments,
                sections={"parameters": values, "sync.residual": {fqn: v / 7 for fqn, v in values.items()}},
                kinds={"parameters": "replicated", "sync.residual": "per_worker"},
                numbers={"step": step},
                buffers={"bn.mean": torch.tensor([1.0])},
            )
        )
    return write_together(folder, step=step, states=states, shards=shards, shapes=SHAPES)


def _expected(step: int) -> dict[str, Tensor]:
    return {fqn: torch.arange(numel) + 100.0 * step for fqn, numel in _NUMEL.items()}


def _require_values(found: dict[str, Tensor], step: int) -> None:
    wanted = _expected(step)
    assert found.keys() == wanted.keys()
    for fqn, tensor in wanted.items():
        assert torch.equal(found[fqn].reshape(-1), tensor), f"{fqn} is {found[fqn]}"


def checkpoint(name: str, folder: Path) -> Case:
    """One file of the newer of two checkpoints: it is loaded as it was written, or the older one is."""
    older, newer = saved(folder, 1), saved(folder, 2)
    file = newer / name

    def read(data: bytes) -> object:
        file.write_bytes(data)
        path = newest(folder)
        assert path is not None
        return path, load(path, place=Placement(0, 1, 0, 1), segments=_WHOLE, shapes=SHAPES)

    def check(found: object, intact: bool) -> None:
        path, state = cast(tuple[Path, RankState], found)
        assert path in (older, newer) and (not intact or path == newer)
        _require_values(state.sections["parameters"], 1 if path == older else 2)

    return Case(file.read_bytes(), read, (ResumeError,), check, json=name == MANIFEST,
                others=((older / name).read_bytes(),))  # fmt: skip


def sealed_manifest(folder: Path) -> Case:
    """A manifest whose own checksum is right, and whose content makes no sense: another program wrote it."""
    path = saved(folder)
    body = json.loads((path / MANIFEST).read_text())
    del body["crc32_of_the_rest"]

    def read(data: bytes) -> object:
        try:
            content = json.loads(data)  # what is no JSON has no checksum
        except RecursionError:  # of this reader; dtrain's own gets such a file as it is, in the target before
            content = None
        if not isinstance(content, dict):
            raise CheckpointError("no object")
        try:
            text = _seal(content)
        except ValueError as error:  # NaN, which a manifest cannot hold
            raise CheckpointError(str(error)) from error
        (path / MANIFEST).write_text(text)
        found = newest(folder)
        if found is None:
            raise CheckpointError("refused")
        return load(found, place=Placement(0, 1, 0, 1), segments=_WHOLE, shapes=SHAPES)

    def check(found: object, intact: bool) -> None:
        assert isinstance(found, RankState)
        found.validate()

    refuses = (CheckpointError, ResumeError, ValueError)
    return Case(json.dumps(body).encode(), read, refuses, check, json=True)


def step_folder(name: str, folder: Path) -> Case:
    """One file of a checkpoint that weights are taken from (`run.weights`, `dtrain log`)."""
    path = saved(folder)
    file = path / name

    def read(data: bytes) -> object:
        file.write_bytes(data)
        return weights_of(path)

    def check(found: object, intact: bool) -> None:
        assert isinstance(found, dict)
        _require_values({fqn: found[fqn] for fqn in _NUMEL}, 1)

    return Case(file.read_bytes(), read, (CheckpointError, ResumeError), check, json=name == MANIFEST)


def exported(folder: Path) -> Case:
    """What a run exports, and others load."""
    from dtrain.train.checkpoint.export import export

    out = folder / "model.safetensors"
    export(saved(folder), out)

    def read(data: bytes) -> object:
        out.write_bytes(data)
        return weights_of(out)

    def check(found: object, intact: bool) -> None:
        assert isinstance(found, dict)
        _require_values({fqn: found[fqn] for fqn in _NUMEL}, 1)

    return Case(out.read_bytes(), read, (CheckpointError,), check)


def tokens(name: str, folder: Path) -> Case:
    """A tokenized text: its description, or its tokens."""
    text = folder / "text"
    text.mkdir()
    (text / "one.txt").write_text("It was the best of times, it was the worst of times. " * 40)
    made = folder / "tokens"
    tokenize(source=text, out=made)
    before = [TokenFile(path=str(made), block=8)[i]["input"] for i in range(4)]
    file = made / name
    intact = file.read_bytes()

    def read(data: bytes) -> object:
        file.write_bytes(data)
        found = TokenFile(path=str(made), block=8)
        found.check_content()  # as a launch does, once
        return [found[i]["input"] for i in range(4)]

    def check(found: object, intact: bool) -> None:
        assert isinstance(found, list) and all(isinstance(tensor, Tensor) for tensor in found)
        if name == TOKENS or intact:
            assert all(torch.equal(a, b) for a, b in zip(found, before, strict=True)), "other tokens"

    return Case(intact, read, (DataError, IndexError), check, json=name == DESCRIPTION)


def sealed(header: dict[str, Any], described: str, data: bytes) -> bytes:
    """A file of `tensor_file` whose digest is right, whatever it says."""
    digest = tensor_file._digest(header, described, [data])
    metadata = {tensor_file.VALUE: described, tensor_file.DIGEST: digest}
    text = json.dumps({**header, tensor_file.METADATA: metadata}).encode()
    return struct.pack("<Q", len(text)) + text + data


def opened(content: bytes) -> tuple[dict[str, Any], str, bytes]:
    """Header, value and tensors of a file of `tensor_file`."""
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:end])
    return header, header.pop(tensor_file.METADATA)[tensor_file.VALUE], content[end:]


def tensor_files(folder: Path) -> Case:
    """What `Attached.save` writes, by its digest as it was written or refused."""
    value = {"w": torch.arange(6.0).view(2, 3), "groups": [{"lr": 0.1, "betas": (0.9, 0.999)}], 3: None}
    tensor_file.write(folder / "rank", value)

    def read(data: bytes) -> object:
        (folder / "rank").write_bytes(data)
        return tensor_file.read(folder / "rank")

    def check(found: object, intact: bool) -> None:
        assert repr(found) == repr(value)

    return Case((folder / "rank").read_bytes(), read, (tensor_file.DamagedFile,), check)


def rank_files(folder: Path) -> Case:
    """The same, of a sync, sealed anew: loaded as what fits model, optimizer and sync, or nothing is changed."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    optimizer = AdamW(model.parameters(), lr=0.01)
    sync = attach(model, optimizer, diloco(every_steps=4))
    for seed in range(2):
        model(draw(seed, 12).view(4, 3)).square().mean().backward()
        sync.step()
    sync.save(folder)
    (file,) = folder.glob("*.safetensors")
    header, described, tensors = opened(file.read_bytes())

    def state() -> str:
        return repr([model.state_dict(), optimizer.state_dict(), sync.state.tensors, sync.numbers])

    def read(data: bytes) -> object:
        try:
            content = json.loads(data)
            changed, value = content["header"], json.dumps(content["value"])
            file.write_bytes(sealed(changed, value, tensors))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise tensor_file.DamagedFile(str(error)) from error
        before = state()
        try:
            sync.load(folder)
        except Exception as error:
            assert state() == before, "a refused file changed something"
            if type(error) is TypeError and "state of a sync is" not in str(error):
                raise AssertionError("no error of ours") from error
            raise
        return sync

    def check(found: object, intact: bool) -> None:
        assert {str(value.dtype) for value in model.parameters()} == {"torch.float32"}

    intact = json.dumps({"header": header, "value": json.loads(described)}).encode()
    return Case(intact, read, (TypeError, ValueError), check, json=True)


TARGETS = (
    Target("checkpoint: manifest", functools.partial(checkpoint, MANIFEST)),
    Target("checkpoint: rank file", functools.partial(checkpoint, data_name(1))),
    Target("checkpoint: manifest sealed anew", sealed_manifest),
    Target("weights: manifest", functools.partial(step_folder, MANIFEST)),
    Target("weights: rank file", functools.partial(step_folder, data_name(0))),
    Target("weights: export", exported),
    Target("sync.save: rank file", tensor_files),
    Target("sync.save: rank file sealed anew", rank_files),
    Target("tokens: description", functools.partial(tokens, DESCRIPTION)),
    Target("tokens: tokens", functools.partial(tokens, TOKENS)),
)
