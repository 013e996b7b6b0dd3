"""What lies in the folder of a run or a job: configurations, metrics, closing figures, records of ranks."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from dtrain.bench import rows as bench_rows
from dtrain.bench.settings import Settings
from dtrain.cli import doctor
from dtrain.cli import sweep as sweeping
from dtrain.errors import ConfigError, DtrainError, ResumeError
from dtrain.launchers import job_list as registry
from dtrain.launchers.job import Facts, State
from dtrain.launchers.records import Beat, RankRecord, keep_attempt, rank_files
from dtrain.launchers.why import why
from dtrain.report import summary
from dtrain.report.progress import Progress
from dtrain.report.tail import Tail
from dtrain.train.config import compose, load, run_folder, to_yaml
from dtrain.train.config.schema import Config
from dtrain.train.metrics import rows
from dtrain.train.metrics.writer import MetricsWriter
from tests.bench.samples import ROW
from tests.fuzz.harness import Case, Target
from tests.fuzz.typed import require_typed

_ALIASES = b"a: &a [x,x,x,x,x,x,x,x,x]\n" + b"".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 9)}]\n".encode() for n in range(12)
)
_ODD_YAML = (
    _ALIASES,
    b"run:\n  dir: ${oc.env:HOME}\n",
    b"run:\n  dir: ${run.dir}\n",
    b"train: !!python/object/apply:os.getcwd []\n",
    b"[" * 5000,
    b"",
    b"a: " * 3000,
    b"run: {dir: 2026-11-30}\n",
)


def _nothing(_: object, __: bool) -> None:
    """What comes of it cannot be told from an intact one: these files have no checksum."""


def configuration(folder: Path) -> Case:
    """config.yaml, which ranks load, and resumes compare."""
    config = compose(["run.dir=runs/x", "sync=streaming_diloco", "engine=fsdp"])
    path = folder / "config.yaml"

    def read(data: bytes) -> object:
        path.write_bytes(data)
        return load(path)

    def check(found: object, intact: bool) -> None:
        assert isinstance(found, Config) and (not intact or found == config)
        assert str(Path.home()) not in to_yaml(found), "somebody else's file was filled in from the environment"

    text = to_yaml(config).encode()
    return Case(text, read, (ConfigError,), check, extra=_ODD_YAML, others=(to_yaml(compose([])).encode(),))


def description(folder: Path) -> Case:
    """data.json, the digest of what a run was trained on."""
    config = compose([f"run.dir={folder}"])
    data = {"sha256": "ab" * 32, "files": 3, "bytes": 12345}
    run_folder.write(config, data)
    path = folder / run_folder.DATA
    run_folder.__dict__["load"] = lambda _: config  # what stands beside it is intact, and takes ten times as long

    def read(content: bytes) -> object:
        path.write_bytes(content)
        run_folder.check(config, data, folder)
        return None

    return Case(path.read_bytes(), read, (ResumeError, ConfigError), _nothing, json=True)


def outcome(folder: Path) -> Case:
    """outcome.json, how the last attempt ended."""
    path = folder / run_folder.OUTCOME

    def read(data: bytes) -> object:
        path.write_bytes(data)
        return run_folder.outcome(folder)

    intact = json.dumps({"reason": "signal", "signal": "SIGTERM", "step": 12}).encode()
    return Case(intact, read, (DtrainError,), _nothing, json=True)


SUMMARY = summary.Summary(
    run="runs/x", replicas=2, shards=2, engine="fsdp", steps=300, seconds=61.5, skipped_steps=0, loss=1.5,
    validation_loss=1.6, evaluated="anchor parameters", tokens_per_second=15_000.0, sent_bytes_per_rank=12_000_000,
    dense_bytes_per_rank=900_000_000, compute_utilization=0.91, exposed_fraction=None, parameters_digest="ab" * 32,
)  # fmt: skip


def closing(folder: Path) -> Case:
    """summary.json, and the closing text that is made of it."""
    path = folder / "summary.json"
    SUMMARY.write(path)

    def read(data: bytes) -> object:
        path.write_bytes(data)
        found = summary.read(path)
        summary.render(found)
        return found

    def check(found: object, intact: bool) -> None:
        require_typed(found)

    return Case(path.read_bytes(), read, (ValueError,), check, json=True)


def _metrics() -> bytes:
    written = [{"step": n, "loss": 3 / (n + 1), "tokens": 512 * n, "seconds": 0.25 * n, "sent_bytes": 900 * n,
                "exposed_seconds": 0.01 * n} for n in range(1, 9)]  # fmt: skip
    return "".join(rows.as_line(row) for row in [*written, {"step": 8, "validation_loss": 0.5}]).encode()


def metrics(use: Callable[[Path], object], refuses: tuple[type[BaseException], ...], folder: Path) -> Case:
    """metrics.jsonl, in the hands of whoever reads or continues it."""
    path = folder / "metrics.jsonl"

    def read(data: bytes) -> object:
        path.write_bytes(data)
        return use(path)

    return Case(_metrics(), read, refuses, _nothing)


def _continued(path: Path) -> object:
    with MetricsWriter(path.parent, enabled=True) as writer:
        writer.write({"step": 9, "loss": 0.25})
    last = path.read_text(errors="replace").splitlines()[-1]
    assert json.loads(last) == {"step": 9, "loss": 0.25}, "the new row is torn"
    return last


def _progress(path: Path) -> object:
    content = path.read_bytes()
    path.write_bytes(b"")
    with Progress(path, steps=8, stream=io.StringIO()):
        path.write_bytes(content)
    return None


# ---- jobs ----------------------------------------------------------------------------------------------------------


FACTS = Facts(
    id="4711", launcher="local", name="train", folder="/nowhere", program=("python", "t.py"), workers=2,
    submitted=1.7e9,
)  # fmt: skip


ERROR = {"kind": "ValueError", "message": "no", "traceback": "x", "time": 1.7e9}


def job_folder(folder: Path) -> Path:
    """A job whose second attempt failed on rank 1 while rank 0 waits; every file that `jobs why` reads."""
    ranks = rank_files(folder)
    ranks.mkdir(parents=True)
    (folder / "logs").mkdir()
    first = RankRecord(
        rank=0, host="n1", attempt=0, pid=11, started=1.7e9, ended=1.7e9 + 5, exit_code=1, kind="ValueError",
        message="no", traceback='  File "/x/t.py", line 3, in <module>\n', log="logs/rank-0.log",
    )  # fmt: skip
    again = dataclasses.replace(first, attempt=1)
    last = [dataclasses.replace(again, rank=1), dataclasses.replace(again, ended=None, exit_code=None)]
    (ranks / "attempt-1.jsonl").write_text(json.dumps(dataclasses.asdict(first)) + "\n")
    for record in last:
        (ranks / f"rank-{record.rank}.json").write_text(json.dumps(dataclasses.asdict(record)) + "\n")
    beat = {"time": 1.7e9, "since": 1.7e9 - 9, "host": "n1", "stack": ["t.py:3 main"], "entered": {"default": 7},
            "waiting": {"what": "all_reduce", "group": "default", "number": 7}}  # fmt: skip
    (ranks / "rank-0.beat").write_text(json.dumps(beat))
    (ranks / "rank-1.error").write_text(json.dumps(ERROR))
    (folder / "end.json").write_text(json.dumps({"code": 1, "reason": "failed", "job": "4711"}))
    (folder / "attempts").write_text("1\n2\n")
    (folder / "logs" / "batch.log").write_text("srun: error: n1: task 1: Exited with exit code 1\n" * 3)
    (folder / "logs" / "rank-0.log").write_text("Traceback (most recent call last):\nValueError: no\n")
    dataclasses.replace(FACTS, folder=str(folder)).write()
    return folder


_STATES: tuple[State, ...] = ("pending", "running", "failed", "cancelled", "lost")
RECORDS = (
    "ranks/rank-1.json", "ranks/attempt-1.jsonl", "ranks/rank-0.beat", "ranks/rank-1.error", "end.json", "job.json",
    "attempts", "logs/batch.log", "logs/rank-0.log",
)  # fmt: skip


def asked_why(name: str, folder: Path) -> Case:
    """One file of a job, and everything that is asked of the job's folder."""
    job_folder(folder)
    path = folder / name

    def read(data: bytes) -> object:
        path.write_bytes(data)
        records, beats, earlier = RankRecord.all(folder), Beat.all(folder), RankRecord.earlier(folder)
        which = zlib.crc32(data) % (len(_STATES) + 1)
        text = [why(folder, state=_STATES[which], end=None)] if which < len(_STATES) else _of_the_job(folder)
        RankRecord.verdict(folder, 2)
        return records, beats, earlier, text

    def check(found: object, intact: bool) -> None:
        records, beats, earlier, text = cast(Any, found)
        for record in (*records, *beats, *(one for attempt in earlier.values() for one in attempt)):
            require_typed(record)
        assert all(isinstance(line, str) for line in text)

    return Case(path.read_bytes(), read, (), check, json=name.endswith((".json", ".beat", ".error")))


def _of_the_job(folder: Path) -> list[str]:
    try:
        job = registry.find(str(folder))
    except LookupError:
        return []
    return [job.why(), job.state(), str(job.logs())]


def kept(name: str, folder: Path) -> Case:
    """A rank's record when the next attempt begins."""
    path = job_folder(folder) / name
    intact = path.read_bytes()

    def read(data: bytes) -> object:
        path.parent.mkdir(exist_ok=True)
        for old in path.parent.glob("attempt-*.jsonl"):
            old.unlink()
        path.write_bytes(data)
        ranks = rank_files(folder)
        begun = RankRecord.begin(ranks, 1, host="n1", attempt=2)
        (ranks / "rank-1.error").write_bytes(data if name.endswith(".error") else json.dumps(ERROR).encode())
        begun.end(ranks, 1, log=folder / "logs" / "rank-0.log", log_start=0)
        keep_attempt(folder)
        return RankRecord.earlier(folder)

    def check(found: object, intact: bool) -> None:
        assert isinstance(found, dict)
        for records in found.values():
            for record in records:
                require_typed(record)

    return Case(intact, read, (), check, json=True)


def remembered(folder: Path) -> Case:
    """The user's list of jobs."""
    job_folder(folder / "job")
    place = folder / "state" / "dtrain" / "jobs"
    place.mkdir(parents=True)
    path = place / "local-here-1700000000-4711"
    facts = dataclasses.replace(FACTS, folder=str(folder / "job"))

    def read(data: bytes) -> object:
        os.environ["XDG_STATE_HOME"] = str(folder / "state")
        path.write_bytes(data)
        with contextlib.suppress(LookupError):
            registry.resolve("4711")
        return [job.facts for job in registry.jobs()]

    def check(found: object, intact: bool) -> None:
        assert isinstance(found, list) and (not intact or found == [facts])
        for one in found:
            require_typed(one)

    return Case((json.dumps(dataclasses.asdict(facts)) + "\n").encode(), read, (), check, json=True)


def sweep(folder: Path) -> Case:
    """The list of a sweep's runs, as `jobs table` shows it."""
    run = folder / "0-seed-1"
    run.mkdir()
    SUMMARY.write(run / "summary.json")
    path = folder / sweeping.FILE
    intact = json.dumps([{"values": "train.seed=1", "folder": str(run)}]).encode()

    def read(data: bytes) -> object:
        path.write_bytes(data)
        return sweeping.table(folder)

    return Case(intact, read, (ConfigError,), _nothing, json=True)


# ---- bench and doctor ----------------------------------------------------------------------------------------------


def bench_settings(folder: Path) -> Case:
    path = folder / "bench.json"
    settings = Settings()
    settings.write(folder)
    file = next(folder.glob("*.json"))

    def read(data: bytes) -> object:
        path.write_bytes(data)
        return Settings.read(path)

    def check(found: object, intact: bool) -> None:
        require_typed(found)
        assert not intact or found == settings

    return Case(file.read_bytes(), read, (ConfigError, ValueError), check, json=True)


def bench_results(folder: Path) -> Case:
    """rows.jsonl of `dtrain bench`, which later sweeps are compared with."""
    path = folder / "rows.jsonl"
    line = json.dumps(dataclasses.asdict(ROW))

    def read(data: bytes) -> object:
        path.write_bytes(data + b"\n")
        return bench_rows.read(path)

    def check(found: object, intact: bool) -> None:
        assert isinstance(found, list)
        for one in found:
            require_typed(one)

    return Case(line.encode(), read, (ValueError,), check, json=True)


def examined(folder: Path) -> Case:
    """What the ranks of `dtrain doctor` leave."""
    (folder / "doctor").mkdir()
    path = folder / "doctor" / "rank-0.json"
    finding = {"host": "n1", "check": "names", "level": "warning", "what": "x", "way_out": "y"}
    report = {"rank": 0, "host": "n1", "versions": {"torch": "2.13"}, "findings": [finding], "exchanges": []}

    def read(data: bytes) -> object:
        path.write_bytes(data)
        return doctor.read(folder)

    return Case(json.dumps(report).encode(), read, (DtrainError,), _nothing, json=True)


TARGETS = (
    Target("config.yaml", configuration),
    Target("data.json", description),
    Target("outcome.json", outcome),
    Target("summary.json", closing),
    Target("metrics: read", functools.partial(metrics, rows.read, (ValueError,))),
    Target("metrics: cut", functools.partial(metrics, lambda path: rows.cut(path, 4), (ValueError,))),
    Target("metrics: follow", functools.partial(metrics, lambda path: Tail(path).past, ())),
    Target("metrics: continue", functools.partial(metrics, _continued, ())),
    Target("metrics: show", functools.partial(metrics, _progress, ())),
    *(Target(f"jobs why: {name}", functools.partial(asked_why, name)) for name in RECORDS),
    Target("next attempt: record", functools.partial(kept, "ranks/rank-1.json")),
    Target("next attempt: error", functools.partial(kept, "ranks/rank-1.error")),
    Target("list of jobs", remembered),
    Target("sweep.json", sweep),
    Target("bench: settings", bench_settings),
    Target("bench: rows", bench_results),
    Target("doctor: report", examined),
)
