"""``make fuzz``: the long run, 100,000 damaged inputs for each parser, into docs/evidence/fuzz.md.

It takes hours, so what is done is kept, and a run that was ended goes on with the rest as long as the code is the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.evidence import circumstances, write
from benchmarks.harness import say
from benchmarks.page import Report, at_most, table
from benchmarks.provenance import EVIDENCE, DirtyTree, require_clean
from tests.fuzz.harness import MEMORY_MIB, SECONDS, Counts, run
from tests.fuzz.targets import TARGETS

CHUNK = 5_000
PROCESSES = 2
KEPT = Path("build/fuzz.jsonl")
CODE = ("comm", "dtrain", "launchers", "slurm", "tests/fuzz")

Row: TypeAlias = dict[str, Any]

Work = tuple[int, int, int, int]
"""Number of the target, first input, how many, seed."""


def _chunk(work: Work) -> Counts:
    index, first, count, seed = work
    return run(TARGETS[index], count, seed=seed, first=first)


class Kept:
    """Chunks that were tried before with this very code, in a file of lines."""

    def __init__(self, path: Path) -> None:
        self.path = path
        asked = ["git", "rev-parse", *(f"HEAD:{folder}" for folder in CODE)]
        self.code = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
        self._found: dict[str, Counts] = {}
        changed = subprocess.run(["git", "status", "--porcelain", "--", *CODE], capture_output=True, check=True).stdout
        if changed:  # no name for this code
            self.code = ["changed"]
            return
        for line in path.read_text().splitlines() if path.exists() else ():
            name, code, counts = json.loads(line)
            if code == self.code:
                self._found[name] = Counts(**{**counts, "failures": Counter(counts["failures"])})

    def get(self, work: Work) -> Counts | None:
        return self._found.get(self._name(work))

    def add(self, work: Work, counts: Counts) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(
                json.dumps([self._name(work), self.code, {**vars(counts), "failures": dict(counts.failures)}]) + "\n"
            )

    def _name(self, work: Work) -> str:
        index, *numbers = work
        return f"{TARGETS[index].name} {numbers}"


def merged(chunks: Sequence[Counts]) -> Counts:
    """One target's chunks together."""
    total = Counts()
    for counts in chunks:
        total.inputs += counts.inputs
        total.refused += counts.refused
        total.read += counts.read
        total.slowest_seconds = max(total.slowest_seconds, counts.slowest_seconds)
        total.peak_mib = max(total.peak_mib, counts.peak_mib)
        total.failures.update(counts.failures)
        total.examples += counts.examples
    return total


def row(counts: Counts, revision: str) -> Row:
    """What the page says of one target."""
    return {
        "inputs": counts.inputs, "refused": counts.refused, "read": counts.read, "failures": dict(counts.failures),
        "slowest_seconds": counts.slowest_seconds, "peak_mib": counts.peak_mib, "made_at": revision,
    }  # fmt: skip


def rows_of(page: Path) -> dict[str, Row]:
    """Those of a page that was written before, of the targets that there still are; none without a page."""
    if not page.exists():
        return {}
    content = json.loads(page.read_text())
    names = {target.name for target in TARGETS}
    made_at = content["made"]["revision"]
    return {name: {"made_at": made_at, **said} for name, said in content["figures"].items() if name in names}


def report(rows: Mapping[str, Row], command: str) -> Report:
    """The page, by `row` of each target."""
    lines = [
        [name, f"{r['inputs']:,}", f"{r['refused']:,}", f"{r['read']:,}", f"{sum(r['failures'].values()):,}",
         f"{1000 * r['slowest_seconds']:,.0f}", f"{r['peak_mib']:,.0f}", r["made_at"][:10]]
        for name, r in rows.items()
    ]  # fmt: skip
    failures = {name: r["failures"] for name, r in rows.items() if r["failures"]}
    listed = "".join(f"- {name}: {places}\n" for name, places in failures.items()) or "None.\n"
    body = (
        "Each input is an intact file or message with bits flipped, ends cut off or added, slices removed, repeated, "
        "swapped or overwritten, numbers replaced, or, where it is JSON, values, keys and nesting changed. Refused: "
        "the exception that the parser documents. Read: a value; where the format has a checksum it was compared with "
        "what was written, elsewhere its types were. Failed: any other exception, a changed value behind a checksum, a "
        f"value of wrong types, more than {MEMORY_MIB} MiB or {SECONDS:.0f} s, or the end of the process.\n\n"
        + table(["parser", "inputs", "refused", "read", "failed", "slowest, ms", "memory, MiB", "made at"], lines)
        + "\n\n## Failures\n\n" + listed
    )  # fmt: skip
    checks = (
        at_most("inputs that failed", sum(sum(r["failures"].values()) for r in rows.values()), 0),
        at_most("slowest input", max(r["slowest_seconds"] for r in rows.values()), SECONDS, " s"),
        at_most("memory for one input", max(r["peak_mib"] for r in rows.values()), MEMORY_MIB, " MiB"),
    )
    return Report("Damaged inputs", body, (command,), checks, dict(rows))


def _tried(picked: Sequence[int], inputs: int, seed: int) -> dict[str, list[Counts]]:
    """Chunks of the picked targets, by name; those that are kept are not tried again."""
    firsts = range(0, inputs, CHUNK)
    work = [(n, first, min(CHUNK, inputs - first), seed) for n in picked for first in firsts]
    kept = Kept(KEPT)
    by_parser: dict[str, list[Counts]] = {}
    with ProcessPoolExecutor(PROCESSES) as pool, contextlib.ExitStack() as ended:
        ended.callback(pool.shutdown, cancel_futures=True)  # an error here does not wait for hours of work
        tried = pool.map(_chunk, [chunk for chunk in work if kept.get(chunk) is None])
        for chunk in work:
            counts = kept.get(chunk)
            if counts is None:
                counts = next(tried)
                kept.add(chunk, counts)
            name = TARGETS[chunk[0]].name
            by_parser.setdefault(name, []).append(counts)
            if chunk[1] + CHUNK >= inputs:
                tried_all = merged(by_parser[name])
                failures = dict(tried_all.failures)
                say(f"{name}: {tried_all.inputs:,} inputs, {sum(failures.values())} failed {failures}")
                for example in tried_all.examples[:3]:
                    say(example)
    return by_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if no input failed. Raises `DirtyTree` before anything runs, if a page would be written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.damaged_inputs", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME",
        help="parsers whose names contain it; all by default. With --out the page there keeps its other rows",
    )  # fmt: skip
    parser.add_argument("--inputs", type=int, default=100_000, help="for each parser (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, help="where the page goes (default: docs/evidence, if all parsers are tried)"
    )
    chosen = parser.parse_args(arguments)
    picked = [n for n, target in enumerate(TARGETS) if not chosen.names or any(w in target.name for w in chosen.names)]
    if not picked:
        parser.error(f"no parser is called so; there are {', '.join(target.name for target in TARGETS)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    out = chosen.out or (Path(EVIDENCE) if not chosen.names else None)
    if out is not None:
        require_clean()
    made = circumstances()
    by_parser = _tried(picked, chosen.inputs, chosen.seed)
    rows = {name: row(merged(parts), made.revision) for name, parts in by_parser.items()}
    others = rows_of(out / "fuzz.json") if out is not None and chosen.names else {}
    kept_rows = {name: said for name, said in others.items() if name not in rows}
    order = [target.name for target in TARGETS if target.name in rows or target.name in kept_rows]
    whole = report({name: rows.get(name) or kept_rows[name] for name in order}, "make fuzz")
    if out is not None:
        write("fuzz", whole, made, out, Counter(said["made_at"] for said in kept_rows.values()))
    return int(not all(check.met for check in whole.checks))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DirtyTree as error:
        sys.exit(str(error))
