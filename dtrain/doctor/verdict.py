"""From each host's report to the verdict: slow hosts, clock skew, different versions. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dtrain.doctor.finding import Finding
from dtrain.doctor.pairs import Exchange

__all__ = ["Report", "findings", "render"]

SLOW, FAR_SECONDS = 0.7, 1.0
SIGNS = {"ok": "ok", "warning": "WARNING", "problem": "PROBLEM"}


@dataclass(frozen=True)
class Report:
    """One rank's report."""

    rank: int
    host: str
    versions: Mapping[str, str]
    findings: tuple[Finding, ...]
    exchanges: tuple[Exchange, ...]


def findings(reports: Sequence[Report], world: int) -> list[Finding]:
    """All findings: each host's own, and those that only a comparison shows."""
    hosts = {report.rank: report.host for report in reports}
    out = [finding for report in reports for finding in report.findings]
    for rank in sorted(set(range(world)) - set(hosts)):
        out.append(Finding(f"rank {rank}", "report", "problem", "it has reported nothing", "look at its log"))
    if reports:
        for report in reports[1:]:
            if report.versions != reports[0].versions:
                what = f"{dict(report.versions)}, but {reports[0].host} has {dict(reports[0].versions)}"
                out.append(Finding(report.host, "versions", "problem", what, "install the same everywhere"))
    for report in reports:
        for exchange in report.exchanges:
            peer = hosts.get(exchange.peer, f"rank {exchange.peer}")
            if exchange.error:
                way_out = "is the link up, and no firewall between them?"
                out.append(Finding(report.host, f"pair with {peer}", "problem", exchange.error, way_out))
            elif abs(exchange.skew_seconds) > FAR_SECONDS:
                what = f"the clock of {peer} is {exchange.skew_seconds:+.1f} s off"
                out.append(Finding(report.host, "clock", "warning", what, "run chrony or ntpd on both"))
    return [*out, *_slow(reports, hosts)]


def _slow(reports: Sequence[Report], hosts: Mapping[int, str]) -> list[Finding]:
    """The host whose pairs are slow while those of the others are not."""
    rates: dict[int, list[float]] = {rank: [] for rank in hosts}
    for report in reports:
        for exchange in report.exchanges:
            if not exchange.error:
                rates[report.rank].append(exchange.mbit)
                rates.setdefault(exchange.peer, []).append(exchange.mbit)
    medians = {rank: statistics.median(measured) for rank, measured in rates.items() if measured}
    if not medians:
        return []
    usual = statistics.median(medians.values())
    out = []
    for rank, rate in sorted(medians.items()):
        name = hosts.get(rank, f"rank {rank}")
        if rate < SLOW * usual:
            way_out = f"look at its link, or leave it out: launcher.exclude={name}"
            out.append(Finding(name, "bandwidth", "problem", f"{rate:.0f} Mbit/s, the usual is {usual:.0f}", way_out))
        else:
            out.append(Finding(name, "bandwidth", "ok", f"{rate:.0f} Mbit/s in the middle of its pairs"))
    return out


def render(all_findings: Sequence[Finding], reports: Sequence[Report]) -> str:
    """A line per finding, problems last, so that they remain on the screen."""
    order = {"ok": 0, "warning": 1, "problem": 2}
    lines = []
    for finding in sorted(all_findings, key=lambda finding: order[finding.level]):
        lines.append(f"{SIGNS[finding.level]:<8} {finding.host:<12} {finding.check:<14} {finding.what}")
        if finding.way_out and finding.level != "ok":
            lines.append(f"{'':<8} {'':<12} {'':<14} -> {finding.way_out}")
    pairs = [exchange for report in reports for exchange in report.exchanges if not exchange.error]
    if pairs:
        latency = statistics.median(exchange.latency_ms for exchange in pairs)
        rate = statistics.median(exchange.mbit for exchange in pairs)
        lines.append(f"{len(pairs)} pairs: one way {latency:.2f} ms, {rate:.0f} Mbit/s (medians)")
    count = sum(finding.level == "problem" for finding in all_findings)
    warned = sum(finding.level == "warning" for finding in all_findings)
    more = f", but mind {'the warning' if warned == 1 else f'{warned} warnings'} above" if warned else ""
    lines.append(f"{count} problem{'s' * (count != 1)}" if count else f"no problems found{more}")
    return "\n".join(lines)
