"""One layer's lanes over time, systems below each other: what runs beside what, and what nothing hides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ds_moe_ep.report.page import Drawing
from ds_moe_ep.report.plots.style import (
    FAINT,
    GROUND,
    PALE,
    PHONE_IN,
    SHADE,
    WIDTH_IN,
    columns_of,
    draw,
    legend,
    plain_numbers,
)
from ds_moe_ep.schedule.spans import LANES, Interval, Span, union, without

PHASES = ("forward", "backward")
LETTER_IN = 0.08  # of a label, with its share of the margins
ROWS: Mapping[str, tuple[str, str]] = {  # whose rows: title, colour
    "near": ("rows of the rank's own node", "#56b4e9"),
    "far": ("rows of other nodes", "#0072b2"),
    "all": ("rows of all peers", "#009e73"),
    "weights": ("weight gradients", "#b3b3b3"),
    "exposed": ("transfer that no compute hides", SHADE),
}

Titled = tuple[str, Sequence[Span]]


def draw_timeline(systems: Sequence[Titled]) -> Drawing:
    """The spans of one rank and layer for each titled system; passes side by side, each on one time axis."""
    phases = [phase for phase in PHASES if any(_of(spans, phase) for _, spans in systems)]
    lasts_ms = [max(_length_ms(_of(spans, phase)) for _, spans in systems) for phase in phases]
    shares = [max(last_ms, 0.3 * max(lasts_ms)) for last_ms in lasts_ms]

    def paint(figure: Figure) -> None:
        is_wide = columns_of(figure) == 2
        if is_wide:
            grid = figure.subplots(len(systems), len(phases), squeeze=False, width_ratios=shares, sharey=True)
        else:
            grid = figure.subplots(len(phases) * len(systems), 1).reshape(len(phases), len(systems)).T
        shown: set[str] = set()
        for row, (title, spans) in enumerate(systems):
            for column, phase in enumerate(phases):
                axis: Axes = grid[row][column]
                width_in = WIDTH_IN * shares[column] / sum(shares) if is_wide else PHONE_IN
                inch_per_ms = 0.85 * width_in / (lasts_ms[column] or 1.0)
                shown |= _paint(axis, _of(spans, phase), inch_per_ms)
                axis.set_title(f"{title}, {phase}")
                axis.set_xlim(0, 1.01 * lasts_ms[column] or 1.0)
                if row == len(systems) - 1:
                    axis.set_xlabel("ms since the pass began", color=FAINT)
        legend(figure, [Patch(facecolor=color, label=name) for key, (name, color) in ROWS.items() if key in shown], 3)

    return draw(lambda columns: 1.5 * len(systems) * (len(phases) if columns == 1 else 1) + 0.9, paint)


def rows_of(span: Span) -> str:
    """The key in ROWS of what a span works on, from its label of peers."""
    peers = span.tags.peers
    if not peers:
        return "weights"
    if peers.startswith("all peers"):
        return "all"
    return "near" if peers.startswith(("near", "own")) else "far"


def exposed(spans: Sequence[Span]) -> list[Interval]:
    """When a transfer was on its way and no compute ran, in microseconds."""
    compute = [(span.start_us, span.stop_us) for span in spans if span.lane == "compute"]
    traffic = [(span.start_us, span.stop_us) for span in spans if span.lane != "compute"]
    return without(union(traffic), union(compute))


def _label(span: Span, wide_in: float) -> str:
    """Whose rows a span works on, as long as fits into it: "node +1 (1/2)", "node +1", "+1", or nothing."""
    peers = span.tags.peers or "weights"
    whole = peers.partition(" (")[0]
    short = whole.removeprefix("nodes ").removeprefix("node ") if span.tags.peers else "W"
    return next((label for label in (peers, whole, short) if len(label) * LETTER_IN < wide_in), "")


def _of(spans: Sequence[Span], phase: str) -> list[Span]:
    return [span for span in spans if span.tags.phase == phase and span.lane in LANES]


def _length_ms(spans: Sequence[Span]) -> float:
    if not spans:
        return 0.0
    return (max(span.stop_us for span in spans) - min(span.start_us for span in spans)) / 1e3


def _paint(axis: Axes, spans: Sequence[Span], inch_per_ms: float) -> set[str]:
    """Paints one pass; the keys of ROWS that it shows."""
    origin_us = min((span.start_us for span in spans), default=0.0)
    bare = exposed(spans)
    for start_us, stop_us in bare:
        axis.axvspan((start_us - origin_us) / 1e3, (stop_us - origin_us) / 1e3, color=ROWS["exposed"][1], linewidth=0)
    painted = sorted(spans, key=lambda span: span.start_us)
    for index, span in enumerate(painted):
        start_ms, wide_ms = (span.start_us - origin_us) / 1e3, (span.stop_us - span.start_us) / 1e3
        later = (other.start_us for other in painted[index + 1 :] if other.lane == span.lane)
        bare_ms = (min(next(later, span.stop_us), span.stop_us) - span.start_us) / 1e3  # not painted over by the next
        lane, rows = LANES.index(span.lane), rows_of(span)
        axis.barh(lane, wide_ms, left=start_ms, height=0.72, color=ROWS[rows][1], edgecolor=GROUND, linewidth=0.5)
        ink = PALE if rows in ("far", "all") else "black"
        label = _label(span, bare_ms * inch_per_ms)
        axis.text(start_ms + bare_ms / 2, lane, label, ha="center", va="center_baseline", fontsize=9, color=ink)
    axis.set_yticks(range(len(LANES)), LANES)
    axis.set_ylim(len(LANES) - 0.45, -0.55)
    axis.tick_params(axis="y", length=0)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    plain_numbers(axis.xaxis)
    return {rows_of(span) for span in spans} | ({"exposed"} if bare else set())
