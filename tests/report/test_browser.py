"""A page in headless Chromium: no error in the console, nothing loaded, every plot drawn, and light and dark differ.

A script that the test adds to a copy of the page measures the drawings and writes what it found into the document,
which ``--dump-dom`` prints: so no driver of browsers is needed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dtrain.report.run_figures import read_run
from dtrain.report.run_page import page_of_run, page_of_runs
from tests.report.run_folders import write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.system,
    pytest.mark.timeout(180),
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: make setup-system"),
]
MEASURED = """<script>
const figures = [...document.querySelectorAll('figure.plot')].map(figure => {
  const box = figure.querySelector('svg').getBoundingClientRect();
  const shapes = [...figure.querySelectorAll('svg path, svg use')];
  const colored = shapes.filter(path => /--c\\d/.test(path.getAttribute('style')));
  const drawn = colored.filter(path => { const b = path.getBoundingClientRect(); return b.width + b.height > 1; });
  const inside = drawn.every(path => { const b = path.getBoundingClientRect();
    return b.left >= box.left - 2 && b.right <= box.right + 2; });
  return {title: figure.querySelector('h3').textContent, width: box.width, height: box.height, drawn: drawn.length,
    inside: inside, told: figure.querySelectorAll('title').length};
});
const pre = document.createElement('pre');
pre.id = 'measured';
pre.textContent = JSON.stringify({figures, paper: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.querySelector('figure.plot svg text')).fill,
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  loaded: performance.getEntriesByType('resource').map(entry => entry.name).filter(name => !name.startsWith('data:'))});
document.body.appendChild(pre);
</script>"""


def opened(page: Path, *, dark: bool, width: int = 1240) -> tuple[dict[str, object], list[str]]:
    """What the page looks like in a window of this width, and what its console said."""
    assert CHROMIUM is not None
    copy = page.with_name("measured.html")
    copy.write_text(page.read_text().replace("</body>", f"{MEASURED}</body>"))
    ended = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            f"--user-data-dir={page.parent / 'browser'}", f"--window-size={width},1800",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--enable-logging=stderr", "--dump-dom",
            copy.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(page.parent)},
    )  # fmt: skip
    found = re.search(r'<pre id="measured">(.*?)</pre>', ended.stdout, re.DOTALL)
    assert found is not None, ended.stderr[-2000:]
    measured: dict[str, object] = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    return measured, [line for line in ended.stderr.splitlines() if "CONSOLE" in line]


def test_a_run_and_a_comparison_open_without_an_error_and_every_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    names = {"dense": ["sync=dense"], "diloco": ["sync=diloco", "train.seed=2"]}
    runs = [read_run(write_run(tmp_path / name, words), name) for name, words in names.items()]
    page_of_run(runs[0]).write(tmp_path / "one.html")
    page_of_runs(runs).write(tmp_path / "several.html")
    looks = {}
    for name, dark, width in (("one", False, 1240), ("several", True, 1240), ("several", False, 420)):
        measured, console = opened(tmp_path / f"{name}.html", dark=dark, width=width)
        assert console == [] and measured["loaded"] == [] and measured["wide"] == 0
        figures = measured["figures"]
        assert isinstance(figures, list) and len(figures) == 7
        for figure in figures:
            assert figure["drawn"] and figure["inside"] and figure["told"], figure
            assert figure["width"] > 250 and figure["height"] > 40, figure
        looks[dark] = (measured["paper"], measured["ink"])
    assert looks == {False: ("rgb(255, 255, 255)", "rgb(28, 36, 48)"), True: ("rgb(18, 22, 29)", "rgb(230, 233, 239)")}
