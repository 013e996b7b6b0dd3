"""Watches one rank from inside, to report why it failed or what it waits for.

    python probe.py SCRIPT ARGUMENTS...     python probe.py -m MODULE ARGUMENTS...

runs the program as Python itself would, with the probe in place. It needs nothing but the standard library, so any
interpreter can run it by its path. Files, in the folder that DTRAIN_RANKS names (K is the rank):

    rank-K.error   JSON: the exception that ended the rank, or the collective in which it hung
    rank-K.beat    JSON, every few seconds: the main thread's stack, since when, and in which collective
    rank-K.stack   text: all stacks, where the interpreter crashed or gave up

The collectives come from torch's flight recorder, a ring buffer in which NCCL and gloo record each one. MPI, which
works without torch, records its own by `note_collective`; sends and receives over gloo, which the recorder leaves out,
are noted by `dtrain.comm.transports.process_group`.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import importlib.util
import json
import os
import runpy
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

FOLDER, HANG_SECONDS, BEAT_SECONDS = "DTRAIN_RANKS", "DTRAIN_HANG_SECONDS", "DTRAIN_BEAT_SECONDS"
CODE = "DTRAIN_CODE"  # the copy of the working directory that a job runs from
RING = "TORCH_FR_BUFFER_SIZE"
RING_ENTRIES = "256"  # collectives; the default is thousands, and all of them are read at every beat
JOIN_SECONDS = 10.0  # a heartbeat takes milliseconds; a dead file system must not keep a rank from ending
FAILED, BAD_CONFIG, ENDED_WELL = 1, 2, (0, 75, 130)  # as in exit_codes.py, which an interpreter without dtrain lacks
THREAD = "dtrain-probe"
_noted: collections.deque[dict[str, Any]] = collections.deque(maxlen=int(RING_ENTRIES))


def note_collective(group: str, name: str, number: int, size: int, dtype: str) -> Callable[[], None]:
    """Record a collective that torch does not know of, of ``size`` elements; call the returned function once it is
    over.

    ``number`` counts the collectives of ``group``. Ranks are compared by the two, so all of them must count alike.

    >>> over = note_collective("replicate", "AllReduce", 4, 10, "float32")
    >>> over()
    """
    entry = {
        "record_id": f"{group} {number}", "profiling_name": name, "collective_seq_id": number, "process_group": [group],
        "input_sizes": [[size]], "input_dtypes": [dtype], "time_created_ns": time.time_ns(), "retired": False,
    }  # fmt: skip
    _noted.append(entry)
    return lambda: entry.update(retired=True)


class Probe:
    """Context manager: while it is open, a thread writes the heartbeat, and ends a rank that hangs in a collective.

    ``hang_seconds``: how long a rank may stay at the same place with the same collective pending; 0: for ever. Then it
    records what it waits for and exits with code 1, so that the launcher ends the others.
    """

    def __init__(self, folder: Path, rank: int, *, hang_seconds: float = 0.0, beat_seconds: float = 5.0) -> None:
        self._files = {kind: folder / f"rank-{rank}.{kind}" for kind in ("error", "beat", "stack")}
        self._hang_seconds, self._beat_seconds = hang_seconds, beat_seconds
        self._leave = threading.Event()
        self._place: object = None
        self._since = time.monotonic()  # the wall clock may be set while a rank waits
        self._stack: TextIO | None = None

    @classmethod
    def from_environment(cls) -> Probe | None:
        """The probe that the launcher asked for; None if it asked for none."""
        folder = os.environ.get(FOLDER)
        if not folder:
            return None
        return cls(
            Path(folder),
            int(os.environ.get("RANK", "0")),
            hang_seconds=float(os.environ.get(HANG_SECONDS, "0")),
            beat_seconds=float(os.environ.get(BEAT_SECONDS, "5")),
        )

    def __enter__(self) -> Probe:
        self._files["error"].parent.mkdir(parents=True, exist_ok=True)
        for path in self._files.values():  # those of an earlier attempt
            path.unlink(missing_ok=True)
        os.environ.setdefault(RING, RING_ENTRIES)
        self._stack = self._files["stack"].open("w")
        faulthandler.enable(self._stack, all_threads=True)
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._watch, name=THREAD, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._leave.set()
        if error is not None:
            self.note(error)
        self._thread.join(JOIN_SECONDS)  # Python ends a thread that it catches inside torch by aborting the process

    def note(self, error: BaseException) -> None:
        """Record the exception that ends this rank. Exit codes 0, 75 and 130 are none."""
        if isinstance(error, SystemExit) and (not error.code or error.code in ENDED_WELL):
            return
        cause = error.__cause__ or error.__context__
        if isinstance(error, SystemExit) and cause is not None:
            error = cause  # a program that turns its errors into exit codes
        if isinstance(error, SystemExit):
            message = error.code if isinstance(error.code, str) else f"exit code {error.code}"
            where = "".join(traceback.format_tb(error.__traceback__))
            self._write("error", self._report(message, "SystemExit", where))
            return
        text = "".join(traceback.format_exception(error))
        lines = "".join(traceback.format_exception_only(error)).strip()
        self._write("error", self._report(lines, type(error).__name__, text))

    def _report(self, message: str, kind: str, trace: str) -> dict[str, object]:
        return {"time": time.time(), "kind": kind, "message": message, "traceback": trace}

    def _watch(self) -> None:
        while not self._leave.wait(self._beat_seconds):
            with contextlib.suppress(OSError):  # a full or vanished disk must not end a training run
                self._beat()

    def _beat(self) -> None:
        frame = sys._current_frames().get(self._main or 0)
        stack = _text(frame)
        entries = _collectives()
        pending = next((entry for entry in entries if not entry["retired"]), None)
        last = entries[-1]["record_id"] if entries else None
        place = (tuple(stack), last, pending and pending["record_id"])
        if place != self._place:
            self._place, self._since = place, time.monotonic()
        now, waited = time.time(), time.monotonic() - self._since
        waiting = _described(pending) if pending is not None else None
        recent = [_described(entry)["what"] for entry in entries[-8:]]
        beat = {
            "time": now, "since": now - waited, "host": socket.gethostname(), "pid": os.getpid(), "stack": stack,
            "waiting": waiting, "entered": _entered(entries), "recent": recent,
        }  # fmt: skip
        self._write("beat", beat)
        if waiting is not None and self._hang_seconds and waited > self._hang_seconds:
            self._give_up(waiting, waited, stack)

    def _give_up(self, waiting: dict[str, object], waited: float, stack: list[str]) -> None:
        limit = f"launcher.hang_seconds={self._hang_seconds:g}"
        message = f"waited {waited:.0f} s in {waiting['what']}, longer than {limit}"
        self._write("error", self._report(message, "Hang", "".join(stack)))
        text = f"{message}. All stacks:\n"
        with contextlib.suppress(OSError):
            os.write(2, text.encode())
            faulthandler.dump_traceback(file=2, all_threads=True)
            if self._stack is not None:
                faulthandler.dump_traceback(file=self._stack, all_threads=True)
        os._exit(FAILED)

    def _write(self, kind: str, content: dict[str, object]) -> None:
        """Atomically: another machine may be reading it."""
        path = self._files[kind]
        new = path.with_name(f"{path.name}.{os.getpid()}.new")
        new.write_text(json.dumps(content) + "\n")
        os.replace(new, path)


def _text(frame: FrameType | None) -> list[str]:
    return [line.rstrip("\n") for line in traceback.format_stack(frame)] if frame is not None else []


def _collectives() -> list[dict[str, Any]]:
    """The collectives that torch and others have recorded, oldest first."""
    # A rank runs this file as a program, and then `note_collective` is that of another copy of this module.
    copy = sys.modules.get("dtrain.launchers.probe")
    noted = [
        *getattr(copy, "_noted", _noted),
        *getattr(sys.modules.get("dtrain.comm.transports.process_group"), "NOTED", ()),
    ]
    entries = _ring()
    return sorted([*entries, *noted], key=lambda entry: entry.get("time_created_ns", 0)) if noted else entries


def _ring() -> list[dict[str, Any]]:
    """The ring buffer of torch, oldest first; empty where torch.distributed was never imported. Never imports it."""
    module = sys.modules.get("torch._C._distributed_c10d")
    dump = getattr(module, "_dump_fr_trace_json", None)
    if dump is None:
        return []
    try:
        entries: list[dict[str, Any]] = json.loads(dump()).get("entries", [])
    except (RuntimeError, ValueError):  # while groups are made or destroyed
        return []
    return [entry for entry in entries if "record_id" in entry]


def _described(entry: dict[str, Any]) -> dict[str, object]:
    """One collective in text, and in fields by which ranks can be compared."""
    name = str(entry.get("profiling_name", "")).partition(":")[2] or str(entry.get("profiling_name", "a collective"))
    number = entry.get("p2p_seq_id") if entry.get("is_p2p") else entry.get("collective_seq_id")
    group = " ".join(str(word) for word in entry.get("process_group", []) if word != "undefined")
    sizes = " ".join("x".join(map(str, size)) or "1" for size in entry.get("input_sizes", []))
    dtypes = " ".join(sorted(set(entry.get("input_dtypes", []))))
    entered = entry.get("time_created_ns", 0) / 1e9
    what = f"{name} #{number} of group {group} ({sizes} {dtypes})".replace("  ", " ")
    return {"what": what, "name": name, "number": number, "group": group, "entered": entered}


def _entered(entries: list[dict[str, Any]]) -> dict[str, int]:
    """Group -> the number of the last collective that this rank has entered in it."""
    last: dict[str, int] = {}
    for entry in entries:
        if not entry.get("is_p2p"):
            collective = _described(entry)
            group = str(collective["group"])
            last[group] = max(last.get(group, 0), int(entry.get("collective_seq_id", 0)))
    return last


def await_gloo_threads(limit: float = 5.0) -> None:
    """Wait, at most ``limit`` seconds, until the threads of gloo have let go of the tensors of their last collective.

    Such a thread needs the GIL for that. If the interpreter ends meanwhile, it aborts the process after all its work
    ("terminate called without an active exception"), torch 2.13 and before. Call it last.
    """
    deadline = time.monotonic() + limit
    idle = 0
    while idle < 3 and time.monotonic() < deadline:
        idle = idle + 1 if not _at_work("pt_gloo_runloop") else 0
        time.sleep(0.002)  # releases the GIL


def _at_work(name: str) -> bool:
    """Whether a thread of this name runs or is runnable."""
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            if (task / "comm").read_text().strip() == name[:15]:
                state = (task / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "S":
                    return True
    return False


def watches() -> bool:
    """Whether a probe is open in this process."""
    return any(thread.name == THREAD for thread in threading.enumerate())


@contextlib.contextmanager
def probed() -> Iterator[None]:
    """Run the block under the probe that the environment asks for, if it asks for one."""
    probe = Probe.from_environment()
    if probe is None:
        yield
        return
    with probe:
        try:
            yield
        finally:
            await_gloo_threads()


def main(arguments: list[str]) -> None:
    """Run a program under the probe."""
    if not arguments:
        raise SystemExit("nothing to run: probe.py SCRIPT ARGUMENTS... or probe.py -m MODULE ARGUMENTS...")
    module = arguments[0] == "-m"
    program = arguments[1:] if module else arguments
    with probed():
        sys.argv = program
        sys.path[0] = (os.environ.get(CODE) or os.getcwd()) if module else str(Path(program[0]).resolve().parent)
        try:
            _must_be_there(program[0], module=module)
            if module:
                runpy.run_module(program[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(program[0], run_name="__main__")
        except (_Missing, SyntaxError) as error:
            # A restart would fail in the same way.
            traceback.print_exception(error, limit=None if isinstance(error, SyntaxError) else 0)
            raise SystemExit(BAD_CONFIG) from error


class _Missing(Exception):
    """There is no program to run."""


def _must_be_there(program: str, *, module: bool) -> None:
    if not module and not Path(program).exists():
        raise _Missing(f"cannot start {program}: there is no such file in {os.getcwd()}")
    if module:
        try:
            exists = importlib.util.find_spec(program) is not None
        except ModuleNotFoundError as error:  # of a package around it, or imported by one
            exists = not f"{program}.".startswith(f"{error.name}.")
        if not exists:
            raise _Missing(f"cannot start python -m {program}: there is no such module on {sys.path}")


if __name__ == "__main__":
    main(sys.argv[1:])
