"""What comes over the wire, and the update log, whose records come that way too: codes, frames, records."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

from dtrain.comm.compressors.compressor import Compressor
from dtrain.comm.compressors.lossless import _alike, _decode
from dtrain.comm.ops import AllGather, Flow, Payload
from dtrain.comm.seeds import Key
from dtrain.comm.shared_seed import update_log
from dtrain.comm.shared_seed.directions import Step, Walk
from dtrain.comm.transports.simulate import simulate
from tests.comm.zoo import COMPRESSORS, draw
from tests.fuzz.harness import Case, Target

_KEY = Key(seed=1, step=2, rank=3, fqn="w", phase="send")
_WIDTH = 97
_RECORDS = 12


def flat_bytes(payload: Payload) -> bytes:
    """The bytes of all tensors of a payload."""
    return b"".join(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in payload)


def refilled(payload: Payload, data: bytes) -> Payload:
    """Tensors shaped as ``payload``, of other bytes: a transport gives as many as were announced."""
    data = data.ljust(len(flat_bytes(payload)), b"\xff")
    tensors, at = [], 0
    for tensor in payload:
        size = tensor.numel() * tensor.element_size()
        raw = torch.frombuffer(bytearray(data[at : at + size]), dtype=torch.uint8) if size else torch.empty(0).byte()
        tensors.append(raw.view(tensor.dtype).view(tensor.shape))
        at += size
    return tuple(tensors)


def codes(compressor: Compressor, _: Path) -> Case:
    """Rows that were coded: there is no checksum, so other values come out, of the right shape."""
    rows = torch.stack([draw(seed, _WIDTH) for seed in range(3)])
    payload = compressor.encode(rows, _KEY)

    def check(found: object, intact: bool) -> None:
        assert isinstance(found, Tensor) and found.shape == rows.shape and found.dtype == torch.float32

    return Case(
        intact=flat_bytes(payload),
        read=lambda data: compressor.decode(refilled(payload, data), _WIDTH, _KEY.shared),
        refuses=(ValueError,),
        check=check,
    )


def lossless_part(_: Path) -> Case:
    """One part of a message, coded by zstandard: whole, or refused."""
    part = (torch.arange(500.0), torch.zeros(300, dtype=torch.int16))

    def as_row(data: bytes) -> Tensor:
        return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)

    def coded(part: Payload) -> bytes:
        def flow() -> Flow[Tensor | None]:
            return (yield from _alike([part], AllGather(part), 1))

        (rows,) = simulate([flow()])
        assert rows is not None
        return flat_bytes((rows,))

    def check(found: object, intact: bool) -> None:
        assert isinstance(found, tuple) and flat_bytes(found) == flat_bytes(part)

    others = (coded((torch.zeros(1 << 22),)),)  # of another size
    return Case(coded(part), lambda data: _decode(as_row(data), part), (ValueError,), check, others=others)


def _steps(first: int, count: int) -> list[update_log.Record]:
    records = []
    for number in range(first, first + count):
        step = Step(number, 0, (0, 1, 3), 0.01, 0.0, bytes((number * 7 + k) % 256 for k in range(6)))
        records.append(update_log.Record(step, digest=number * 2**40 + 1))
    return records


def _header() -> update_log.Header:
    return update_log.Header(Walk(key=3, samples=2), {"w": (4, 2)}, first=7)


def _written(path: Path, count: int = _RECORDS) -> bytes:
    with update_log.UpdateLog(path, _header()) as log:
        for record in _steps(0, count):
            log.append(record)
    return path.read_bytes()


def log_file(folder: Path) -> Case:
    """A log on the disk: whole, or whole up to a torn end."""
    path = folder / "run.log"
    intact, expected = _written(path), _steps(0, _RECORDS)

    def read(data: bytes) -> object:
        path.write_bytes(data)
        return update_log.read(path)

    def check(found: object, intact: bool) -> None:
        assert isinstance(found, update_log.Contents) and found.header == _header()
        assert found.records == expected[: len(found.records)]
        assert not intact or len(found.records) == _RECORDS

    return Case(intact, read, (update_log.LogError,), check, others=(_written(folder / "other.log", 3),))


def log_that_goes_on(folder: Path) -> Case:
    """A log that is opened for more: what is kept of it, and one record behind."""
    path, other = folder / "run.log", folder / "fresh.log"
    intact, expected = _written(other), _steps(0, _RECORDS + 1)

    def read(data: bytes) -> object:
        path.write_bytes(data)
        with update_log.UpdateLog(path, _header()) as log:
            if len(log.records) == _RECORDS:
                log.append(expected[-1])
        return update_log.read(path).records

    def check(found: object, intact: bool) -> None:
        assert isinstance(found, list) and found == expected[: len(found)]
        assert not intact or len(found) == _RECORDS + 1

    return Case(intact, read, (update_log.LogError,), check)


def log_records(_: Path) -> Case:
    """Records that one machine hands to another."""
    expected = _steps(0, _RECORDS)

    def check(found: object, intact: bool) -> None:
        assert found == expected

    return Case(
        update_log.to_bytes(expected), lambda data: update_log.from_bytes(data, range(_RECORDS)),
        (update_log.LogError,), check, others=(update_log.to_bytes(_steps(40, 3)),),
    )  # fmt: skip


TARGETS = (
    *(Target(f"decode {name}", functools.partial(codes, COMPRESSORS[name])) for name in sorted(COMPRESSORS)),
    Target("lossless part", lossless_part),
    Target("update log: read", log_file),
    Target("update log: go on", log_that_goes_on),
    Target("update log: records from a peer", log_records),
)
