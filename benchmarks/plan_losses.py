"""Writes the table of losses that ships with `dtrain plan`, from the evidence page of all syncs at equal tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.provenance import EVIDENCE, ROOT
from dtrain.plan.losses import EXACT, TABLE

PAGE = f"{EVIDENCE}/all_syncs.json"


def losses(page: dict[str, Any]) -> dict[str, Any]:
    """The table: of each sync with AdamW inside its last validation loss over that of dense, minus 1.

    A run without a finite loss has no row.
    """
    found = {
        name.removesuffix(", AdamW"): run["validation_losses"][-1]
        for name, run in page["figures"].items()
        if name.endswith(", AdamW") and run["validation_losses"] and run["validation_losses"][-1] is not None
    }
    base = found[EXACT]
    rows = {name: round(loss / base - 1, 5) for name, loss in sorted(found.items()) if name != EXACT}
    return {"source": PAGE, "revision": page["made"]["revision"], "rows": rows}


def written_losses(root: Path = ROOT) -> bool:
    """Write the table if the page is there; whether it changed."""
    path = root / PAGE
    if not path.is_file():
        return False
    text = json.dumps(losses(json.loads(path.read_text())), indent=2) + "\n"
    table = root / TABLE.relative_to(ROOT.resolve()) if TABLE.is_relative_to(ROOT.resolve()) else TABLE
    if table.read_text() == text:
        return False
    table.write_text(text)
    return True
