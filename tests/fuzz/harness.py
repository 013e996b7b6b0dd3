"""Runs one parser over many damaged inputs, in a process of its own, and counts what it does with them.

Good: a refusal, an exception that the parser documents; or a value. Where the format carries a checksum the value must
be the one that was written; elsewhere it must be of the right types. Bad: any other exception, a value that is not
that, more than 256 MiB, more than 5 seconds, the end of the process.
"""

from __future__ import annotations

import gc
import json
import logging
import mmap
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from tests.fuzz.damage import damaged, damaged_json

MEMORY_MIB, SECONDS = 256, 5.0
_TARGET_IS_WRONG = 3
_KEPT = 20
"""Failures whose tracebacks are kept for each target."""


@dataclass(frozen=True)
class Case:
    """A parser and an intact input, made ready in a folder.

    ``read`` gets the bytes in place of the intact ones; what it returns is given to ``check``, which raises
    ``AssertionError`` for what must not come of a damaged input. ``refuses``: the exceptions that ``read`` documents.
    """

    intact: bytes
    read: Callable[[bytes], object]
    refuses: tuple[type[BaseException], ...]
    check: Callable[[object, bool], None]
    """Gets what was read, and whether the input is the intact one after all."""
    json: bool = False
    """Whether half of the damages are to the structure of JSON; False where the input is none."""
    others: Sequence[bytes] = ()
    extra: Sequence[bytes] = ()
    """Inputs that are tried as they are: bombs, and whatever else chance would not find."""


@dataclass(frozen=True)
class Target:
    """A parser by name, and how to make it ready in an empty folder."""

    name: str
    make: Callable[[Path], Case]


@dataclass
class Counts:
    """What became of the inputs of one target."""

    inputs: int = 0
    refused: int = 0
    read: int = 0
    slowest_seconds: float = 0.0
    peak_mib: float = 0.0
    failures: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)


class TooSlow(Exception):
    """An input took more than `SECONDS`. No OSError: parsers are right to refuse those."""


def damage(case: Case, rng: random.Random, number: int) -> bytes:
    """The input of this ``number``."""
    if number < len(case.extra):
        return case.extra[number]
    if case.json and rng.random() < 0.5:
        return damaged_json(case.intact, rng)
    return damaged(case.intact, rng, others=case.others)


def run(target: Target, inputs: int, *, seed: int = 0, first: int = 0) -> Counts:
    """Try inputs ``first`` to ``first + inputs``; a process that dies is counted, and another goes on behind it."""
    counts, at, end = Counts(), first, first + inputs
    with tempfile.TemporaryDirectory(prefix="dtrain-fuzz-") as folder, mmap.mmap(-1, 8) as progress:
        while at < end:
            result = Path(folder) / "result"
            result.unlink(missing_ok=True)
            sys.stdout.flush()
            gc.collect()
            # A child that collected its parent's process groups would wait for threads that it lacks. What is frozen
            # stays so: thawed, all modules would be looked at again for every target, longer than its inputs take.
            gc.freeze()
            child = os.fork()
            if child == 0:
                _in_child(target, at, end, seed, Path(folder), progress)
            _, status = os.waitpid(child, 0)
            if os.waitstatus_to_exitcode(status) == _TARGET_IS_WRONG:
                raise RuntimeError(f"{target.name} cannot be tried: its intact input fails, see the traceback above")
            done = end if status == 0 else struct.unpack("<Q", progress[:8])[0] + 1
            if result.exists():
                _add(counts, result.read_text())
            if status:
                counts.failures[f"the process ended with status {os.waitstatus_to_exitcode(status)}"] += 1
                counts.examples.append(f"{target.name}, seed {seed}, input {done - 1}: the process died")
            counts.inputs += done - at
            at = done
    return counts


def _add(counts: Counts, text: str) -> None:
    found = json.loads(text)
    counts.refused += found["refused"]
    counts.read += found["read"]
    counts.slowest_seconds = max(counts.slowest_seconds, found["slowest"])
    counts.peak_mib = max(counts.peak_mib, found["peak"])
    counts.failures.update(found["failures"])
    counts.examples.extend(found["examples"][: _KEPT - len(counts.examples)])


def _in_child(target: Target, first: int, end: int, seed: int, folder: Path, progress: mmap.mmap) -> None:
    """Never returns."""
    code = _TARGET_IS_WRONG
    try:
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        place = folder / f"from-{first}"
        place.mkdir()
        counts = Counts()
        case = target.make(place)
        case.check(case.read(case.intact), True)  # what is intact is read, or the target itself is wrong
        _limit()
        code = 1
        for number in range(first, end):
            progress[:8] = struct.pack("<Q", number)
            _try(case, target.name, number, seed, counts)
        text = {
            "refused": counts.refused, "read": counts.read, "slowest": counts.slowest_seconds, "peak": counts.peak_mib,
            "failures": dict(counts.failures), "examples": counts.examples,
        }  # fmt: skip
        (folder / "result").write_text(json.dumps(text))
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _limit() -> None:
    """From now on `MEMORY_MIB` more, and an alarm that a parser cannot take for a refusal."""
    gc.collect()
    held = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    allowed = int(held.split()[1]) * 1024 + MEMORY_MIB * 2**20
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))

    def late(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    signal.signal(signal.SIGALRM, late)


def _try(case: Case, name: str, number: int, seed: int, counts: Counts) -> None:
    data = damage(case, random.Random(f"{name}-{seed}-{number}"), number)
    began, before = time.perf_counter(), _resident_mib()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        value = case.read(data)
        signal.setitimer(signal.ITIMER_REAL, 0)
        case.check(value, data == case.intact)
        counts.read += 1
    except case.refuses:
        counts.refused += 1
    except TooSlow:
        pass
    except Exception as error:
        line = _where(error)
        counts.failures[line] += 1
        if counts.failures[line] == 1 and len(counts.examples) < _KEPT:
            last = "".join(traceback.format_exception(error)[-3:])
            counts.examples.append(f"{name}, seed {seed}, input {number} {data[:200]!r}:\n{last}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds = time.perf_counter() - began
    if seconds > SECONDS:  # whatever the parser made of the alarm
        counts.failures["too slow"] += 1
        counts.examples.append(f"{name}, seed {seed}, input {number} {data[:200]!r}: {seconds:.1f} s")
    counts.slowest_seconds = max(counts.slowest_seconds, seconds)
    counts.peak_mib = max(counts.peak_mib, _resident_mib() - before)


def _where(error: Exception) -> str:
    """The exception's class, and the innermost line of ours that it passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "site-packages" not in frame.filename and "/lib/python" not in frame.filename]
    last = (ours or frames)[-1]
    return f"{type(error).__name__} at {'/'.join(Path(last.filename).parts[-3:])}:{last.lineno}"


def _resident_mib() -> float:
    """The highest so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
