"""One host of `dtrain doctor`: ``python -m dtrain.doctor.worker FOLDER``. It leaves FOLDER/doctor/rank-K.json.

The hosts meet at a store at MASTER_ADDR; those that do not come are named, and none waits for long.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
from datetime import timedelta
from pathlib import Path

from dtrain.doctor.checks import local_findings, versions
from dtrain.doctor.finding import Finding
from dtrain.doctor.names import names
from dtrain.doctor.pairs import Exchange, Server, exchange, rounds

SECONDS = timedelta(seconds=15)
TOKEN = "token"


def main(folder: Path) -> None:
    """Check this host, then every pair that it is the first of."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    host, here = socket.gethostname(), folder / "doctor"
    here.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        (here / TOKEN).write_text(host)
    findings = local_findings(folder, hosts=world)
    exchanges: list[Exchange] = []
    if world > 1:
        met, exchanges = _meet(here, host, rank, world)
        findings += met
    content = {
        "rank": rank, "host": host, "versions": versions(), "findings": [dataclasses.asdict(f) for f in findings],
        "exchanges": [dataclasses.asdict(e) for e in exchanges],
    }  # fmt: skip
    new = here / f"rank-{rank}.json.new"
    new.write_text(json.dumps(content) + "\n")
    os.replace(new, here / f"rank-{rank}.json")


def _meet(here: Path, host: str, rank: int, world: int) -> tuple[list[Finding], list[Exchange]]:
    from dtrain.comm.torch_private import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    findings: list[Finding] = []
    try:
        store = TCPStore(address, port, world, rank == 0, timeout=SECONDS, wait_for_workers=False)
    except Exception as error:  # torch has no type of its own for it in all versions
        way_out = "is it firewalled, or does the name mean another host there? set launcher.address"
        what = f"{address}:{port}, where the ranks meet, cannot be reached ({str(error).splitlines()[0]})"
        return [Finding(host, "meeting point", "problem", what, way_out)], []
    server = Server()
    store.set(f"host/{rank}", json.dumps([host, server.port]))
    met: dict[int, tuple[str, int]] = {}
    for peer in range(world):
        try:
            store.wait([f"host/{peer}"], SECONDS)
            name, peer_port = json.loads(store.get(f"host/{peer}"))
            met[peer] = (name, peer_port)
        except Exception:
            what = f"rank {peer} has not come within {SECONDS.total_seconds():g} s"
            findings.append(Finding(host, "meeting point", "problem", what, "look at its log, and at its host"))
    findings += names(host, [name for name, _ in met.values()])
    if not (here / TOKEN).exists():
        way_out = "choose run.dir on a file system that all nodes share"
        findings.append(
            Finding(host, "shared folder", "problem", f"{here} is not the one that rank 0 writes to", way_out)
        )
    exchanges = []
    for number, pairs in enumerate(rounds(world)):
        for first, peer in pairs:
            if first == rank and peer in met:
                exchanges.append(exchange(peer, *met[peer]))
        _round_over(store, number, rank, [r for r in range(world) if r in met])
    server.close()
    return findings, exchanges


def _round_over(store: object, number: int, rank: int, present: list[int]) -> None:
    """Wait for the others, so that pairs of two rounds do not share a link; a host that is late is not waited for."""
    from dtrain.comm.torch_private import Store

    assert isinstance(store, Store)
    store.set(f"round/{number}/{rank}", "")
    try:
        store.wait([f"round/{number}/{other}" for other in present], SECONDS)
    except Exception:
        return  # its own exchanges show what is wrong


if __name__ == "__main__":
    main(Path(sys.argv[1]))
