"""Style of every picture: colours (Okabe and Ito's, told apart by colour-blind readers), type, and saving.

A picture is painted on a Figure of its own, under settings that end with it; pyplot and its global state are not used.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, FigureBase
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from ds_moe_ep.records.quantity import Quantity
from ds_moe_ep.report.page import Drawing

Panel = TypeVar("Panel")

WIDTH_IN, PHONE_IN = 9.6, 4.2  # of the page, with panels in two columns; of a phone, with one
DPI = 160
INK, FAINT, GRID, GROUND = "#222222", "#666666", "#dddddd", "#ffffff"
PALE, SHADE = "#fefefe", "#f6cdb5"  # text on dark bars; a shaded part of the ground
IN_THE_DARK: Mapping[str, str] = {  # all else, bars and curves and the text on bars, has its colour on either ground
    INK: "#e4e7ea",
    FAINT: "#9aa4ae",
    GRID: "#343a41",
    GROUND: "#15181c",
    SHADE: "#6b4330",
}

SYSTEM_COLORS: Mapping[str, str] = {
    "tp8_pp2": "#8c8c8c",
    "ep16_serial": "#56b4e9",
    "ep16": "#0072b2",
    "native_ep16": "#e69f00",
    "autoep_ep16": "#d55e00",
    "pp2_ep8": "#009e73",
    "tp2_ep8": "#cc79a7",
    "tp2_pp2_ep4": "#999933",
}
OTHER_COLORS = ("#7570b3", "#a6761d", "#e7298a", "#66a61e")  # of layouts that no benchmark runs
PART_COLORS: Mapping[str, str] = {
    "compute": "#009e73",
    "experts_traffic": "#d55e00",
    "tensor_traffic": "#e69f00",
    "pipeline": "#cc79a7",
    "gradients": "#56b4e9",
    "rest": "#c4c4c4",
}
KIND_COLORS: Mapping[str, str] = {
    "weights": "#0072b2",
    "gradients": "#56b4e9",
    "optimizer": "#009e73",
    "activations": "#e69f00",
    "buffers": "#c4c4c4",
}
STYLE: Mapping[str, object] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": INK,
    "hatch.linewidth": 0.7,
    "svg.hashsalt": "ds_moe_ep",
    "svg.fonttype": "path",
    "figure.constrained_layout.h_pad": 0.08,
    "figure.facecolor": GROUND,
    "savefig.facecolor": GROUND,
}


def draw(height_in: Callable[[int], float], paint: Callable[[Figure], None]) -> Drawing:
    """The drawing that `paint` leaves on a figure of the page's width, and of a phone's; the same bytes each time.

    `height_in` gives its height by the number of columns, which `columns_of` tells `paint`.
    """
    png, svg = _saved(WIDTH_IN, height_in(2), paint, ("png", "svg"))
    return Drawing(svg=svg, png=png, narrow=functools.cache(lambda: _saved(PHONE_IN, height_in(1), paint, ("svg",))[0]))


def columns_of(figure: FigureBase) -> int:
    """Columns in which panels fit on a figure of this width."""
    root = figure.get_figure(root=True)
    return 2 if root is not None and root.get_figwidth() == WIDTH_IN else 1


def _saved(width_in: float, height_in: float, paint: Callable[[Figure], None], formats: Sequence[str]) -> list[bytes]:
    with matplotlib.rc_context(dict(STYLE)):  # type: ignore[arg-type]  # the stubs want literal keys
        figure = Figure(figsize=(width_in, height_in), dpi=DPI, layout="constrained")
        FigureCanvasAgg(figure)
        paint(figure)
        found = []
        for kind in formats:
            file = io.BytesIO()
            about = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
            figure.savefig(file, format=kind, metadata=about)
            figure.set_layout_engine("none")  # everything has its place now; to find it again would take as long
            content = file.getvalue()
            found.append(with_dark_rules(content.decode()).encode() if kind == "svg" else content)
        return found


def with_dark_rules(svg: str) -> str:
    """The picture with rules for a reader whose page is dark: its ground and what is written on it change colours.

    matplotlib writes each colour into an element's own style, where any viewer finds it; the rules match that text.
    """
    rules = "".join(
        f'[style*="{part}: {color}"]{{{part}:{dark} !important}}'
        for color, dark in IN_THE_DARK.items()
        for part in ("fill", "stroke")
    )
    return svg.replace("</style>", f"@media (prefers-color-scheme: dark){{{rules}}}</style>", 1)


def rows_for(num_panels: int, num_columns: int) -> int:
    """Rows that panels take."""
    return -(-num_panels // min(num_panels, num_columns))


def panels(figure: Figure, num: int) -> list[Axes]:
    """`num` axes in rows; what is left of the last row stays blank."""
    num_columns = min(num, columns_of(figure))
    num_rows = rows_for(num, num_columns)
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    axes: list[Axes] = [axis for row in grid for axis in row]
    for blank in axes[num:]:
        blank.set_axis_off()
    return axes[:num]


def plain_numbers(axis: Axis) -> None:
    """Writes the numbers of an axis with commas, and without powers of ten where they can be avoided."""
    axis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))


def value_axis(axis: Axes) -> None:
    """Lines across the panel at a few plain numbers of its upright axis."""
    axis.grid(axis="y")
    axis.yaxis.set_major_locator(MaxNLocator(5))
    plain_numbers(axis.yaxis)


def show_at_least(axis: Axes, share: float) -> None:
    """Widens the upright axis to this share of its highest number, so that noise looks like no difference."""
    lowest, highest = axis.get_ylim()
    room = max(0.0, share * highest - (highest - lowest)) / 2
    axis.set_ylim(lowest - room, highest + room)


def points(axis: Axes, places: Sequence[float], quantities: Iterable[Quantity], **style: Any) -> None:
    """Paints values with the bars below and above them, in the style that `errorbar` takes."""
    found = list(quantities)
    bars = [[q.value - q.low for q in found], [q.high - q.value for q in found]]
    axis.errorbar(places, [q.value for q in found], yerr=bars, **style)


def draw_panels(
    shown: Sequence[Panel],
    paint: Callable[[Axes, Panel], None],
    handles: Callable[[], Sequence[Patch | Line2D]],
    *,
    row_in: float,
    legend_in: float = 0.4,
    num_columns: int = 6,
) -> Drawing:
    """The panels in columns, each painted on axes of its own, over one legend."""

    def paint_all(figure: Figure) -> None:
        for axis, panel in zip(panels(figure, len(shown)), shown, strict=True):
            paint(axis, panel)
        legend(figure, handles(), num_columns)

    return draw(lambda columns: row_in * rows_for(len(shown), columns) + legend_in * (3 - columns), paint_all)


def legend(figure: Figure, handles: Sequence[Patch | Line2D], num_columns: int = 6) -> None:
    """One legend for all panels, under them: on a phone in two columns, or one where a label is long."""
    narrow = 1 if max(len(str(handle.get_label())) for handle in handles) > 27 else 2
    figure.legend(
        handles=list(handles),
        loc="outside lower center",
        ncols=min(len(handles), num_columns if columns_of(figure) == 2 else narrow),
        handlelength=1.4,
        columnspacing=1.6,
    )


def system_color(system: str) -> str:
    """The colour of a system in every picture."""
    return SYSTEM_COLORS.get(system, INK)
