"""The section on one layer's timeline: what hides what."""

from __future__ import annotations

from collections.abc import Sequence

from ds_moe_ep.records.names import SYSTEMS
from ds_moe_ep.report.findings import Findings, Source
from ds_moe_ep.report.known_names import is_known
from ds_moe_ep.report.page import Block, PageSection, Picture, basis_of
from ds_moe_ep.report.plots.timeline import draw_timeline
from ds_moe_ep.schedule.spans import Span

ORDER = ("ep16_serial", "ep16")  # what blocks is above what overlaps


def timeline(findings: Findings) -> PageSection | None:
    """A picture for each source that has spans of the systems."""
    blocks: list[Block] = []
    for source in findings.sources:
        picture = _picture(source, len(blocks))
        if picture is not None:
            blocks.append(picture)
    return PageSection("What hides what", tuple(blocks)) if blocks else None


def _picture(source: Source, index: int) -> Picture | None:
    by_system = {system: spans for system in _ordered(source.spans) if (spans := _of_system(source.spans, system))}
    if not by_system:
        return None
    layers = [{_layer(span) for span in spans} for spans in by_system.values()]
    layer = min(set.intersection(*layers) or layers[0])
    one = {system: [span for span in spans if _layer(span) == layer] for system, spans in by_system.items()}
    ranks = [{span.rank for span in spans} for spans in one.values() if spans]
    rank = min(set.intersection(*ranks) or ranks[0])
    titled = [(SYSTEMS[name], [span for span in spans if span.rank == rank]) for name, spans in one.items() if spans]
    caption = (
        f"Rank {rank}, layer `{layer}`, one step. Each pass begins at zero; systems below each other share its time "
        "axis. A transfer is hidden while compute runs; where none runs, the ground is shaded. "
        "+1 marks rows of the next node, W gradients of weights."
    )
    of_systems = [r for r in source.known if is_known(r.name) and any(f".{name}." in r.name for name in by_system)]
    key = "timeline" if index == 0 else f"timeline_{index + 1}"
    return Picture(key, "Timeline of one layer", caption, draw_timeline(titled), basis_of(of_systems))


def _ordered(spans: Sequence[Span]) -> list[str]:
    """The systems that spans name in front of their layers, the serial one first."""
    named = {span.tags.layer.partition("/")[0] for span in spans}
    known = [system for system in SYSTEMS if system in named]
    return sorted(known, key=lambda system: ORDER.index(system) if system in ORDER else len(ORDER))


def _of_system(spans: Sequence[Span], system: str) -> list[Span]:
    return [span for span in spans if span.tags.layer.startswith(f"{system}/") and span.tags.phase]


def _layer(span: Span) -> str:
    return span.tags.layer.partition("/")[2]
