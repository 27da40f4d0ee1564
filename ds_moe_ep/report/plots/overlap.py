"""Schedules of one layer over the links between its nodes: the time of a step, and the share of traffic it hides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ds_moe_ep.records.quantity import Quantity
from ds_moe_ep.report.page import Drawing
from ds_moe_ep.report.plots.style import FAINT, GROUND, INK, draw, legend, panels, plain_numbers

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

    def paint(figure: Figure) -> None:
        for axis, panel in zip(panels(figure, len(link_panels), 2), link_panels, strict=True):
            _paint(axis, panel)
        shown = [side for side in titles if any(side in panel.sides for panel in link_panels)]
        legend(figure, [_line(side, titles[side]) for side in shown], num_columns=4)

    return draw(3.1 * -(-len(link_panels) // 2) + 0.6, paint)


def _line(side: str, label: str) -> Line2D:
    fill, dash = (GROUND, "--") if side in DASHED else (COLORS[side], "-")
    line = Line2D([], [], color=COLORS[side], linewidth=1.6, label=label)
    line.set(linestyle=dash, marker="o", markersize=5, markerfacecolor=fill)
    return line


def _paint(axis: Axes, panel: LinkPanel) -> None:
    for side, values in panel.sides.items():
        quantities = list(values.values())
        errors = [[q.value - q.low for q in quantities], [q.high - q.value for q in quantities]]
        axis.errorbar(
            [panel.places[index] for index in values],
            [q.value for q in quantities],
            yerr=errors,
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
    axis.grid(axis="y")
    axis.yaxis.set_major_locator(MaxNLocator(5))
    plain_numbers(axis.yaxis)
