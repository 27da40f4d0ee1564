"""Rows of the experts over the steps: a map per layer, and how uneven each system is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from ds_moe_ep.report.page import Drawing
from ds_moe_ep.report.plots.style import FAINT, INK, columns_of, draw, panels, rows_for, system_color

HOTTEST = 2.0  # the colour's end: twice the mean


@dataclass(frozen=True)
class LayerLoad:
    """Rows of each expert of one layer at each step, over the mean of the experts."""

    layer: int
    steps: tuple[int, ...]
    experts: tuple[int, ...]
    over_mean: Mapping[tuple[int, int], float]  # by (step, expert)

    def fullest(self) -> list[float]:
        """The fullest expert's load at each step."""
        return [max(self.over_mean[step, expert] for expert in self.experts) for step in self.steps]


@dataclass(frozen=True)
class Unevenness:
    """A system's fullest expert of all layers, over its layer's mean, at each step."""

    system: str
    label: str
    at_step: Mapping[int, float]


def draw_load(layers: Sequence[LayerLoad]) -> Drawing:
    """A map of experts and steps for each layer, under the line of its fullest expert."""
    highest = max(max(load.fullest()) for load in layers)

    def paint(figure: Figure) -> None:
        num_columns = min(columns_of(figure), len(layers))
        num_bands = rows_for(len(layers), num_columns)
        ratios = [1.0, 2.6] * num_bands
        grid = figure.subplots(2 * num_bands, num_columns, squeeze=False, height_ratios=ratios)
        image: AxesImage | None = None
        for place in range(num_bands * num_columns):
            row, column = 2 * (place // num_columns), place % num_columns
            line, heat = grid[row][column], grid[row + 1][column]
            if place < len(layers):
                _paint_fullest(line, layers[place], highest)
                image = _paint_map(heat, layers[place])
            else:
                line.set_axis_off()
                heat.set_axis_off()
        assert image is not None
        bar = figure.colorbar(image, ax=grid, extend="max", pad=0.015, aspect=40)
        bar.set_label("an expert's rows over the mean", color=FAINT)

    return draw(lambda columns: 3.1 * rows_for(len(layers), columns) + 0.1, paint)


def draw_unevenness(systems: Sequence[Unevenness]) -> Drawing:
    """The fullest expert of all layers over the steps, a line per system."""

    def paint(figure: Figure) -> None:
        (axis,) = panels(figure, 1)
        for index, system in enumerate(systems):
            steps = sorted(system.at_step)
            values = [system.at_step[step] for step in steps]
            width = max(1.4, 3.4 - index)  # equal lines lie on each other: the first is widest
            color = system_color(system.system)
            axis.plot(steps, values, color=color, linewidth=width, label=system.label, marker=_marker(steps))
        axis.axhline(1.0, color=FAINT, linewidth=0.8, linestyle=":")
        axis.set_ylabel("fullest expert's\nrows over the mean", color=FAINT)
        axis.set_xlabel("step", color=FAINT)
        axis.set_ylim(bottom=0.9)
        axis.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axis.grid(axis="y")
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

    return draw(lambda columns: 2.3, paint)


def _marker(steps: Sequence[int]) -> str:
    return "o" if len(steps) == 1 else ""


def _paint_fullest(axis: Axes, load: LayerLoad, highest: float) -> None:
    axis.plot(range(len(load.steps)), load.fullest(), color=INK, linewidth=1.3, marker=_marker(load.steps))
    axis.axhline(1.0, color=FAINT, linewidth=0.8, linestyle=":")
    axis.set_xlim(-0.5, len(load.steps) - 0.5)
    axis.set_ylim(0.8, max(1.2, 1.1 * highest))
    axis.set_ylabel("max / mean", color=FAINT)
    axis.set_title(f"layer {load.layer}")
    axis.tick_params(axis="x", labelbottom=False, length=0)
    axis.yaxis.set_major_locator(MaxNLocator(3))


def _paint_map(axis: Axes, load: LayerLoad) -> AxesImage:
    """One column per step, one row per expert; steps are evenly spaced, and named by their numbers."""
    shades = [[load.over_mean[step, expert] for step in load.steps] for expert in load.experts]
    image = axis.imshow(shades, aspect="auto", interpolation="nearest", cmap="RdBu_r", vmin=0.0, vmax=HOTTEST)
    axis.set_xlabel("step", color=FAINT)
    axis.set_ylabel("expert", color=FAINT)
    axis.spines[:].set_visible(True)
    _name_places(axis.xaxis, load.steps, 8)
    _name_places(axis.yaxis, load.experts, 8)
    return image


def _name_places(axis: Axis, names: Sequence[int], most: int) -> None:
    """Ticks at round numbers among the evenly spaced places."""
    strides = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    stride = next(stride for stride in strides if sum(name % stride == 0 for name in names) <= most)
    places = [place for place, name in enumerate(names) if name % stride == 0] or [0]
    axis.set_ticks(places, labels=[str(names[place]) for place in places])
