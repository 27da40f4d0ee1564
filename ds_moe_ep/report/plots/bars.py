"""Systems as horizontal bars, a panel for each place: values with their quartiles, or sums of parts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ds_moe_ep.records.quantity import Quantity, number
from ds_moe_ep.report.page import Drawing
from ds_moe_ep.report.plots.style import (
    FAINT,
    GROUND,
    INK,
    PALE,
    SYSTEM_COLORS,
    columns_of,
    draw,
    legend,
    panels,
    plain_numbers,
    rows_for,
    system_color,
)

Shown = TypeVar("Shown")

BAR_IN, PANEL_IN, LEGEND_IN = 0.29, 0.78, 0.45
ROOM_FOR_TEXT = 1.4  # the axis over its longest bar
DIGITS_ACROSS = 48  # digits side by side across a panel
DARK = ("#0072b2", "#009e73", "#d55e00")


@dataclass(frozen=True)
class Bar:
    """One system's value, and what stands behind it."""

    system: str
    label: str
    quantity: Quantity
    text: str


@dataclass(frozen=True)
class Stack:
    """One system's parts, which are laid end to end, and what stands behind them."""

    system: str
    label: str
    parts: Mapping[str, float]
    text: str


@dataclass(frozen=True)
class BarPanel:
    """The bars of one place."""

    title: str
    unit: str
    bars: Sequence[Bar]


@dataclass(frozen=True)
class StackPanel:
    """The stacks of one place."""

    title: str
    unit: str
    stacks: Sequence[Stack]


def draw_bars(bar_panels: Sequence[BarPanel]) -> Drawing:
    """Bars with whiskers from quartile to quartile."""
    labels = _labels(bar for panel in bar_panels for bar in panel.bars)

    def paint(figure: Figure) -> None:
        for index, axis in enumerate(panels(figure, len(bar_panels))):
            _paint_bars(axis, bar_panels[index], labels)
            _name(axis, labels, index)

    return draw(lambda columns: _height(len(labels), rows_for(len(bar_panels), columns)), paint)


def draw_stacks(stack_panels: Sequence[StackPanel], titles: Mapping[str, str], colors: Mapping[str, str]) -> Drawing:
    """Stacked bars; `titles` and `colors` are the parts' in the order of the stack."""
    labels = _labels(stack for panel in stack_panels for stack in panel.stacks)
    used = [part for part in titles if any(part in stack.parts for panel in stack_panels for stack in panel.stacks)]

    def paint(figure: Figure) -> None:
        for index, axis in enumerate(panels(figure, len(stack_panels))):
            _paint_stacks(axis, stack_panels[index], labels, {part: colors[part] for part in used})
            _name(axis, labels, index)
        legend(figure, [Patch(facecolor=colors[part], label=titles[part]) for part in used], num_columns=3)

    def height_in(columns: int) -> float:
        rows_of_legend = rows_for(len(used), columns + 1)
        return _height(len(labels), rows_for(len(stack_panels), columns)) + LEGEND_IN * (1 + rows_of_legend) / 2

    return draw(height_in, paint)


def _height(num_bars: int, num_rows: int) -> float:
    return num_rows * (PANEL_IN + BAR_IN * num_bars) + 0.1


def _labels(bars: Iterable[Bar | Stack]) -> dict[str, str]:
    """The labels of the systems of all panels in one order, so that a system has one height in a row of panels."""
    found = {bar.system: bar.label for bar in bars}
    return {system: found[system] for system in sorted(found, key=_place)}


def _place(system: str) -> int:
    return list(SYSTEM_COLORS).index(system) if system in SYSTEM_COLORS else len(SYSTEM_COLORS)


def _placed(
    axis: Axes, labels: Mapping[str, str], found: Mapping[str, Shown], highest: float
) -> Iterator[tuple[int, str, Shown]]:
    """(place, system, what a panel shows of it); where it shows nothing, that is noted in its place."""
    for place, system in enumerate(labels):
        shown = found.get(system)
        if shown is None:
            axis.text(0.02 * highest, place, "not measured", va="center_baseline", fontsize=9, color=FAINT)
        else:
            yield place, system, shown


def _paint_bars(axis: Axes, panel: BarPanel, labels: Mapping[str, str]) -> None:
    highest = max(bar.quantity.high for bar in panel.bars)
    by_system = {bar.system: bar for bar in panel.bars}
    for place, system, bar in _placed(axis, labels, by_system, highest):
        quantity = bar.quantity
        axis.barh(place, quantity.value, height=0.7, color=system_color(system))
        if quantity.is_spread:
            axis.plot([quantity.low, quantity.high], [place, place], color=INK, linewidth=1.4, marker="|")
        axis.text(quantity.high + 0.02 * highest, place, bar.text, va="center_baseline", fontsize=9)
    _dress(axis, panel.title, panel.unit, ROOM_FOR_TEXT * highest)


def _paint_stacks(axis: Axes, panel: StackPanel, labels: Mapping[str, str], colors: Mapping[str, str]) -> None:
    """Each part's number stands in it where there is room."""
    highest = max(sum(stack.parts.values()) for stack in panel.stacks)
    room = ROOM_FOR_TEXT if any(stack.text for stack in panel.stacks) else 1.04
    by_system = {stack.system: stack for stack in panel.stacks}
    for place, _, stack in _placed(axis, labels, by_system, highest):
        end = 0.0
        for part, color in colors.items():
            width = stack.parts.get(part, 0.0)
            axis.barh(place, width, left=end, height=0.72, color=color, edgecolor=GROUND, linewidth=0.6)
            if width * DIGITS_ACROSS > (len(number(width)) + 1) * room * highest:
                ink = PALE if color in DARK else "black"
                middle = end + width / 2
                axis.text(middle, place, number(width), va="center_baseline", ha="center", fontsize=9, color=ink)
            end += width
        axis.text(end + 0.02 * highest, place, stack.text, va="center_baseline", fontsize=9)
    _dress(axis, panel.title, panel.unit, room * highest)


def _name(axis: Axes, labels: Mapping[str, str], index: int) -> None:
    """The systems' names, the first on top; the first panel of a row names them for its neighbours."""
    is_first = index % columns_of(axis.figure) == 0
    names = list(labels.values()) if is_first else [""] * len(labels)
    axis.set_yticks(range(len(labels)), names)
    axis.set_ylim(len(labels) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)


def _dress(axis: Axes, title: str, unit: str, right: float) -> None:
    axis.set_title(title)
    axis.set_xlabel(unit, color=FAINT)
    axis.set_xlim(0, right or 1.0)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    plain_numbers(axis.xaxis)
    axis.grid(axis="x")
