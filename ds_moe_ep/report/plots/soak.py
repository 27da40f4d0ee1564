"""A soak over its steps: memory of each run, how full the fullest expert is, and which one that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ds_moe_ep.records.quantity import Quantity
from ds_moe_ep.report.page import Drawing
from ds_moe_ep.report.plots.style import FAINT, draw, legend, show_at_least, value_axis

RUN_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#8c8c8c")
CALM, BURST = "#0072b2", "#d55e00"
ALL_ROWS = 0.99  # of the rows: a step that sends them to one expert is a burst
LEAST_SHARE = 0.1  # of the memory: what its axis shows at least


@dataclass(frozen=True)
class RunMemory:
    """MB of one run's ranks at each sampled step: the middle rank, between the least and the most."""

    label: str
    at_step: Mapping[int, Quantity]


@dataclass(frozen=True)
class StepLoad:
    """The fullest expert of one step: its rows over the mean of the experts, and its index."""

    step: int
    over_mean: float
    fullest: int
    num_experts: int

    @property
    def is_burst(self) -> bool:
        """True where all rows of the step went to it, but for a stray one."""
        return self.over_mean >= ALL_ROWS * self.num_experts


def draw_soak(runs: Sequence[RunMemory], loads: Sequence[StepLoad]) -> Drawing:
    """Memory over the steps, and under it the load, where there is one."""

    def paint(figure: Figure) -> None:
        ratios = [1.3, 1.0, 1.0] if loads else [1.0]
        axes = figure.subplots(len(ratios), 1, squeeze=False, sharex=True, height_ratios=ratios)[:, 0]
        _paint_memory(axes[0], runs)
        if loads:
            _paint_load(axes[1], loads)
            _paint_fullest(axes[2], loads)
        axes[-1].set_xlabel("step", color=FAINT)
        axes[-1].set_xlim(left=0)
        axes[-1].margins(x=0.01)
        axes[-1].xaxis.set_major_locator(MaxNLocator(10, integer=True))
        handles = [
            Line2D([], [], color=_color(index), linewidth=1.6, label=run.label) for index, run in enumerate(runs)
        ]
        if loads:
            handles += [_dots(CALM, "a step"), _dots(BURST, "all rows at one expert")]
        legend(figure, handles)

    return draw(lambda columns: 5.6 if loads else 2.6, paint)


def _color(index: int) -> str:
    return RUN_COLORS[index % len(RUN_COLORS)]


def _dots(color: str, label: str) -> Line2D:
    return Line2D([], [], color=color, marker="o", markersize=4, linestyle="none", label=label)


def _paint_memory(axis: Axes, runs: Sequence[RunMemory]) -> None:
    for index, run in enumerate(runs):
        steps = sorted(run.at_step)
        values = [run.at_step[step] for step in steps]
        axis.fill_between(
            steps, [v.low for v in values], [v.high for v in values], color=_color(index), alpha=0.15, linewidth=0
        )
        width = max(1.2, 2.6 - 0.7 * index)  # equal lines lie on each other: the first is widest
        axis.plot(steps, [v.value for v in values], color=_color(index), linewidth=width)
    show_at_least(axis, LEAST_SHARE)
    axis.set_title("memory of a rank: the middle one, in the band of all")
    axis.set_ylabel("resident, MB", color=FAINT)
    value_axis(axis)


def _paint_load(axis: Axes, loads: Sequence[StepLoad]) -> None:
    axis.axhline(1.0, color=FAINT, linewidth=0.8, linestyle=":")
    for color, of_color in _by_color(loads):
        axis.plot([load.step for load in of_color], [load.over_mean for load in of_color], **_marks(color))
    axis.set_title("rows of the fullest expert, over the mean of all")
    axis.set_ylabel("max / mean", color=FAINT)
    axis.set_ylim(bottom=0)
    axis.grid(axis="y")
    axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def _paint_fullest(axis: Axes, loads: Sequence[StepLoad]) -> None:
    for color, of_color in _by_color(loads):
        axis.plot([load.step for load in of_color], [load.fullest for load in of_color], **_marks(color))
    axis.set_title("which expert is the fullest")
    axis.set_ylabel("expert", color=FAINT)
    axis.set_ylim(-0.7, max(load.num_experts for load in loads) - 0.3)
    axis.yaxis.set_major_locator(MaxNLocator(5, integer=True))


def _by_color(loads: Sequence[StepLoad]) -> list[tuple[str, list[StepLoad]]]:
    return [(color, [load for load in loads if load.is_burst is (color == BURST)]) for color in (CALM, BURST)]


def _marks(color: str) -> dict[str, Any]:
    return {"color": color, "marker": "o", "markersize": 2.2, "markeredgewidth": 0, "linestyle": "none"}
