"""Plots of a page, as values: curves (`Lines`) and stacked bars (`Bars`), drawn by matplotlib as inline SVG.

An SVG of matplotlib needs neither a script nor the network. Its colours are replaced by CSS variables of the page, so
that one drawing serves light and dark, and what the pointer rests on is told by SVG titles. matplotlib is imported
when the first plot is drawn.
"""

from __future__ import annotations

import functools
import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLORS", "Bars", "Curve", "Lines", "Style"]

COLORS = 8
"""How many colours there are: the CSS variables ``--c0`` to ``--c7``; more curves begin again, dashed."""
INK, MUTED, GRID = "#a10001", "#a10002", "#a10003"
"""What matplotlib draws with; the page has ``--ink``, ``--muted`` and ``--grid`` in their place."""
WIDTH, HEIGHT = 6.4, 3.3  # inches
ROW_HEIGHT = 0.42  # inches, of a bar
BELOW, ASIDE, BESIDE = 0.52, 0.12, 0.78
"""Margins in inches: below the axes for ticks and a label, on the other sides, and to the left for numbers."""
LETTER, MOST_LETTERS = 0.075, 34  # the width of one in inches; of the name of a bar
MOST_POINTS = 1500  # of a curve; more are thinned out
MOST_TOLD = 48  # of a curve, that have a title

Told = tuple[float, float, int, str]
"""Where the pointer may rest, x and y in the axes' units, a colour, and what is told there."""
Style = Literal["line", "points", "dashed", "faint"]


@dataclass(frozen=True)
class Curve:
    """``y`` against ``x``; NaN is a gap. ``low``, ``high``: ends of an interval around each ``y``, if there is one.

    ``color``: a number, by which curves of one thing (a run's training and validation loss) have one colour.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    style: Style = "line"
    color: int | None = None


@dataclass(frozen=True, kw_only=True)
class Lines:
    """A plot of curves. ``x`` and ``y``: what the axes are, with the unit. ``log``: the axes that are logarithmic."""

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    log: Literal["", "x", "y", "xy"] = ""
    note: str = ""

    def html(self) -> str:
        """A figure of HTML with a legend, a drawing and the note."""
        curves = [_thinned(curve) for curve in self.curves]
        colors = [number if curve.color is None else curve.color for number, curve in enumerate(curves)]

        def draw(axes: Axes) -> None:
            for curve, color in zip(curves, colors, strict=True):
                _draw_curve(axes, curve, color)
            for axis in self.log:
                getattr(axes, f"set_{axis}scale")("log")
                _plain_ticks(axes, axis)
            axes.grid(color=GRID, linewidth=0.7)

        titles = [
            (x, y, color, f"{curve.name}\n{self.x} {_short(x)}\n{self.y} {_short(y)}{_interval(curve, at)}")
            for curve, color in zip(curves, colors, strict=True)
            for at, x, y in _told(curve)
        ]
        drawing = _drawn(HEIGHT, BESIDE, (self.x, self.y), draw, [title for title in titles if _finite(*title[:2])])
        named = [(curve.name, color, curve.style) for curve, color in zip(curves, colors, strict=True)]
        return _figure(self.title, drawing, named, self.note)


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Horizontal bars, one for each of ``rows``, each made of ``parts``: a name, and a value (0 or more) per row."""

    title: str
    x: str
    rows: Sequence[str]
    parts: Sequence[tuple[str, Sequence[float]]]
    note: str = ""

    def html(self) -> str:
        """A figure of HTML with a legend, a drawing and the note."""
        titles: list[Told] = []
        starts = [0.0] * len(self.rows)
        for color, (name, values) in enumerate(self.parts):
            for row, value in enumerate(values):
                if value > 0:
                    where = starts[row] + value / 2
                    titles.append((where, row, color, f"{self.rows[row]}\n{name}: {_short(value)}\n{self.x}"))
                    starts[row] += value

        def draw(axes: Axes) -> None:
            ends = [0.0] * len(self.rows)
            for color, (_, values) in enumerate(self.parts):
                axes.barh(range(len(self.rows)), values, left=ends, height=0.66, color=_sentinel(color))
                ends = [end + value for end, value in zip(ends, values, strict=True)]
            axes.set_yticks(range(len(self.rows)), [_cut(row, MOST_LETTERS) for row in self.rows])
            axes.set_ylim(len(self.rows) - 0.4, -0.6)
            axes.set_xlim(0, max(ends, default=0.0) * 1.03 or 1.0)
            axes.grid(axis="x", color=GRID, linewidth=0.7)

        height = BELOW + ASIDE + ROW_HEIGHT * max(1, len(self.rows))
        left = 0.25 + LETTER * max((len(_cut(row, MOST_LETTERS)) for row in self.rows), default=1)
        named: list[tuple[str, int, Style]] = [(name, color, "line") for color, (name, _) in enumerate(self.parts)]
        return _figure(self.title, _drawn(height, left, (self.x, ""), draw, titles), named, self.note)


# ---- drawing -------------------------------------------------------------------------------------------------------


def _draw_curve(axes: Axes, curve: Curve, color: int) -> None:
    sentinel = _sentinel(color)
    dashed = curve.style == "dashed" or color >= COLORS
    if curve.low and curve.high:
        axes.fill_between(curve.x, curve.low, curve.high, color=sentinel, alpha=0.18, linewidth=0)
    if curve.style == "points":
        axes.plot(curve.x, curve.y, color=sentinel, linewidth=0.8, linestyle=":", marker="o", markersize=4.5)
        return
    shown = sum(map(_finite, curve.x, curve.y))
    axes.plot(
        curve.x, curve.y, color=sentinel, linestyle="--" if dashed else "-",
        linewidth=1.0 if curve.style == "faint" else 1.7, alpha=0.45 if curve.style == "faint" else 1.0,
        marker="o" if shown <= 12 else "", markersize=3.5,
    )  # fmt: skip


def _plain_ticks(axes: Axes, axis: str) -> None:
    """Numbers at the powers of ten of a logarithmic axis, and between them where it has fewer than two."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    number = FuncFormatter(lambda value, _: _short(value))
    line = getattr(axes, f"{axis}axis")
    low, high = sorted(getattr(axes, f"get_{axis}lim")())
    line.set_major_formatter(number)
    line.set_minor_formatter(number if low > 0 and high < 12 * low else NullFormatter())


def _drawn(
    height: float, left: float, labels: tuple[str, str], draw: Callable[[Axes], None], titles: Sequence[Told]
) -> str:
    """One axes as SVG, in a figure of this height and left margin in inches."""
    from matplotlib import rc_context

    with rc_context(_style()):
        figure, axes = _empty(height, left)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        draw(axes)
        if not axes.has_data():
            axes.text(0.5, 0.5, "nothing was measured", transform=axes.transAxes, ha="center", color=MUTED)
        return _svg(figure, axes, titles)


@functools.cache
def _style() -> dict[str, object]:
    """Text stays text, without matplotlib's mathematics; the page's own font is as wide as none of ours: see `CSS`."""
    return {
        "svg.fonttype": "none", "svg.hashsalt": "dtrain", "text.parse_math": False, "font.size": 9.5,
        "axes.edgecolor": MUTED, "axes.labelcolor": INK, "xtick.color": MUTED, "ytick.color": MUTED, "text.color": INK,
        "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.spines.top": False, "axes.spines.right": False,
        "axes.axisbelow": True, "axes.formatter.useoffset": False, "path.simplify_threshold": 0.3,
    }  # fmt: skip


def _empty(height: float, left: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    # Margins by hand: matplotlib's own layouts draw everything twice.
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((left / WIDTH, BELOW / height, 1 - (left + ASIDE) / WIDTH, 1 - (BELOW + ASIDE) / height))
    axes.patch.set_visible(False)
    figure.patch.set_visible(False)
    return figure, axes


def _svg(figure: Figure, axes: Axes, titles: Sequence[Told]) -> str:
    """The drawing, in the page's colours, with a title at each of the points ``(x, y, color, text)``."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = io.StringIO()
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg [^>]*?)\bwidth="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg [^>]*?)\bheight="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(?<=<g) id="[^"]*"', "", text)  # several drawings in a page have the same
    for sentinel, name in {INK: "ink", MUTED: "muted", GRID: "grid"}.items():
        text = text.replace(sentinel, f"var(--{name})")
    text = re.sub(r"#a0000(\d)", r"var(--c\1)", text)
    height = float(figure.get_figheight()) * 72
    scale = 72 / figure.dpi
    circles = []
    for x, y, color, title in titles:
        across, up = axes.transData.transform((x, y))
        circles.append(
            f'<circle class="told" cx="{across * scale:.1f}" cy="{height - up * scale:.1f}" r="6" '
            f'style="stroke:var(--c{color % COLORS})"><title>{escape(title)}</title></circle>'
        )
    return text.replace("</svg>", f"{''.join(circles)}</svg>").strip()


def _figure(title: str, drawing: str, named: Sequence[tuple[str, int, Style]], note: str) -> str:
    legend = ""
    if len(named) > 1 or any(style == "points" for _, _, style in named):
        items = (
            f'<li><i class="{style}{" dashed" if color >= COLORS else ""}" style="--c:var(--c{color % COLORS})"></i>'
            f"{escape(name)}</li>"
            for name, color, style in named
        )
        legend = f'<ul class="legend">{"".join(items)}</ul>'
    below = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return f'<figure class="plot"><h3>{escape(title)}</h3>{legend}{drawing}{below}</figure>'


# ---- figures -------------------------------------------------------------------------------------------------------


def _sentinel(color: int) -> str:
    return f"#a0000{color % COLORS}"


def _finite(*numbers: float) -> bool:
    return all(map(math.isfinite, numbers))


def _thinned(curve: Curve) -> Curve:
    """Every k-th point, so that at most `MOST_POINTS` are drawn, and the last one."""
    every = math.ceil(len(curve.x) / MOST_POINTS)
    if every <= 1:
        return curve

    def some(values: Sequence[float]) -> list[float]:
        return [*values[:-1:every], values[-1]] if values else []

    return Curve(
        curve.name, some(curve.x), some(curve.y), some(curve.low), some(curve.high), curve.style, curve.color
    )  # fmt: skip


def _told(curve: Curve) -> list[tuple[int, float, float]]:
    """The points that have a title: their places, x and y."""
    every = max(1, math.ceil(len(curve.x) / MOST_TOLD))
    places = {*range(0, len(curve.x), every), *([len(curve.x) - 1] if curve.x else [])}
    return [(at, curve.x[at], curve.y[at]) for at in sorted(places)]


def _interval(curve: Curve, at: int) -> str:
    return f" ({_short(curve.low[at])} to {_short(curve.high[at])})" if curve.low and curve.high else ""


def _short(number: float) -> str:
    """At most four digits that count, thousands apart.

    >>> _short(1234567.0), _short(0.0123456), _short(12.0)
    ('1,234,567', '0.01235', '12')
    """
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else "…" + "".join(itertools.islice(text, len(text) - most + 1, None))
