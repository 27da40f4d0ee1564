"""Simulated curves over the ranks that share experts, or over copies of them, on axes that double."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator, StrMethodFormatter

from ds_moe_ep.records.quantity import Quantity
from ds_moe_ep.report.page import Drawing
from ds_moe_ep.report.plots.style import FAINT, draw_panels, points

COLORS = ("#0072b2", "#e69f00")  # of the totals
MARKERS = ("o", "s")
DASHES = ("-", (0, (4, 2)))
SHIFT = 2**0.09  # between two totals whose points would cover each other
WIDE = 12  # sizes beyond which every other one is written


def thousands() -> EngFormatter:
    """The numbers of an axis that doubles: 0.01, 1, 100, 10 k, 1 M."""
    formatter = EngFormatter()
    formatter.ENG_PREFIXES = {0: "", 3: "k", 6: "M", 9: "G"}
    return formatter


@dataclass(frozen=True)
class SweepLine:
    """Points over sizes with their bars, and the law fitted to them where there is one."""

    label: str
    points: Mapping[int, Quantity]
    law: Callable[[float], float] | None = None


@dataclass(frozen=True)
class SweepPanel:
    """One quantity over sizes; shares are drawn on a straight axis, what grows with the size on one that doubles."""

    title: str
    fit: str  # how well the law fits
    x_label: str
    y_label: str
    lines: Sequence[SweepLine]
    is_share: bool = False
    curve: str = "the laws, fitted"  # what the curves are


def draw_sweep(sweep_panels: Sequence[SweepPanel]) -> Drawing:
    """The panels in two columns."""
    return draw_panels(sweep_panels, _paint, lambda: _handles(sweep_panels), row_in=2.9)


def _handles(sweep_panels: Sequence[SweepPanel]) -> list[Line2D]:
    labels = dict.fromkeys(line.label for panel in sweep_panels for line in panel.lines)
    handles = [
        Line2D([], [], color=color, marker=marker, markersize=5, linestyle="none", label=label)
        for label, color, marker in zip(labels, COLORS, MARKERS, strict=False)
    ]
    curves = dict.fromkeys(panel.curve for panel in sweep_panels if any(line.law for line in panel.lines))
    return handles + [Line2D([], [], color=FAINT, linewidth=1.4, label=curve) for curve in curves]


def _paint(axis: Axes, panel: SweepPanel) -> None:
    sizes = sorted({size for line in panel.lines for size in line.points})
    axis.set_xscale("log", base=2)
    if not panel.is_share:
        axis.set_yscale("log")
    for place, line in enumerate(panel.lines):
        _paint_points(axis, line, place)
        if line.law is not None:
            _paint_law(axis, line.law, place, sizes, panel.is_share)
    if panel.is_share:
        axis.set_ylim(0, 108)
    _dress(axis, panel, sizes)


def _paint_points(axis: Axes, line: SweepLine, place: int) -> None:
    sizes = sorted(line.points)
    points(
        axis,
        [size * SHIFT**place for size in sizes],
        [line.points[size] for size in sizes],
        color=COLORS[place % len(COLORS)],
        fmt=MARKERS[place % len(MARKERS)],
        markersize=4.5,
        capsize=2.5,
        elinewidth=1.2,
        zorder=3,
    )


def _paint_law(axis: Axes, law: Callable[[float], float], place: int, sizes: Sequence[int], is_share: bool) -> None:
    """The law as a thin line; where it is 0 an axis that doubles has no place for it."""
    first, last = sizes[0], sizes[-1]
    curve = [first * (last / first) ** (index / 80) for index in range(81)]
    values = [(size, law(size)) for size in curve]
    shown = [(size, value) for size, value in values if value > 0 or is_share]
    color, dash = COLORS[place % len(COLORS)], DASHES[place % len(DASHES)]
    axis.plot([x for x, _ in shown], [y for _, y in shown], color=color, linestyle=dash, linewidth=1.3, zorder=2)


def _dress(axis: Axes, panel: SweepPanel, sizes: Sequence[int]) -> None:
    written = sizes if len(sizes) <= WIDE else sizes[::2]
    axis.xaxis.set_major_locator(FixedLocator(written))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(thousands())
    axis.set_title(panel.title)
    axis.set_title(panel.fit, loc="right", fontsize=9, fontweight="normal")
    axis.set_xlabel(panel.x_label, color=FAINT)
    axis.set_ylabel(panel.y_label, color=FAINT)
    axis.grid(axis="y")
