"""What a report is made of, and how it looks as Markdown. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """A figure and the line that it is held to."""

    what: str
    found: str
    line: str
    met: bool

    def __str__(self) -> str:
        return f"{self.what}: {self.found} ({self.line}): {'met' if self.met else 'MISSED'}"


@dataclass(frozen=True)
class Report:
    """``commands``: what was run, to the letter. ``figures``: plain JSON, what a plot would be made of."""

    title: str
    body: str  # Markdown
    commands: tuple[str, ...]
    checks: tuple[Check, ...]
    figures: Mapping[str, object]


@dataclass(frozen=True)
class Circumstances:
    """Where, when and with what a report was made. ``load``: processes that wanted a core in the minute before.

    ``revision``: of all its figures but those of runs that were kept from earlier commands, of which ``sweep`` tells.
    ``measures``: the files and folders whose change may change its figures.
    """

    machine: str
    date: str
    revision: str
    versions: str
    load: str
    sweep: str = "no run was kept from an earlier command"
    measures: str = "not declared"


def at_most(what: str, value: float, limit: float, unit: str = "") -> Check:
    """
    >>> str(at_most("seconds", 12, 10))
    'seconds: 12 (at most 10): MISSED'
    """
    return Check(what, f"{value:.4g}{unit}", f"at most {limit:g}{unit}", value <= limit)


def at_least(what: str, value: float, limit: float, unit: str = "") -> Check:
    """
    >>> str(at_least("ratio", 3.938, 3.9, "x"))
    'ratio: 3.938x (at least 3.9x): met'
    """
    return Check(what, f"{value:.4g}{unit}", f"at least {limit:g}{unit}", value >= limit)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column to the left and the others to the right.

    >>> print(table(["sync", "loss"], [["dense", "2.1"]]))
    | sync | loss |
    |---|---:|
    | dense | 2.1 |
    """
    rule = "|".join(["", "---", *["---:"] * (len(header) - 1), ""])
    return "\n".join([f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(row)} |" for row in rows)])


def page(report: Report, circumstances: Circumstances) -> str:
    """The whole Markdown file."""
    about = dataclasses.asdict(circumstances)
    checks = [[check.what, check.found, check.line, "met" if check.met else "**MISSED**"] for check in report.checks]
    return "\n\n".join(
        [
            f"# {report.title}",
            "Written by `make evidence`; not edited by hand.",
            report.body,
            "## Lines",
            table(["figure", "found", "line", ""], checks),
            "## Made by",
            "\n".join(f"- {name}: {value}" for name, value in about.items()),
            "How many commits have touched what is measured since: `make evidence ARGS=stale`.",
            "```\n" + "\n".join(report.commands) + "\n```\n",
        ]
    )
