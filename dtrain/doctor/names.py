"""Host names, forward and reverse: every host's name resolves to an address, and the address back to that host.

torch and ssh do both look-ups. An address that resolves back to another host sends ranks to the wrong place; one that
does not resolve makes each look-up wait for a name server.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence

from dtrain.doctor.finding import Finding

__all__ = ["names"]

PATIENCE_SECONDS = 8.0  # for all addresses together: the other hosts wait for this one
WAY_OUT = "name all nodes in /etc/hosts or in DNS"


def names(host: str, hosts: Sequence[str]) -> list[Finding]:
    """What ``host`` finds about the names of all hosts of the job."""
    addresses: dict[str, str] = {}
    missing, loopback = [], []
    for name in hosts:
        try:
            resolved = {str(entry[4][0]) for entry in socket.getaddrinfo(name, None, socket.AF_INET)}
        except OSError:
            missing.append(name)
            continue
        if name != host and all(address.startswith("127.") for address in resolved):
            loopback.append(f"{name} is {', '.join(sorted(resolved))} here")
        addresses |= dict.fromkeys(sorted(resolved), name)
    if loopback:
        what = f"{'; '.join(sorted(loopback))}, which is this host and not that one"
        return [Finding(host, "other names", "problem", what, f"mend /etc/hosts: {WAY_OUT}"), *_back(host, addresses)]
    if missing:
        what = f"{', '.join(sorted(missing))} do not resolve"
        return [Finding(host, "other names", "problem", what, WAY_OUT), *_back(host, addresses)]
    return [Finding(host, "other names", "ok", f"{len(hosts)} resolve"), *_back(host, addresses)]


def _back(host: str, addresses: dict[str, str]) -> list[Finding]:
    """Reverse look-ups, of all addresses but the loopback's."""
    wrong, nameless, late = [], [], []
    deadline = time.monotonic() + PATIENCE_SECONDS
    checked = {address: name for address, name in addresses.items() if not address.startswith("127.")}
    for address, name in checked.items():
        if time.monotonic() > deadline:
            late.append(address)
            continue
        host_names = _names_of(address)
        if not host_names:
            nameless.append(f"{address} ({name})")
        elif (official := _other_host(host_names, address, name, set(addresses.values()))) is not None:
            wrong.append(f"{name} is {address}, but {address} is {official}")
    findings = []
    if wrong:
        way_out = "one of the two is out of date in /etc/hosts or in DNS: mend it, or name hosts by address"
        findings.append(Finding(host, "reverse names", "problem", "; ".join(wrong), way_out))
    if nameless:
        what = f"no name for {', '.join(nameless)}"
        findings.append(Finding(host, "reverse names", "warning", what, f"connections may be slow to begin: {WAY_OUT}"))
    if late:
        what = f"look-ups take so long that {len(late)} of {len(checked)} were left out"
        findings.append(Finding(host, "reverse names", "warning", what, f"the name server does not answer: {WAY_OUT}"))
    return findings or [Finding(host, "reverse names", "ok", f"{len(checked)} lead back")]


def _names_of(address: str) -> list[str]:
    """All names that an address has, the official one first; none if it has none."""
    try:
        official, aliases, _ = socket.gethostbyaddr(address)
    except OSError:
        return []
    return [official, *aliases]


def _other_host(host_names: Sequence[str], address: str, name: str, hosts: set[str]) -> str | None:
    """The name that an address resolves back to, if it is another host's; None for any name of the same host."""
    if _short(name) in map(_short, host_names):
        return None
    official = host_names[0]
    if _short(official) in map(_short, hosts):
        return official
    try:
        leads_to = {str(entry[4][0]) for entry in socket.getaddrinfo(official, None, socket.AF_INET)}
    except OSError:
        return None  # no host's, as it does not resolve
    return official if address not in leads_to else None


def _short(name: str) -> str:
    return name.partition(".")[0].lower()
