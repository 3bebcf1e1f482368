"""How the figures look: light and dark, wide and narrow, in colours that all readers can tell apart."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

# Inches. The page shows a wide figure 840 and a narrow one 330 pixels across: text is as large in both.
_WIDE, _NARROW = 8.4, 4.2
_LINE = 11.0  # points between labels that would lie on each other


@dataclass(frozen=True)
class Theme:
    """Colours of a figure, and whether it is for a narrow page.

    The hues are near those of Okabe & Ito (Color Universal Design, 2008), darkened or lightened until text
    in them is readable, at least 4.5:1 against the background. By convention `blue` is with batch norm
    and `vermilion` without.
    """

    name: str
    background: str
    foreground: str
    muted: str
    blue: str
    vermilion: str
    green: str
    purple: str
    ochre: str
    narrow: bool = False

    @property
    def colors(self) -> tuple[str, ...]:
        """The five hues, in the order in which to use them."""
        return (self.blue, self.vermilion, self.green, self.purple, self.ochre)

    def narrowed(self) -> Theme:
        """The same colours for a phone: panels stand below each other."""
        return replace(self, narrow=True)


LIGHT = Theme(
    name="light",
    background="#ffffff",
    foreground="#1a1a1a",
    muted="#666666",
    blue="#1257c4",
    vermilion="#cc4b00",
    green="#00805a",
    purple="#b0478a",
    ochre="#5c4400",
)
DARK = Theme(
    name="dark",
    background="#15181c",
    foreground="#e8e6e3",
    muted="#9aa0a6",
    blue="#4a9fff",
    vermilion="#e8742c",
    green="#33d6a0",
    purple="#d68ab8",
    ochre="#ffe066",
)


def panels(theme: Theme, *titles: str, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    """A figure with a panel per title, side by side, or below each other where the page is narrow.

    Args:
        theme: whose colours text, ticks and grid get.
        titles: one for each panel; short, since it stands over a panel of a phone's width.
        height: of a panel, in inches.
    """
    count = len(titles)
    rows, columns = (count, 1) if theme.narrow else (1, count)
    size = (_NARROW if theme.narrow else _WIDE, height * rows)
    figure = Figure(figsize=size, layout="constrained", facecolor=theme.background)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, title in zip(axes, titles, strict=True):
        panel.set_title(title, loc="left", fontsize=10, color=theme.foreground)
        panel.set_facecolor(theme.background)
        panel.grid(color=theme.muted, alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(theme.muted)
        panel.tick_params(which="both", colors=theme.muted, labelcolor=theme.foreground, labelsize=8.5)
        for axis in (panel.xaxis, panel.yaxis):
            axis.label.set_color(theme.foreground)
            axis.label.set_fontsize(9)
    return figure, axes


def label_ends(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Write (x, y, text, colour) to the right of each point, moved apart where they would lie on each other.

    Call it when the limits and scales of the axes are final; it leaves the room that the labels need.
    """
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    points_per_pixel = 72 / axes.figure.dpi
    placed = -float("inf")
    heights = [axes.transData.transform((x, y))[1] * points_per_pixel for x, y, _, _ in labels]
    for height, (x, y, text, color) in sorted(zip(heights, labels, strict=True)):
        placed = max(height, placed + _LINE)
        axes.annotate(
            text,
            (x, y),
            xytext=(5, placed - height),
            textcoords="offset points",
            color=color,
            fontsize=8.5,
            va="center",
            annotation_clip=False,
        )


def to_svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element to put into a page, equal for equal figures.

    Args:
        figure: whose text stays text, in whichever sans serif the reader has.
        name: of the figure, unique in the page: elements that refer to each other get their ids from it.
    """
    _write_numbers_plainly(figure)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    referred = set(re.findall(r"#([\w-]+)", svg))
    return re.sub(
        r' id="([^"]+)"', lambda found: found.group() if found.group(1) in referred else "", svg
    ).strip()


def to_png(figure: Figure) -> bytes:
    """A figure as PNG bytes."""
    _write_numbers_plainly(figure)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def _write_numbers_plainly(figure: Figure) -> None:
    """10k and 0.01 where a logarithmic axis would have powers of ten."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() in ("log", "symlog"):
                low, high = sorted(axis.get_view_interval())
                axis.set_major_formatter(FuncFormatter(_short))
                if high < 30 * low:  # hardly more than a power of ten: it needs the numbers between
                    axis.set_minor_formatter(FuncFormatter(_small_digit))
                else:
                    axis.set_minor_formatter(NullFormatter())


def _short(value: float, _: int) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:.10g}"


def _small_digit(value: float, _: int | None) -> str:
    return f"{value:,.10g}" if f"{value:e}"[0] in "25" else ""
