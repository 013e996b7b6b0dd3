"""A page: one HTML file that opens from disk, in light and dark, and loads nothing.

What makes a page fills in a `Page` with parts: tables (`Table`) and notes (`Notes`) of here, plots of
`dtrain.report.plots`, or anything else that has `html`. Parts are plain values, so that a page can be tested without
being drawn.

>>> table = Table(["sync", "ms"], [["dense", "9,500"], ["diloco", "1,540"]])
>>> page = Page("plan", "a model on 4 machines", [table, Notes(["the links were measured"])], table=table)
>>> print(page.text())
sync    ms
dense   9,500
diloco  1,540
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Protocol

from dtrain import __version__

__all__ = ["Facts", "Notes", "Page", "Part", "Table", "columns"]

BOLD, RIGHT = ' class="best"', ' class="number"'


class Part(Protocol):
    """Something that stands on a page."""

    def html(self) -> str:
        """As HTML that is complete in itself, with all text escaped."""


@dataclass(frozen=True)
class Table:
    """Rows of text below a head; columns of numbers are set to the right.

    ``best``: numbers of the rows that are printed bold.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""
    best: Sequence[int] = ()

    def html(self) -> str:
        """A table that scrolls sideways where it is wide."""
        sides = [RIGHT if all(map(_is_number, column)) else "" for column in zip(*self.rows, strict=True)]
        sides = sides or [""] * len(self.head)
        head = "".join(f"<th{side}>{escape(name)}</th>" for name, side in zip(self.head, sides, strict=True))
        rows = "".join(
            f"<tr{BOLD if number in self.best else ''}>"
            + "".join(f"<td{side}>{escape(cell)}</td>" for cell, side in zip(row, sides, strict=True))
            + "</tr>"
            for number, row in enumerate(self.rows)
        )
        title = f"<h3>{escape(self.title)}</h3>" if self.title else ""
        note = f"<figcaption>{escape(self.note)}</figcaption>" if self.note else ""
        return (
            f'<figure class="table">{title}<div class="wide"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>{note}</figure>"
        )

    def text(self) -> str:
        """For a terminal."""
        return columns([self.head, *self.rows])


@dataclass(frozen=True)
class Notes:
    """Lines of text; with a title they are a section of their own. ``warning``: set apart from the rest."""

    lines: Sequence[str]
    title: str = ""
    warning: bool = False

    def html(self) -> str:
        """A list."""
        title = f"<h3>{escape(self.title)}</h3>" if self.title else ""
        items = "".join(f"<li>{escape(line)}</li>" for line in self.lines)
        return f'<section class="notes{" warning" if self.warning else ""}">{title}<ul>{items}</ul></section>'


@dataclass(frozen=True)
class Facts:
    """The few figures that a page begins with: ``(name, value, more)``, the last in small print."""

    facts: Sequence[tuple[str, str, str]]

    def html(self) -> str:
        """A row of boxes."""
        boxes = (
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><small>{escape(more)}</small></div>"
            for name, value, more in self.facts
        )
        return f'<dl class="facts">{"".join(boxes)}</dl>'


@dataclass(frozen=True)
class Page:
    """A title, a line below it, and parts in order. ``table``: what a terminal shows. ``warnings``: lines to mind."""

    title: str
    lead: str
    parts: Sequence[Part]
    table: Table | None = None
    warnings: Sequence[str] = ()

    def text(self) -> str:
        """The table and the warnings, for a terminal."""
        return "\n".join([*([self.table.text()] if self.table is not None else []), *self.warnings])

    def html(self) -> str:
        """The whole file."""
        minded = [Notes(self.warnings, "Mind", warning=True)] if self.warnings else []
        body = "".join(part.html() for part in [*minded, *self.parts])
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
            f"<title>{escape(self.title)}</title><style>{CSS}</style></head>\n"
            f"<body><header><h1>{escape(self.title)}</h1><p>{escape(self.lead)}</p></header>\n<main>{body}</main>\n"
            f"<footer>dtrain {escape(__version__)}</footer></body></html>\n"
        )

    def write(self, path: Path) -> None:
        """Write the file, atomically. Raises ``OSError``, and ``ModuleNotFoundError`` where matplotlib is missing."""
        text = self.html()
        spare = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        try:
            spare.write_text(text, encoding="utf-8")
            spare.replace(path)
        finally:
            spare.unlink(missing_ok=True)


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as aligned columns.

    >>> print(columns([["a", "bc"], ["def", "g"]]))
    a    bc
    def  g
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _is_number(cell: str) -> bool:
    return cell == "-" or cell.lstrip("+-−<~")[:1].isdigit()


CSS = """
:root{color-scheme:light dark;--paper:#fff;--card:#f7f8fa;--ink:#1c2430;--muted:#667085;--grid:#e3e6ec;--edge:#e3e6ec;
--warn:#fff4e0;--c0:#2563eb;--c1:#d9730d;--c2:#0a8f5b;--c3:#c92a4b;--c4:#7c3aed;--c5:#0788a3;--c6:#8a6d1a;--c7:#5b6472}
@media (prefers-color-scheme:dark){:root{--paper:#12161d;--card:#1a2029;--ink:#e6e9ef;--muted:#98a2b3;--grid:#2b3340;
--edge:#2b3340;--warn:#3a2d12;--c0:#6ea8ff;--c1:#ffa654;--c2:#4fd39a;--c3:#ff7d95;--c4:#b795ff;--c5:#4fcbe3;--c6:#d8bb5c;
--c7:#a3adbb}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:28px 22px 40px;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:24px;margin:0;overflow-wrap:anywhere}h3{font-size:15px;margin:0 0 6px}
header p{margin:4px 0 20px;color:var(--muted)}
main{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,460px),1fr));gap:16px}
figure,section,dl{margin:0}
.plot,.table,.notes{background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:14px 16px}
.plot,.table,.notes{min-width:0}
.table,.notes,.facts{grid-column:1/-1}
.plot svg{display:block;width:100%;height:auto;overflow:visible}
.plot svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif!important}
.told{fill:transparent;stroke-width:2;stroke-opacity:0}.told:hover{stroke-opacity:1}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;list-style:none;padding:0;margin:0 0 6px;font-size:13px}
.legend li{overflow-wrap:anywhere}
.legend i{display:inline-block;width:16px;height:0;border-top:3px solid var(--c);vertical-align:middle;margin-right:6px}
.legend i.dashed{border-top-style:dashed}.legend i.faint{opacity:.45}
.legend i.points{border:0;width:9px;height:9px;border-radius:50%;background:var(--c)}
figcaption{color:var(--muted);font-size:13px;margin-top:6px}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:5px 16px 5px 0;border-bottom:1px solid var(--edge);vertical-align:top}
th{color:var(--muted);font-weight:600;white-space:nowrap}.number{text-align:right;white-space:nowrap}
tr.best td{font-weight:700}
tbody tr:last-child td{border-bottom:0}
.notes ul{margin:0;padding-left:18px}.notes.warning{background:var(--warn)}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(170px,1fr));gap:12px}
.facts div{background:var(--card);border:1px solid var(--edge);border-radius:10px;padding:10px 16px}
.facts dt{color:var(--muted);font-size:13px}.facts dd{margin:0;font-size:21px;font-weight:650}
.facts small{color:var(--muted)}
footer{color:var(--muted);font-size:12px;margin-top:18px}
""".replace("\n", "")
