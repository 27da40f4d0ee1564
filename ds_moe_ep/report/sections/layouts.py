"""The section on layouts of one job: which is fastest on which link, as measured and as simulated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ds_moe_ep.records.names import LAYOUTS, SYSTEMS, title_of
from ds_moe_ep.records.quantity import NONE, TIMES, Quantity, convert, number
from ds_moe_ep.records.record import Record
from ds_moe_ep.records.table import Table
from ds_moe_ep.report.findings import Findings
from ds_moe_ep.report.known_names import environment_order, number_in, short_environment
from ds_moe_ep.report.page import PageSection, Picture, Prose, basis_of
from ds_moe_ep.report.plots.layouts import LayoutLine, LayoutPanel, draw_layouts

HEAD = ("traffic / compute", "best layout", "tokens/s", "next", f"best over next, {TIMES}")
EXPLAINED = (
    "The ratio says how slow the links between nodes are: the time of the experts' rows over the compute of a step, "
    "where all ranks share the experts (EP16) and nothing is hidden. It is one link for all layouts. Two layouts are "
    "named where the bar of the lead holds 1: quartiles of rounds where it was measured, both ends of the cluster's "
    "ranges where it was simulated. Simulated ones are the fastest of all layouts that fit."
)


@dataclass(frozen=True)
class RatioPoint:
    """The layouts on links of one ratio: their tokens per second, and the best one's lead over the next."""

    tps: Mapping[str, Quantity]
    lead: Quantity | None
    used: tuple[Record, ...]

    @property
    def order(self) -> list[str]:
        """The systems, the fastest first."""
        return fastest_first(self.tps)

    @property
    def winner(self) -> str:
        """The best layout; two where the lead's bar holds 1."""
        told = [title_of(system) for system in self.order[:2]]
        is_alone = self.lead is None or self.lead.low > 1
        return told[0] if is_alone else " or ".join(told)


Points = Mapping[float, RatioPoint]


def layouts(findings: Findings) -> PageSection | None:
    """One picture, and a table for each place in which layouts of one job were run, or simulated."""
    places = {"measured, training": measured(findings)}
    names = {name.split(".")[1] for name in findings.by_name if name.startswith("layouts.")}
    places |= {short_environment(name): simulated(findings, name) for name in sorted(names, key=environment_order)}
    places = {title: points for title, points in places.items() if points}
    if not places:
        return None
    used = [record for points in places.values() for point in points.values() for record in point.used]
    picture = Picture(
        "layouts",
        "Which layout is fastest on which link",
        "Tokens per second of all ranks together, a ring around the best. Whiskers: quartiles where it was measured, "
        "both ends of the cluster's ranges where it was simulated.",
        draw_layouts([_panel(title, points) for title, points in places.items()]),
        basis_of(used),
    )
    tables = (_table(title, points) for title, points in places.items())
    return PageSection("Layouts by link", (Prose(EXPLAINED), picture, *tables))


def fastest_first(tps: Mapping[str, Quantity]) -> list[str]:
    """The systems by their tokens per second."""
    return sorted(tps, key=lambda system: -tps[system].value)


def measured(findings: Findings) -> Points:
    """The layouts that the benchmark of systems trained, by the measured ratio of each environment's links."""
    found = {}
    for environment in findings.environments:
        ratio = findings.get("system", environment, "traffic", "ratio")
        of_place = {
            system: record
            for system in LAYOUTS
            if (record := findings.get("system", environment, "training", system, "tps"))
        }
        if ratio is None or len(of_place) < 2:
            continue
        tps = {system: convert(record, "tokens/s") for system, record in of_place.items()}
        best, after = fastest_first(tps)[:2]
        lead = findings.get("system", environment, "training", best, f"ratio_to_{after}")
        used = (ratio, *of_place.values(), *([lead] if lead else []))
        found[convert(ratio, "ratio").value] = RatioPoint(tps, convert(lead, "ratio") if lead else None, used)
    return dict(sorted(found.items()))


def simulated(findings: Findings, environment: str) -> Points:
    """The layouts that `plan --search --traffic` told, by ratio."""
    found: dict[float, dict[str, dict[str, Record]]] = {}
    for name, record in findings.below("layouts", environment).items():
        ratio, system, what = name.split(".")
        found.setdefault(number_in(ratio, "traffic") / 100, {}).setdefault(system, {})[what] = record
    return {ratio: _simulated_point(its) for ratio, its in sorted(found.items())}


def _simulated_point(its: Mapping[str, Mapping[str, Record]]) -> RatioPoint:
    tps = {system: convert(records["tps"], "tokens/s") for system, records in its.items() if "tps" in records}
    after = its[order[1]].get("over_best") if len(order := fastest_first(tps)) > 1 else None
    lead = None
    if after is not None:
        behind = convert(after, "ratio")
        lead = Quantity.of(1 / behind.value, 1 / behind.low, 1 / behind.high, unit="ratio")
    used = tuple(record for records in its.values() for record in records.values())
    return RatioPoint(tps, lead, used)


def _panel(title: str, points: Points) -> LayoutPanel:
    """The lines of the layouts that lead or follow somewhere, and of those that the benchmark runs."""
    shown = dict.fromkeys(system for point in points.values() for system in point.order[:2])
    shown |= dict.fromkeys(system for point in points.values() for system in point.tps if system in LAYOUTS)
    order = [*(system for system in SYSTEMS if system in shown), *(system for system in shown if system not in SYSTEMS)]
    lines = [
        LayoutLine(system, {ratio: point.tps[system] for ratio, point in points.items() if system in point.tps})
        for system in order
    ]
    emulated = all(record.emulated for point in points.values() for record in point.used)
    return LayoutPanel(title, "tokens per second" + (" (emulated)" if emulated else ""), lines)


def _table(title: str, points: Points) -> Table:
    rows = []
    for ratio, point in points.items():
        best, *others = point.order
        lead = NONE if point.lead is None else point.lead.text(2)
        after = title_of(others[0]) if others else NONE
        rows.append((number(ratio, 2), point.winner, point.tps[best].text(digits=3), after, lead))
    used = [record for point in points.values() for record in point.used]
    return Table(f"Best layout by link, {title}", HEAD, tuple(rows), basis_of(used))
