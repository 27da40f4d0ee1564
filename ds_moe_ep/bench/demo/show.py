"""The demo's results in a terminal of any width from 40 columns on. Every line says that it is emulated."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from ds_moe_ep.bench.demo.plan import CANDIDATES, NUM_NODES, NUM_RANKS, PHASES
from ds_moe_ep.bench.demo.results import SPEEDUP, TRAFFIC_RATIO, Results
from ds_moe_ep.records.quantity import DASH, Quantity, number
from ds_moe_ep.schedule.spans import LANES, Interval, Span, length, union, without

LABEL = "emulated "
TIE = "\N{NO-BREAK SPACE}"  # textwrap does not break there
NAME_WIDTH = 1 + max(map(len, LANES))
WIDEST = 100  # columns of a timeline; more would say no more


@dataclass(frozen=True)
class Glyphs:
    """Cells of a timeline."""

    busy: str
    exposed: str
    idle: str


BLOCKS, ASCII = Glyphs("█", "░", "·"), Glyphs("#", "-", ".")
STYLES = {"compute": "green", "dispatch": "blue", "combine": "cyan"}
RANK = 0  # whose timelines are shown


def show(results: Results, console: Console) -> None:
    """Prints both timelines and the figures."""
    width = min(console.width, WIDEST)
    glyphs = ASCII if console.options.ascii_only else BLOCKS
    steps = {name: [span for span in spans if span.rank == RANK] for name, spans in results.shown().items()}
    longest_us = max(length([_whole(spans)]) for spans in steps.values())
    lines = [line for text in _heading(results, glyphs) for line in _labelled(text, width)]
    for name, spans in steps.items():
        lines += [*_labelled(_title(name, results), width), *_timeline(spans, longest_us, width, glyphs)]
    for text in _summary(results):
        lines += _labelled(text, width)
    for line in lines:
        console.print(line, no_wrap=True, overflow="ignore", crop=False)


def _labelled(text: str, width: int) -> list[Text]:
    """The text in lines that all begin with the label; a number and its unit stay together."""
    tied = text.replace(" %", f"{TIE}%").replace(" ms", f"{TIE}ms")
    body = textwrap.wrap(tied, width - len(LABEL), break_on_hyphens=False)
    return [Text.assemble((LABEL, "dim"), line.replace(TIE, " ")) for line in body]


def _heading(results: Results, glyphs: Glyphs) -> Iterator[str]:
    link = f"{number(8e-6 * results.plan.bytes_per_s, significant=4)} Mbit/s"
    ratio = number(results[TRAFFIC_RATIO].value, 2)
    yield f"experts and link ({link} per node); layer and transfers are real"
    yield f"on {NUM_RANKS} gloo ranks as {NUM_NODES} nominal nodes; traffic takes {ratio} of{TIE}compute"
    yield f"rank {RANK} below: {glyphs.busy} busy, {glyphs.exposed} traffic that no compute covers"


def _title(name: str, results: Results) -> str:
    time, hidden = (_spread(results[f"{name}.step.{what}"], 0) for what in ("time", "hidden"))
    return f"{name}: step {time} ms, hidden {hidden} %"


def _summary(results: Results) -> Iterator[str]:
    for phase in PHASES:
        times, hidden = (
            " -> ".join(results[f"{name}.{phase}.{what}"].text(0, bar=False) for name in CANDIDATES)
            for what in ("time", "hidden")
        )
        yield f"{phase}: {times} ms, hidden {hidden} %"
    rounds = results.plan.rounds
    yield f"overlapped is {_spread(results[SPEEDUP], 2)} times as fast"
    yield f"in medians and quartiles of {rounds} alternating rounds" if rounds > 1 else "in one round"


def _spread(quantity: Quantity, decimals: int) -> str:
    """The number and its bar, without a dash that some terminals lack."""
    return quantity.text(decimals).replace(DASH, " to ")


def _whole(spans: Sequence[Span]) -> Interval:
    """From the first span to the last."""
    return min(span.start_us for span in spans), max(span.stop_us for span in spans)


def _timeline(spans: Sequence[Span], longest_us: float, width: int, glyphs: Glyphs) -> Iterator[Text]:
    """A line for the passes, and a bar for each lane; `longest_us` fills the width."""
    start_us, stop_us = _whole(spans)
    num_cells = width - len(LABEL) - NAME_WIDTH
    cell_us = longest_us / num_cells
    backward_us = min(span.start_us for span in spans if span.tags.phase == "backward")
    num_forward, num_used = (round((moment - start_us) / cell_us) for moment in (backward_us, stop_us))
    forward = next(name for name in ("forward", "fwd", "") if len(name) < max(num_forward, 1))
    backward = next(name for name in ("backward", "bwd", "") if len(name) <= num_used - num_forward)
    yield Text.assemble((LABEL, "dim"), " " * NAME_WIDTH, forward.ljust(num_forward), backward)
    for lane in ("dispatch", "compute", "combine"):
        bar = _bar(spans, lane, start_us, cell_us, num_used, glyphs)
        yield Text.assemble((LABEL, "dim"), lane.ljust(NAME_WIDTH), (bar, STYLES[lane]))


def _bar(spans: Sequence[Span], lane: str, start_us: float, cell_us: float, num_cells: int, glyphs: Glyphs) -> str:
    """A glyph per cell: whether the lane is busy for most of it, and whether compute covers its traffic."""
    busy = union([(span.start_us, span.stop_us) for span in spans if span.lane == lane])
    compute = union([(span.start_us, span.stop_us) for span in spans if span.lane == "compute"])
    exposed = without(busy, compute)
    cells = []
    for index in range(num_cells):
        cell = (start_us + index * cell_us, start_us + (index + 1) * cell_us)
        busy_us, exposed_us = (length(_within(intervals, cell)) for intervals in (busy, exposed))
        is_busy = 2 * busy_us >= cell_us
        is_exposed = lane != "compute" and 2 * exposed_us >= busy_us
        cells.append((glyphs.exposed if is_exposed else glyphs.busy) if is_busy else glyphs.idle)
    return "".join(cells)


def _within(intervals: Sequence[Interval], cell: Interval) -> list[Interval]:
    cut = ((max(start, cell[0]), min(stop, cell[1])) for start, stop in intervals)
    return [(start, stop) for start, stop in cut if start < stop]
