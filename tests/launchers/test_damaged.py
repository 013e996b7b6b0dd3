"""Records that are damaged: whoever asks why a job failed gets an answer, never a traceback for what a file holds."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.cli import jobs
from dtrain.cli.main import main
from dtrain.launchers import foreground_job
from dtrain.launchers import job_list as registry
from dtrain.launchers.failure import read_error, read_log_end
from dtrain.launchers.job import Facts
from dtrain.launchers.records import Beat, RankRecord, keep_attempt
from dtrain.launchers.strict_json import Damaged, json_of, parse, shaped

RECORD = RankRecord(
    0, "n0", 0, 100, 5.0, 9.0, 1, None, "ValueError", "ValueError: no", 'File "a.py", line 1, in f', "x"
)
WAITS = {"what": "all_reduce #4", "group": "0", "number": 4}
BEAT = {"time": 9.0, "since": 1.0, "host": "n1", "pid": 1, "stack": ["  f()"], "waiting": WAITS, "entered": {"0": 4}}
FACTS = Facts("4242", "local", "a", "", ("python", "t.py"), 2, 100.0)
FILES = {
    "job.json": json.dumps(dataclasses.asdict(FACTS)),
    "end.json": json.dumps({"code": 1, "reason": "failed", "job": "4242", "time": 9}),
    "ranks/rank-0.json": json.dumps(dataclasses.asdict(RECORD)),
    "ranks/rank-1.json": json.dumps({**dataclasses.asdict(RECORD), "rank": 1, "ended": None, "exit_code": None}),
    "ranks/rank-1.beat": json.dumps(BEAT),
    "ranks/rank-0.error": json.dumps({"kind": "Hang", "message": "waited", "traceback": "", "time": 8.0}),
    "ranks/attempt-1.jsonl": json.dumps(dataclasses.asdict(RECORD)) + "\n",
    "attempts": "1 7 0 n\n1 7 1 n\n",
    "logs/batch.log": "2026-01-01 dtrain: attempt 2\nsrun: error: n0: task 0: Exited\n",
    "logs/rank-0.log": "ValueError: no\n",
}
ODD: st.SearchStrategy[object] = st.sampled_from([
    None, True, -1, 0, 10**30, 1e308, float("nan"), float("inf"), "", "x", "\ud800", "\x1b[2J", "\0", [], {}, [[]],
    {"a": 1}, ["x", 3], "9" * 5000,
])  # fmt: skip
SPOILT_NAMES = (
    "ranks/rank-x.json",
    "ranks/rank-.beat",
    "ranks/attempt-.jsonl",
    "logs/rank-é.log",
    "ranks/rank-99999999999999999999.json",
)


def spoilt(draw: st.DrawFn, text: str) -> bytes:
    """A file's content, damaged in one of the ways of disks, crashes and hands."""
    way = draw(st.sampled_from(["bytes", "cut", "value", "missing", "deep", "other"]))
    content = text.encode()
    if way == "bytes":
        at = draw(st.integers(0, max(0, len(content) - 1)))
        return content[:at] + draw(st.binary(max_size=8)) + content[at + draw(st.integers(0, 8)) :]
    if way == "cut":
        return content[: draw(st.integers(0, len(content)))]
    if way == "deep":
        return b'{"a":' * 50_000 if draw(st.booleans()) else b"[" * 50_000
    if way == "other":
        return json.dumps(draw(ODD)).encode()
    try:
        found = json.loads(text)
    except ValueError:
        return content
    places = list(_places(found))
    holder, key = draw(st.sampled_from(places))
    if way == "missing" and isinstance(holder, dict):
        del holder[key]
    else:
        holder[key] = draw(ODD)
    return json.dumps(found).encode()


def _places(node: object) -> Iterator[tuple[Any, Any]]:
    for key, value in list(
        node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    ):
        yield node, key
        yield from _places(value)


@st.composite
def folders(draw: st.DrawFn) -> dict[str, bytes]:
    damaged = draw(st.lists(st.sampled_from(sorted(FILES)), min_size=1, max_size=3, unique=True))
    files = {name: text.encode() for name, text in FILES.items()}
    for name in damaged:
        files[name] = spoilt(draw, FILES[name])
        if draw(st.integers(0, 9)) == 0:
            del files[name]
    if draw(st.integers(0, 5)) == 0:
        files[draw(st.sampled_from(SPOILT_NAMES))] = b"{}"
    return files


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("dtrain.cli.jobs.enter_login_host", lambda arguments: None)
    monkeypatch.setattr(sys, "path", list(sys.path))


@settings(max_examples=100)
@given(files=folders())
def test_no_record_is_a_traceback(files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("job")
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    known = registry.folder()
    known.mkdir(parents=True, exist_ok=True)
    (known / f"local-here-100-{FACTS.id}").write_bytes(files.get("job.json", b""))
    job = registry.job_of(folder)
    for each in [job] if job else []:
        assert each.why().encode() and each.state() in ("failed", "lost", "cancelled", "finished")
        each.logs()
        assert jobs.VERBS["status"]([each], argparse.Namespace()) == 0
    assert jobs._list(registry.every(), everywhere=True) == 0
    RankRecord.verdict(folder, 2)
    read_error(folder / "ranks/rank-0.error")
    RankRecord.begin(folder / "ranks", 0, host="n", attempt=1).end(
        folder / "ranks", 1, log=folder / "logs/none.log", log_start=0
    )
    keep_attempt(folder)


@pytest.mark.parametrize("number", ["1e999", "-2120e999", "NaN", "1" + "0" * 30])
def test_a_number_that_none_can_hold_is_no_json(number: str) -> None:
    assert json_of(f'{{"count": {number}}}') is None
    with pytest.raises(ValueError, match="is no"):
        parse(f'{{"count": {number}}}')


def test_what_was_left_out_is_said(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    (tmp_path / "job.json").write_text(json.dumps({**dataclasses.asdict(FACTS), "folder": str(tmp_path)}))
    (tmp_path / "ranks/rank-0.json").write_text(FILES["ranks/rank-0.json"])
    (tmp_path / "ranks/rank-1.json").write_text('{"rank": "one"}')
    (tmp_path / "ranks/rank-1.beat").write_text("{")
    job = registry.job_of(tmp_path)
    assert job is not None
    text = job.why()
    assert text.startswith("rank 0 on n0 failed: ValueError: no")
    assert "damaged, and left out here: ranks/rank-1.beat, ranks/rank-1.json" in text


def test_a_damaged_job_is_said_and_not_guessed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in ("{", "[" * 50_000, json.dumps({**dataclasses.asdict(FACTS), "id": "--all"})):
        (tmp_path / "job.json").write_text(content)
        assert main(["jobs", "why", str(tmp_path)]) == 2
        assert "job.json is damaged (" in capsys.readouterr().err


def test_a_record_is_whole_or_damaged() -> None:
    good = json_of(FILES["ranks/rank-0.json"])
    assert shaped(RankRecord, good) == RECORD
    assert isinstance(good, dict)
    for key, value in (
        ("rank", "0"),
        ("rank", True),
        ("rank", 1.5),
        ("host", None),
        ("started", "5"),
        ("ended", 10**400),
    ):
        with pytest.raises(Damaged, match=key):
            shaped(RankRecord, {**good, key: value})
    with pytest.raises(Damaged, match="it has no rank"):
        shaped(RankRecord, {})
    assert shaped(RankRecord, {**good, "of a later version": 3}) == RECORD
    assert json_of('"a\\u001b[2J\\ud800"') == "a\N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}"


def test_a_pipe_among_the_records_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    for name in ("rank-0.json", "rank-0.beat", "rank-0.error"):
        os.mkfifo(tmp_path / "ranks" / name)
    assert RankRecord.all(tmp_path) == [] and Beat.all(tmp_path) == []


def test_the_end_of_a_log_that_is_gone_is_said(tmp_path: Path) -> None:
    assert read_log_end(tmp_path / "none.log", 0)[0].startswith("its log cannot be read: ")


# ---- runs in the foreground ----------------------------------------------------------------------------------------


def test_a_run_in_the_foreground_is_a_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "config.yaml").write_text("")
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys, time; lock = open(sys.argv[1], 'w'); print(1, flush=True); time.sleep(60)",
         str(folder / ".lock")],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdout is not None and holder.stdout.readline()
        facts = Facts(str(holder.pid), "foreground", "x", str(folder), ("dtrain",), 2, time.time())
        facts.write()
        registry.add(facts)
        assert main(["jobs", "list"]) == 0
        assert f"{holder.pid}  foreground  x     running" in " ".join(capsys.readouterr().out.splitlines())
        assert main(["jobs", "why", "x"]) == 0 and "nothing has failed" in capsys.readouterr().out
        # The same number in another folder, whose lock it does not hold, is not its process.
        other = tmp_path / "y"
        other.mkdir()
        (other / "job.json").write_text((folder / "job.json").read_text().replace(str(folder), str(other)))
        (other / ".lock").touch()
        assert main(["jobs", "cancel", str(other)]) == 0 and holder.poll() is None
        assert main(["jobs", "cancel", str(folder)]) == 0 and holder.wait(20) == -15
    finally:
        holder.kill()
        holder.wait()
        if holder.stdout is not None:
            holder.stdout.close()
    capsys.readouterr()
    assert main(["jobs", "why", str(folder)]) == 0
    assert "has ended without a record" in capsys.readouterr().out
    foreground_job.began(folder, ["dtrain"], 2)
    foreground_job.ended(folder, 1, "rank 1 failed: ValueError: no")
    assert main(["jobs", "why", str(folder)]) == 0
    assert capsys.readouterr().out == "rank 1 failed: ValueError: no\n"
    assert main(["jobs", "table", str(tmp_path)]) == 0
    assert "failed" in capsys.readouterr().out


def test_a_name_that_nothing_has_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jobs", "why", "r1"]) == 2
    assert "there is no job r1 (none was started from this machine); give an id" in capsys.readouterr().err
    assert main(["jobs", "why", str(tmp_path)]) == 2
    assert "has neither job.json nor config.yaml" in capsys.readouterr().err


def test_whoever_reads_may_leave(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "logs" / "rank-0.log").write_text("a line\n" * 200_000)
    command = f"{sys.executable} -m dtrain jobs logs {tmp_path} | head -1; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=True,
        env={**os.environ, "SLURM_JOB_ID": "1"},
    )  # fmt: skip
    assert ended.stdout == "a line\n0\n" and ended.stderr == ""
