"""The meter's bytes equal the method's formula, and agree with what a network interface counted.

Two processes in network namespaces of their own, joined by a veth pair. The namespaces have no names: they, and the
pair with them, are gone as soon as the processes are, whatever happens to this one.

What framing costs depends on the frames. Interfaces that offload segmentation, as veth does, count packets of up to
64 KiB with one header each: 0.2 to 0.7 % here. Without offload, frames of 9000 bytes cost 0.9 to 2.4 %, and frames of
1500 bytes 4.7 to 6.7 % (the headers of TCP and Ethernet alone are 66 bytes for each 1448), whatever dtrain does. So the
frames are those of 9000 bytes, and the bound holds with offload and without it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from dtrain.comm.collectives.two_phase import two_phase_bytes
from tests.system.interface_job import METHODS, STEPS, Counts

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

WORLD = 2
ADDRESSES = ("10.203.7.1", "10.203.7.2")
PORT = "29571"  # nobody else lives in these namespaces
JOB = Path(__file__).with_name("interface_job.py")
MTU = "9000"
SECONDS = 90


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Counts]]:
    """By rank and method."""
    check_machine()
    folder = tmp_path_factory.mktemp("interface")
    with ExitStack() as stack:
        jobs = [stack.enter_context(job(rank, folder)) for rank in range(WORLD)]
        for process in jobs:
            expect(process, "ready", folder)
        join([process.pid for process in jobs])
        for process in jobs:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        told = [process.communicate(timeout=SECONDS)[0] for process in jobs]
        assert [process.returncode for process in jobs] == [0] * WORLD, errors(folder)
    return [{name: Counts(**figures) for name, figures in json.loads(text).items()} for text in told]


def check_machine() -> None:
    if os.geteuid() != 0:
        pytest.fail("this test makes network namespaces and must run as root")
    for command, package in (("ip", "iproute2"), ("unshare", "util-linux"), ("nsenter", "util-linux")):
        if shutil.which(command) is None:
            pytest.fail(f"{command} is missing: apt-get install {package}")


@contextmanager
def job(rank: int, folder: Path) -> Iterator[subprocess.Popen[str]]:
    environment = {
        **os.environ, "RANK": str(rank), "WORLD_SIZE": str(WORLD), "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": PORT,
        "GLOO_SOCKET_IFNAME": interface(rank),
    }  # fmt: skip
    with (folder / f"rank-{rank}.log").open("w") as log:
        process = subprocess.Popen(  # unshare executes the job in its own place, so this is the job's process
            ["unshare", "--net", sys.executable, str(JOB)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
        )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            process.kill()


def interface(rank: int) -> str:
    return f"dt{os.getpid()}v{rank}"


def expect(process: subprocess.Popen[str], line: str, folder: Path) -> None:
    assert process.stdout is not None
    found = process.stdout.readline().strip()
    assert found == line, f"expected {line!r}, the job said {found!r}\n{errors(folder)}"


def join(pids: list[int]) -> None:
    """A veth pair between the namespaces of two processes, created inside them: it never exists anywhere else."""
    first, second = pids
    run("ip", "link", "add", interface(0), "netns", str(first), "type", "veth", "peer", "name", interface(1),
        "netns", str(second))  # fmt: skip
    for rank, pid in enumerate(pids):
        inside = ["nsenter", "--target", str(pid), "--net", "ip"]
        run(*inside, "address", "add", f"{ADDRESSES[rank]}/30", "dev", interface(rank))
        run(*inside, "link", "set", "lo", "up")
        run(*inside, "link", "set", interface(rank), "mtu", MTU, "up")
    deadline = time.monotonic() + 10
    while "state UP" not in run("nsenter", "--target", str(first), "--net", "ip", "link", "show", interface(0)):
        assert time.monotonic() < deadline, "the veth pair has no carrier after 10 s"
        time.sleep(0.02)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if done.returncode:
        pytest.fail(f"{' '.join(command)} failed: {done.stderr.strip()} (may this root create network interfaces?)")
    return done.stdout


def errors(folder: Path) -> str:
    return "\n".join(f"---- {log.name}\n{log.read_text()}" for log in sorted(folder.glob("*.log")))


@pytest.mark.parametrize("name", METHODS)
def test_the_meter_equals_the_formula(counts: list[dict[str, Counts]], name: str) -> None:
    method = METHODS[name]
    for rank in range(WORLD):
        found = counts[rank][name]
        per_exchange = 1 if name == "diloco" else found.buckets
        messages = method.exchanges * per_exchange
        assert (found.buckets >= 2) == (name != "diloco")  # under which DDP leaves gradients alone
        assert found.messages == {"AllToAll": messages, "AllGather": messages}
        # Encoded chunks are cut per FQN, so it does not matter how the parameters are spread over the messages; each
        # message beyond the one that the formula knows brings one more flag byte, to and from every other rank.
        each = two_phase_bytes(found.numels, method.compressor, WORLD, weighted=name == "diloco")
        whole = method.exchanges * each
        flags = 2 * (WORLD - 1) * (messages - method.exchanges)
        assert found.meter_bytes == whole + flags


@pytest.mark.parametrize("name", METHODS)
def test_the_interface_agrees_with_the_meter(counts: list[dict[str, Counts]], name: str) -> None:
    for rank in range(WORLD):
        found = counts[rank][name]
        assert found.meter_bytes > STEPS * 1e5  # else this would be a test of headers
        assert found.meter_bytes <= found.interface_bytes <= 1.03 * found.meter_bytes, found
