"""Figures in prose are those of the evidence pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
LOSS = (DOCS / "evidence" / "loss.md").read_text()
CHOOSING = (DOCS / "compression" / "choosing.md").read_text()


def cells(text: str, first: str) -> list[str]:
    row = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in row.strip("|").split("|")]


@pytest.mark.parametrize(
    ("here", "there", "column"),
    [
        ("dense", "dense", 1),
        ("`int8_ef`", "int8_ef", 1),
        ("`int4_ef`", "int4_ef", 1),
        ("`powersgd16_ef`", "powersgd16_ef", 1),
        ("`local_sgd` every 8 steps, `int4_ef`", "local_sgd, every 8 steps, int4_ef", 1),
        ("`powersgd_ef` (rank 4)", "PowerSGD rank 4", 2),
    ],
)
def test_the_losses_of_compressors_are_those_of_the_page(here: str, there: str, column: int) -> None:
    assert float(cells(CHOOSING, here)[1]) == pytest.approx(float(cells(LOSS, there)[column]), abs=5.1e-4)


def test_so_is_what_4_bits_lose_and_what_kernels_reach() -> None:
    prose = (DOCS / "compression" / "quantize.md").read_text()
    off = re.search(r"off by ([\d.]+) % after 500 steps", prose)
    assert off is not None and float(off[1]) == float(cells(LOSS, "int4_ef")[2].strip("+ %"))
    kernels = (DOCS / "evidence" / "kernels.md").read_text()
    pattern = r"at ([\d.]+) of the speed.*?at ([\d.]+), with feedback at ([\d.]+),.*?at ([\d.]+) \("
    reached = re.search(pattern, prose, re.DOTALL)
    assert reached is not None
    rows = ("8 bits", "4 bits", "feedback + 8 bits", "decode and mean of four")
    for figure, row in zip(reached.groups(), rows, strict=True):
        assert float(figure) == pytest.approx(float(cells(kernels, row)[3]), abs=5.1e-3)
