"""Layouts of a job over the ratio of traffic to compute, on an axis that doubles; the best at each ratio is ringed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ds_moe_ep.records.names import title_of
from ds_moe_ep.records.quantity import Quantity
from ds_moe_ep.report.page import Drawing
from ds_moe_ep.report.plots.style import (
    FAINT,
    INK,
    OTHER_COLORS,
    SYSTEM_COLORS,
    draw_panels,
    points,
    value_axis,
)

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
NEAR_ZERO = 0.5  # a throughput over the best one's below which the axis begins at 0
CLOSE = 1.25  # between two ratios whose numbers would touch each other


@dataclass(frozen=True)
class LayoutLine:
    """Throughput of one layout over that of the best one, by ratio of traffic to compute."""

    system: str
    points: Mapping[float, Quantity]


@dataclass(frozen=True)
class LayoutPanel:
    """The layouts of one job in one place."""

    title: str
    label: str
    lines: Sequence[LayoutLine]


def draw_layouts(layout_panels: Sequence[LayoutPanel]) -> Drawing:
    """The panels in two columns, over one legend."""
    systems = dict.fromkeys(line.system for panel in layout_panels for line in panel.lines)
    styles = styles_of(list(systems))

    def paint(axis: Axes, panel: LayoutPanel) -> None:
        _paint(axis, panel, styles)

    def handles() -> list[Line2D]:
        found = [
            Line2D([], [], color=color, marker=marker, markersize=5, linewidth=1.6, label=title_of(system))
            for system, (color, marker) in styles.items()
        ]
        ring = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "linestyle": "none"}
        return [*found, Line2D([], [], color=INK, label="best at the ratio", **ring)]  # type: ignore[arg-type]

    rows_of_legend = -(-(len(styles) + 1) // 4)
    return draw_panels(layout_panels, paint, handles, row_in=3.1, legend_in=0.15 + 0.25 * rows_of_legend, num_columns=4)


def styles_of(systems: Sequence[str]) -> dict[str, tuple[str, str]]:
    """(colour, marker) of each system, those of the benchmark first."""
    known = [system for system in SYSTEM_COLORS if system in systems]
    others = [system for system in systems if system not in SYSTEM_COLORS]
    colors = [SYSTEM_COLORS[system] for system in known]
    colors += [OTHER_COLORS[index % len(OTHER_COLORS)] for index in range(len(others))]
    return {
        system: (color, MARKERS[index % len(MARKERS)])
        for index, (system, color) in enumerate(zip([*known, *others], colors, strict=True))
    }


def _paint(axis: Axes, panel: LayoutPanel, styles: Mapping[str, tuple[str, str]]) -> None:
    ratios = sorted({ratio for line in panel.lines for ratio in line.points})
    for line in panel.lines:
        its = sorted(line.points)
        color, marker = styles[line.system]
        points(
            axis,
            its,
            [line.points[ratio] for ratio in its],
            color=color,
            marker=marker,
            markersize=4.5,
            capsize=2.5,
            elinewidth=1.0,
            linewidth=1.4,
        )
    lowest = min(quantity.low for line in panel.lines for quantity in line.points.values())
    axis.set_ylim(0 if lowest < NEAR_ZERO else lowest - 0.03, 1.04)
    axis.plot(
        ratios, [1.0] * len(ratios), marker="o", markersize=11, markerfacecolor="none", color=INK, linestyle="none"
    )
    _dress(axis, panel, ratios)


def _dress(axis: Axes, panel: LayoutPanel, ratios: Sequence[float]) -> None:
    axis.set_xscale("log", base=2)
    written: list[float] = []
    for ratio in ratios:
        if not written or ratio > CLOSE * written[-1]:
            written.append(ratio)
    axis.xaxis.set_major_locator(FixedLocator(written))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{round(ratio, 2):g}"))
    if len(ratios) == 1:  # a log axis has no width of its own
        axis.set_xlim(ratios[0] / 2, ratios[0] * 2)
    axis.set_title(panel.title)
    axis.set_xlabel("traffic over compute, where all ranks share the experts", color=FAINT)
    axis.set_ylabel(panel.label, color=FAINT)
    value_axis(axis)
