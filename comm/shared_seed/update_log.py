"""A run as a log: which replicas took part in each step, and their bytes. Replaying it reproduces the weights.

    file    = MAGIC, u32 length of the header, header (JSON), u32 CRC-32 of the header, records
    record  = u32 length of the body, body, u32 CRC-32 of the body
    body    = u32 step, u32 epoch, f64 lr, f64 decay, u64 digest of the weights after it (0: none), u16 machines,
              u16 of each, u32 number of bytes, the bytes                                      all little-endian

A record is on the disk before any replica takes its step. A last record that a crash cut short is removed when the log
is opened for appending; any other damage is refused, with its position. A run that begins again, or resumes
anywhere else than at the end of its log, begins a new one; the old one is kept, as NAME.log.1. The header
says what the bytes mean: the run's key and walk, the generator and the code with their versions, the parameters with
their shapes.
"""

from __future__ import annotations

import itertools
import json
import os
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from dtrain.comm.shared_seed import byte_codec as code
from dtrain.comm.shared_seed import philox
from dtrain.comm.shared_seed.directions import Step, Walk

MAGIC = b"dtrain update log 1\n"
_HEAD = struct.Struct("<IIddQH")


class LogError(RuntimeError):
    """A log that is damaged, or belongs to another run."""


@dataclass(frozen=True)
class Header:
    """What the bytes of a log mean. ``shapes``: of each trained parameter.

    ``first``: the digest of the run's first weights. ``start``: of those before the first record, where that is another
    step than the run's first; else 0.
    """

    walk: Walk
    shapes: Mapping[str, tuple[int, ...]]
    first: int
    start: int = 0
    generator: str = philox.VERSION
    golden: str = field(default_factory=philox.golden)
    code: str = code.VERSION

    def encoded(self) -> bytes:
        """As JSON, the same for the same header."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def decoded(cls, text: bytes, where: str) -> Header:
        """Undo `encoded`. Raises `LogError` for a log of another generator or code."""
        try:
            fields: dict[str, Any] = json.loads(text)
            shapes = {fqn: tuple(shape) for fqn, shape in fields.pop("shapes").items()}
            header = cls(walk=Walk(**fields.pop("walk")), shapes=shapes, **fields)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise LogError(f"{where}: its header cannot be read: {error}") from error
        for label, theirs, ours in (
            ("generator", header.generator, philox.VERSION),
            ("generator's numbers", header.golden, philox.golden()),
            ("code", header.code, code.VERSION),
        ):
            if theirs != ours:
                raise LogError(
                    f"{where}: its {label} is {theirs!r}, that of this version of dtrain {ours!r}; replay it with the "
                    "version that wrote it"
                )
        return header

    def require(self, other: Header, where: str) -> None:
        """Raise `LogError` where ``other`` is a log of another run or model."""
        for label, ours, theirs in (
            ("walk", self.walk, other.walk),
            ("first weights' digest", f"{self.first:016x}", f"{other.first:016x}"),
        ):
            if ours != theirs:
                raise LogError(
                    f"{where} is the log of another run: its {label} is {theirs}, this run's {ours}; give this run "
                    "another folder for its log"
                )
        differ = sorted(fqn for fqn in {*self.shapes, *other.shapes} if self.shapes.get(fqn) != other.shapes.get(fqn))
        if differ:
            fqn = differ[0]
            raise LogError(
                f"{where} is the log of another model: {fqn} has the shape {other.shapes.get(fqn, 'none')} there and "
                f"{self.shapes.get(fqn, 'none')} here ({len(differ)} parameters differ)"
            )


@dataclass(frozen=True)
class Record:
    """A step, and the digest of all weights after it; 0 where it was not taken."""

    step: Step
    digest: int = 0

    def encoded(self) -> bytes:
        """The body."""
        s = self.step
        head = _HEAD.pack(s.number, s.epoch, s.lr, s.decay, self.digest, len(s.workers))
        return head + struct.pack(f"<{len(s.workers)}HI", *s.workers, len(s.codes)) + s.codes

    @classmethod
    def decoded(cls, body: bytes) -> Record:
        """Undo `encoded`. Raises ``ValueError`` or ``struct.error`` for an invalid body."""
        number, epoch, lr, decay, digest, count = _HEAD.unpack_from(body)
        *workers, size = struct.unpack_from(f"<{count}HI", body, _HEAD.size)
        codes = body[_HEAD.size + 2 * count + 4 :]
        if len(codes) != size:
            raise ValueError(f"{size} bytes are announced, and {len(codes)} follow")
        return cls(Step(number, epoch, tuple(workers), lr, decay, codes), digest)


@dataclass(frozen=True)
class Contents:
    """A log that was read. ``whole_bytes``: up to the end of the last whole record; ``torn_bytes`` come after it."""

    header: Header
    records: list[Record]
    whole_bytes: int
    torn_bytes: int

    def gaps(self) -> list[tuple[int, int]]:
        """(first, last) step of each stretch whose records are missing: a run leaves one for every step."""
        steps = [record.step.number for record in self.records]
        # A log that begins within a run has the digest of its first weights.
        before = [-1] if steps and not self.header.start else []
        pairs = itertools.pairwise([*before, *steps])
        return [(last + 1, following - 1) for last, following in pairs if following != last + 1]


def read(path: str | Path) -> Contents:
    """All of a log. Raises `LogError` with the position of damage; a record cut short by a crash is only counted."""
    data = Path(path).read_bytes()
    where = str(path)
    if not data.startswith(MAGIC):
        raise LogError(f"{where} is no update log of this version: it begins with {data[: len(MAGIC)]!r}")
    text, at = _framed(data, len(MAGIC), f"{where}: the header")
    if text is None:
        raise LogError(f"{where}: its header is incomplete; there is nothing to go on with")
    header = Header.decoded(text, where)
    records, at = _records(data, at, where)
    _require_torn(data[at:], header.walk.samples, f"{where}: record {len(records)}, at byte {at},")
    return Contents(header, records, at, len(data) - at)


def to_bytes(records: Iterable[Record]) -> bytes:
    """``records`` as in a log file."""
    return b"".join(_frame(record.encoded()) for record in records)


def from_bytes(data: bytes, steps: range) -> list[Record]:
    """Undo `to_bytes`, of the records of these steps. Raises `LogError` if any is damaged or missing."""
    records, end = _records(data, 0, "what was received of a log")
    if end < len(data):
        raise LogError(f"what was received of a log ends within record {len(records)}")
    numbers = [record.step.number for record in records]
    if numbers != list(steps):
        raise LogError(
            f"what was received of a log has {len(records)} records and not those of the {len(steps)} steps from "
            f"{steps.start} on"
        )
    return records


def _records(data: bytes, at: int, where: str) -> tuple[list[Record], int]:
    """The whole records from byte ``at`` on, and where they end."""
    records: list[Record] = []
    while at < len(data):
        body, after = _framed(data, at, f"{where}: record {len(records)}, at byte {at},")
        if body is None:
            break
        try:
            record = Record.decoded(body)
        except (ValueError, struct.error) as error:
            raise LogError(f"{where}: record {len(records)}, at byte {at}, makes no sense: {error}") from error
        if records and record.step.number <= records[-1].step.number:
            raise LogError(
                f"{where}: step {record.step.number} comes after step {records[-1].step.number}, at byte {at}"
            )
        records.append(record)
        at = after
    return records, at


def _require_torn(rest: bytes, samples: int, label: str) -> None:
    """Raise `LogError` where ``rest`` does not begin a record: its length was damaged, and whole records follow."""
    if len(rest) < 4 + _HEAD.size:
        return
    (announced,) = struct.unpack_from("<I", rest)
    *_, machines = _HEAD.unpack_from(rest, 4)
    size = _HEAD.size + 2 * machines + 4 + machines * samples
    if announced != size:
        raise LogError(f"{label} is damaged: it announces {announced} bytes, and {machines} machines take {size}")


class UpdateLog:
    """A log that is being written. A context manager."""

    def __init__(self, path: Path, header: Header) -> None:
        """Begin a log at ``path``, or continue the one that is there, cut after its last whole record.

        Raises `LogError` if it is damaged, or of another run or model.
        """
        self.path, self.header = path, header
        self.records: list[Record] = []
        self._appended = False
        self._file: BinaryIO | None = None
        if path.exists() and path.stat().st_size:
            contents = read(path)
            header.require(contents.header, str(path))
            self.header, self.records = contents.header, contents.records
            self._file = path.open("ab")
            self._file.truncate(contents.whole_bytes)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._begin(header)

    def append(self, record: Record) -> None:
        """Write ``record`` to the disk. Raises ``ValueError`` for a step not after the last one."""
        step = record.step.number
        if self.records and step <= self.records[-1].step.number:
            if self._appended or step > self.records[0].step.number:
                raise ValueError(
                    f"step {step} is not behind step {self.records[-1].step.number} of {self.path}, which holds a run "
                    "that was begun before: load its state to go on with it, or give another folder"
                )
            self._begin_beside(replace(self.header, start=0), [], f"the run begins again at step {step}")
        self._write(_frame(record.encoded()))
        self._appended = True
        self.records.append(record)

    def go_on(self, steps: int, start: int) -> None:
        """Continue at step ``steps``, with weights of the digest ``start``.

        Later records, of a run that got further than its checkpoint or of another branch from it, are kept: the old log
        stays beside the new one. A log that ends earlier, or has other weights there, could not be replayed any
        further: a new one begins.
        """
        if self._ends_at(self.records, steps, start):
            return
        earlier = [record for record in self.records if record.step.number < steps]
        header = self.header
        if not self._ends_at(earlier, steps, start):
            earlier, header = [], replace(header, start=start if steps else 0)
        if self.records:
            last = self.records[-1]
            why = f"it ends at step {last.step.number} with the weights {last.digest:016x}"
            self._begin_beside(header, earlier, f"{why}, and the run goes on at step {steps} with {start:016x}")
        elif header != self.header:
            self._begin(header)

    @staticmethod
    def _ends_at(records: list[Record], steps: int, start: int) -> bool:
        """Whether a run at step ``steps``, with weights of the digest ``start``, can continue ``records``."""
        return bool(records) and records[-1].step.number == steps - 1 and records[-1].digest in (0, start)

    def tail(self, first: int) -> Iterator[Record]:
        """The records of step ``first`` and later."""
        return (record for record in self.records if record.step.number >= first)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> UpdateLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, header: Header, records: Sequence[Record] = ()) -> None:
        """Replace this log by a new one, atomically."""
        self.header, self.records = header, list(records)
        fresh = self.path.with_name(f"{self.path.name}.new")
        with fresh.open("wb") as file:
            file.write(MAGIC + _frame(header.encoded()) + to_bytes(records))
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self.path)
        if self._file is not None:
            self._file.close()
        self._file = self.path.open("ab")

    def _begin_beside(self, header: Header, records: Sequence[Record], why: str) -> None:
        """Begin a new log; this one stays beside it."""
        names = {path.name for path in self.path.parent.iterdir()}
        number = next(n for n in itertools.count(1) if f"{self.path.name}.{n}" not in names)
        old = self.path.rename(f"{self.path}.{number}")
        self._begin(header, records)
        warnings.warn(f"{self.path}: {why}; it is kept as {old}, and another log begins", RuntimeWarning, stacklevel=3)

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._file.flush()
        os.fsync(self._file.fileno())


def _frame(body: bytes) -> bytes:
    return struct.pack("<I", len(body)) + body + struct.pack("<I", zlib.crc32(body))


def _framed(data: bytes, at: int, label: str) -> tuple[bytes | None, int]:
    """The body at ``at`` and where the next one begins; None if the data end before it does."""
    if at + 4 > len(data):
        return None, at
    (size,) = struct.unpack_from("<I", data, at)
    end = at + 4 + size + 4
    if end > len(data):
        return None, at
    body = data[at + 4 : end - 4]
    (checksum,) = struct.unpack_from("<I", data, end - 4)
    if zlib.crc32(body) != checksum:
        raise LogError(
            f"{label} is damaged: its checksum is {checksum:08x}, that of what it holds {zlib.crc32(body):08x}"
        )
    return body, end
