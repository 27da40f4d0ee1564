"""Schedules of one layer over the links between its nodes: the time of a step, and the share of traffic it hides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ds_moe_ep.records.quantity import Quantity
from ds_moe_ep.report.page import Drawing
from ds_moe_ep.report.plots.style import FAINT, GROUND, INK, draw_panels, points, value_axis

COLORS: Mapping[str, str] = {
    "serial": "#8c8c8c",
    "auto": INK,
    "peers": "#0072b2",
    "peers, 2 cuts": "#56b4e9",
    "2 chunks": "#e69f00",
    "4 chunks": "#d55e00",
    "8 chunks": "#cc79a7",
    "hooked native": "#009e73",
    "native": "#a6761d",
    "autoep": "#7570b3",
    "wire": "#8c8c8c",
}
DASHED = ("auto", "wire")
SIZES = {"serial": 6.0, "auto": 7.0}  # what lies over another stays visible


@dataclass(frozen=True)
class LinkPanel:
    """One measure of the sides over the links: `places` are their positions on the axis, `links` their names."""

    title: str
    axis: str
    unit: str
    places: Sequence[float]
    links: Sequence[str]
    sides: Mapping[str, Mapping[int, Quantity]]  # by the index of a link


def draw_overlap(link_panels: Sequence[LinkPanel], titles: Mapping[str, str]) -> Drawing:
    """Panels in pairs, with whiskers from quartile to quartile; `titles` name the sides in the order of the legend."""
    shown = [side for side in titles if any(side in panel.sides for panel in link_panels)]

    def handles() -> list[Line2D]:
        return [_line(side, titles[side]) for side in shown]

    return draw_panels(link_panels, _paint, handles, row_in=3.1, legend_in=0.6, num_columns=4)


def _line(side: str, label: str) -> Line2D:
    fill, dash = (GROUND, "--") if side in DASHED else (COLORS[side], "-")
    line = Line2D([], [], color=COLORS[side], linewidth=1.6, label=label)
    line.set(linestyle=dash, marker="o", markersize=5, markerfacecolor=fill)
    return line


def _paint(axis: Axes, panel: LinkPanel) -> None:
    for side, values in panel.sides.items():
        points(
            axis,
            [panel.places[index] for index in values],
            values.values(),
            color=COLORS[side],
            linewidth=1.6,
            linestyle="--" if side in DASHED else "-",
            marker="o",
            markersize=SIZES.get(side, 4.0),
            markerfacecolor=GROUND if side in DASHED else COLORS[side],
            capsize=2,
            zorder=2 if side in DASHED else 3,
        )
    axis.set_title(panel.title)
    axis.set_xticks(panel.places, panel.links)
    axis.set_xlabel(panel.axis, color=FAINT)
    axis.set_ylabel(panel.unit, color=FAINT)
    axis.margins(x=0.06, y=0.08)
    axis.set_ylim(bottom=0)
    value_axis(axis)
