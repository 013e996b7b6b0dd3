"""The rendezvous of ranks: a store of torch that listens at one address only, and the agent's view of it.

torch's own server listens on every interface, and its elastic agent unpickles what the rendezvous store returns, so
that whoever reaches the port of ``torchrun --standalone`` runs code as its user. Here the agent of one machine has a
store that no other process sees, and the ranks get one that this process serves on the loopback interface, anew for
each attempt: from the store of the one before gloo would read the addresses of dead processes.

torch is imported lazily: launchers start without it.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import uuid
from collections.abc import Mapping, MutableMapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public
    from torch.distributed.elastic.rendezvous import RendezvousHandler

__all__ = ["INTERFACES", "LOOPBACK", "listening", "of_environment", "on_loopback", "one_machine"]

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
EVERYWHERE = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
TIMEOUT = timedelta(minutes=30)  # torch's own, for ranks that start late
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Variables that name the network interface of the ranks' connections."""


def listening(host: str, port: int = 0) -> TCPStore:
    """A store that this process serves at ``host`` only, as long as the object lives. ``port`` 0: any free one.

    Raises ``OSError`` for an address that is not this machine's and for a port that is taken.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=1024, dualstack_ipv6=host == "::") as listener:
        host, port = listener.getsockname()[:2]
        return TCPStore(
            LOOPBACK if host in ("::", "0.0.0.0") else host, port, is_master=True, timeout=TIMEOUT,
            wait_for_workers=False, master_listen_fd=listener.detach(),
        )  # fmt: skip


def of_environment(variables: MutableMapping[str, str] = os.environ) -> dict[str, Any]:
    """What ``init_process_group`` needs beside its backend, so that rank 0 listens only where MASTER_ADDR leads.

    Nothing where the launcher serves the store. Where all ranks are on one machine, they listen on its loopback
    interface: ``variables`` then name it. Raises ``OSError`` where MASTER_PORT is taken.
    """
    if variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or "MASTER_ADDR" not in variables:
        return {}
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public

    rank, world = int(variables["RANK"]), int(variables["WORLD_SIZE"])
    host, port = variables["MASTER_ADDR"], int(variables["MASTER_PORT"])
    if int(variables.get("LOCAL_WORLD_SIZE", 0)) == world:
        host = LOOPBACK
        variables.update(on_loopback(variables))
    if rank:
        return {"store": TCPStore(host, port, is_master=False, timeout=TIMEOUT), "rank": rank, "world_size": world}
    where = host if host == LOOPBACK else _where(host)
    return {"store": listening(where, port), "rank": rank, "world_size": world}


def _where(name: str) -> str:
    """The address of this machine to which ``name`` leads from all machines of the job; all of them if none is known.

    >>> _where("127.0.1.1") == EVERYWHERE  # what Debian writes into /etc/hosts, of this machine alone
    True
    """
    addresses = [str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)]
    address = min(addresses, key=lambda address: ":" in address)  # IPv4, as torch's clients try all of them
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return EVERYWHERE
    try:
        socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET).close()
    except OSError as error:
        log.warning("MASTER_ADDR=%s is no address of this machine (%s): listening at all of them", name, error)
        return EVERYWHERE
    return address


def on_loopback(variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment with which ranks of one machine listen on loopback only, unless it names an interface already."""
    name = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "")
    return {variable: name for variable in INTERFACES if name and not variables.get(variable)}


def one_machine() -> RendezvousHandler:
    """The rendezvous of a single agent: nothing to wait for, and no port but the one for its ranks."""
    from torch.distributed import HashStore  # type: ignore[attr-defined]  # public
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

    class OneMachine(RendezvousHandler):
        def __init__(self) -> None:
            self._id, self._closed = uuid.uuid4().hex, False
            self._ranks: Any = None  # the store of the attempt under way

        @property
        def use_agent_store(self) -> bool:
            return True  # rank 0 would open a store of its own, on every interface

        def get_backend(self) -> str:
            return "one-machine"

        def next_rendezvous(self) -> RendezvousInfo:
            self._ranks = listening(LOOPBACK)
            where = RendezvousStoreInfo(LOOPBACK, self._ranks.port)
            return RendezvousInfo(HashStore(), 0, 1, where)

        def is_closed(self) -> bool:
            return self._closed

        def set_closed(self) -> None:
            self._closed = True

        def num_nodes_waiting(self) -> int:
            return 0

        def get_run_id(self) -> str:
            return self._id

        def shutdown(self) -> bool:
            self._closed, self._ranks = True, None
            return True

    return OneMachine()
