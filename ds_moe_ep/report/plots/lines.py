"""Curves over steps (loss) and over EP (scaling)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ds_moe_ep.records.quantity import Quantity
from ds_moe_ep.report.page import Drawing
from ds_moe_ep.report.plots.style import (
    FAINT,
    columns_of,
    draw,
    draw_panels,
    legend,
    points,
    rows_for,
    show_at_least,
    system_color,
    value_axis,
)

Dash = tuple[float, Sequence[float]]  # offset, on-off lengths

LEAST_SHARE = 0.05  # of the loss: what its axis shows at least
MEASURED, FITTED = "#0072b2", "#d55e00"
DASHES: Mapping[str, Dash] = {"ep16_serial": (0, (5, 2)), "ep16": (0, (1.2, 1.4)), "autoep_ep16": (0, (4, 2, 1, 2))}


@dataclass(frozen=True)
class Curve:
    """A system's value at each step."""

    system: str
    label: str
    values: Mapping[int, float]


@dataclass(frozen=True)
class LawPanel:
    """Measured points over EP, and the law through them: `law(EP)`, where one was fitted."""

    title: str
    total: str  # what was kept while EP grew
    unit: str
    points: Mapping[int, Quantity]
    law: Callable[[float], float] | None
    fit: str  # how well the law fits


def draw_losses(environments: Sequence[tuple[str, Sequence[Curve]]], baseline: str) -> Drawing:
    """Loss over steps, a panel per environment; under it each system's distance from the baseline, if that is there."""
    with_difference = any(len(curves) > 1 and _of(curves, baseline) for _, curves in environments)

    def paint(figure: Figure) -> None:
        num_columns = min(len(environments), columns_of(figure))
        num_bands = rows_for(len(environments), num_columns)
        bands = figure.subfigures(num_bands, num_columns, squeeze=False).flat
        for band, (title, curves) in zip(bands, environments, strict=False):
            rows = 2 if with_difference else 1
            ratios = [2.4, 1.0][:rows]
            axes = band.subplots(rows, 1, squeeze=False, sharex=True, height_ratios=ratios)
            _paint_losses(axes[0][0], title, curves)
            if with_difference:
                _paint_differences(axes[1][0], curves, baseline)
            axes[-1][0].set_xlabel("step", color=FAINT)
        labels = {curve.system: curve.label for _, curves in environments for curve in curves}
        legend(figure, [_line(system, label) for system, label in labels.items()], num_columns=5)

    def height_in(columns: int) -> float:
        return (4.4 if with_difference else 3.2) * rows_for(len(environments), columns) + 0.4 * (3 - columns)

    return draw(height_in, paint)


def draw_scaling(law_panels: Sequence[LawPanel]) -> Drawing:
    """Points with quartiles over EP, and the fitted laws."""

    def handles() -> list[Line2D]:
        is_spread = any(quantity.is_spread for panel in law_panels for quantity in panel.points.values())
        measured = "measured, with quartiles" if is_spread else "measured"
        found = [Line2D([], [], color=MEASURED, marker="o", linestyle="none", label=measured)]
        if any(panel.law for panel in law_panels):
            found.append(Line2D([], [], color=FITTED, linewidth=1.6, label="the law, fitted"))
        return found

    return draw_panels(law_panels, _paint_law, handles, row_in=2.6)


def _line(system: str, label: str) -> Line2D:
    return Line2D([], [], color=system_color(system), linewidth=2.0, label=label, linestyle=DASHES.get(system, "-"))


def _of(curves: Sequence[Curve], system: str) -> Curve | None:
    return next((curve for curve in curves if curve.system == system), None)


def _paint_losses(axis: Axes, title: str, curves: Sequence[Curve]) -> None:
    """Curves that fall alike lie on each other: the first is widest, so that each can be seen."""
    for index, curve in enumerate(curves):
        width = max(1.6, 4.4 - 1.2 * index)
        _paint_curve(axis, curve.system, curve.values, width)
    axis.set_title(title)
    axis.set_ylabel("loss", color=FAINT)
    show_at_least(axis, LEAST_SHARE)
    _dress_steps(axis)


def _paint_differences(axis: Axes, curves: Sequence[Curve], baseline: str) -> None:
    base = _of(curves, baseline)
    for curve in curves if base else ():
        assert base is not None
        both = {step: value - base.values[step] for step, value in curve.values.items() if step in base.values}
        _paint_curve(axis, curve.system, both, 1.6)
    label = base.label if base else "the baseline"
    axis.set_ylabel(f"minus\n{label}'s", color=FAINT)
    _dress_steps(axis)


def _paint_curve(axis: Axes, system: str, values: Mapping[int, float], width: float) -> None:
    steps = sorted(values)
    marker = "o" if len(steps) == 1 else ""
    axis.plot(
        steps,
        [values[step] for step in steps],
        color=system_color(system),
        linewidth=width,
        linestyle=DASHES.get(system, "-"),
        marker=marker,
    )


def _dress_steps(axis: Axes) -> None:
    value_axis(axis)
    first, last = axis.get_xlim()
    if last - first < 1:  # a single step
        axis.set_xlim(first - 1, last + 1)
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def _paint_law(axis: Axes, panel: LawPanel) -> None:
    sizes = sorted(panel.points)
    if panel.law is not None:
        first, last = sizes[0], sizes[-1]
        curve = [first + (last - first) * index / 80 for index in range(81)]
        axis.plot(curve, [panel.law(ep) for ep in curve], color=FITTED, linewidth=1.6, zorder=2)
    measured = [panel.points[ep] for ep in sizes]
    points(axis, sizes, measured, color=MEASURED, fmt="o", markersize=5, capsize=3, zorder=3)
    axis.set_xticks(sizes, [str(ep) for ep in sizes])
    axis.margins(y=0.12)
    axis.set_ylim(bottom=0)
    axis.set_title(panel.title, pad=19)
    axis.set_title(panel.fit, loc="right", pad=19, fontsize=9, fontweight="normal")
    axis.annotate(panel.total, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", color=FAINT)
    axis.set_xlabel("EP (ranks that share the experts)", color=FAINT)
    axis.set_ylabel(panel.unit, color=FAINT)
    value_axis(axis)
