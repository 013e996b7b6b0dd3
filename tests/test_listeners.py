"""docs/security.md says where each command listens; here they are started, and whoever listens is looked up."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

PAGE = Path(__file__).parents[1] / "docs" / "security.md"
MARK = "DTRAIN_TEST_MARK"
PROGRAM = """
import time, torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
time.sleep(1)
dist.destroy_process_group()
"""
SMALL = (
    "run.dir=run data.path=text data.block=16 model.dim=16 model.layers=1 model.heads=2 train.batch_size=4 "
    "train.evaluation_examples=4 train.steps=40 launcher.workers=2 mesh.replicate=2 mesh.shard=1 engine=ddp sync=dense"
)
BENCH = "collectives launcher.workers=1 bench.ops=all_reduce bench.max_bytes=4K bench.iterations=3 run.dir=bench"
WORDS = {
    "train": SMALL.split(),
    "launch": ["launcher.workers=1", "run.dir=launch", "--", sys.executable, "program.py"],
    "bench": BENCH.split(),
    "doctor": ["run.dir=doctor"],
    "members": ["--port", "0"],
    "jobs": ["list"],
}


def of_page() -> dict[str, set[str]]:
    """The first table: where each command listens."""
    table = PAGE.read_text().partition("## What listens where")[2].partition("This is on one machine")[0]
    rows = re.findall(r"^\| `dtrain (\w+)` \| ([^|]+) \|", table, re.MULTILINE)
    return {command: set() if where == "nothing" else {*where.split(", ")} for command, where in rows}


class Marked:
    """The living processes that have one of ``marks`` in their environment; each is asked for it once."""

    def __init__(self, marks: dict[str, str]) -> None:
        self.commands = {mark: command for command, mark in marks.items()}
        self.known: dict[int, str | None] = {}

    def listeners(self) -> Iterator[tuple[str, str]]:
        """Commands, and addresses at which processes of theirs listen now."""
        for pid in psutil.pids():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if pid not in self.known:
                    self.known[pid] = self.commands.get(process.environ().get(MARK, ""))
                command = self.known[pid]
                if command is not None:
                    listening = (c for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN)
                    yield from ((command, one.laddr.ip) for one in listening)


@pytest.mark.processes
@pytest.mark.timeout(180)
def test_commands_listen_where_the_page_says_and_nowhere_else(tmp_path: Path) -> None:
    page = of_page()
    assert page.keys() == WORDS.keys()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "some.txt").write_text("\n".join(f"{i} times {i} is {i * i}" for i in range(2000)))
    (tmp_path / "program.py").write_text(PROGRAM)
    interfaces = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    base = {name: value for name, value in os.environ.items() if name not in interfaces}
    base |= {"XDG_STATE_HOME": str(tmp_path / "state"), "OMP_NUM_THREADS": "1"}
    marks = {command: uuid.uuid4().hex for command in WORDS}
    with contextlib.ExitStack() as stack:
        running = {}
        for command, words in WORDS.items():
            argv = [sys.executable, "-m", "dtrain", command, *words]
            log = stack.enter_context((tmp_path / f"{command}.log").open("w"))
            environment = {**base, MARK: marks[command]}
            running[command] = subprocess.Popen(argv, cwd=tmp_path, env=environment, stdout=log, stderr=log)
            stack.callback(running[command].kill)
        found: dict[str, set[str]] = {command: set() for command in WORDS}
        deadline, marked = time.monotonic() + 150, Marked(marks)
        while any(process.poll() is None for process in running.values()) and time.monotonic() < deadline:
            for command, address in marked.listeners():
                found[command].add(address)
            if all(process.poll() is not None for command, process in running.items() if command != "members"):
                running["members"].send_signal(signal.SIGTERM)
            time.sleep(0.2)
    codes = {command: process.wait(20) for command, process in running.items()}
    assert found == page, {command: (tmp_path / f"{command}.log").read_text()[-2000:] for command in WORDS}
    assert {command for command, code in codes.items() if code} <= {"doctor"}  # which tells what it finds
