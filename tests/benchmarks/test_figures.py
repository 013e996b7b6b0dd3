"""Figures in README.md and docs are those of the evidence pages: `make evidence ARGS=prose` writes them."""

from __future__ import annotations

import pytest

from benchmarks.prose import SENTENCES, Sentence, unclaimed
from benchmarks.provenance import EVIDENCE, ROOT

FILES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("sentence", SENTENCES, ids=lambda sentence: f"{sentence.file}: {sentence.text[:40]}")
def test_a_sentence_has_the_figures_of_its_page(sentence: Sentence) -> None:
    text = (ROOT / sentence.file).read_text()
    match = sentence.pattern.search(text)
    assert match, f"{sentence.file} has no such sentence: change it in benchmarks/prose.py, too"
    assert list(match.groups()) == sentence.measured()
    assert sentence.written_into(text) == text  # it is there once


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith(EVIDENCE)])
def test_no_figure_beside_a_link_to_a_page_is_typed_by_hand(file: str) -> None:
    sentences = [sentence for sentence in SENTENCES if sentence.file == file]
    assert list(unclaimed(file, (ROOT / file).read_text(), sentences)) == []


def test_a_template_is_filled_whatever_figures_and_line_breaks_there_are() -> None:
    sentence = Sentence("x.md", "ends {:+.1f} % above, {} a step (10 MB)", lambda: 2.04, lambda: "1.20 kB")
    assert sentence.written_into("It ends\n-0.3 % above, 46 MB\na step (10 MB).") == (
        "It ends\n+2.0 % above, 1.20 kB\na step (10 MB)."
    )
    with pytest.raises(ValueError, match="0 times"):
        sentence.written_into("It ends somewhere.")
    text = "See [the page](evidence/x.md): 3 % and\n1.5 times, of 10 MB.\n\nNo page: 4 %.\n"
    claimed = Sentence("x.md", "{:.0f} % and", lambda: 3)
    assert list(unclaimed("x.md", text, [claimed])) == ["x.md: 1.5 times", "x.md: 10 MB"]
