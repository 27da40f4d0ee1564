"""The section on layouts of one job: which is fastest on which link, as measured and as simulated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ds_moe_ep.records.names import LAYOUTS, SYSTEMS, title_of
from ds_moe_ep.records.quantity import NONE, Quantity, convert, number
from ds_moe_ep.records.record import Record
from ds_moe_ep.records.table import Table
from ds_moe_ep.report.findings import Findings
from ds_moe_ep.report.known_names import environment_order, number_in, short_environment
from ds_moe_ep.report.page import PageSection, Picture, Prose, basis_of
from ds_moe_ep.report.plots.layouts import LayoutLine, LayoutPanel, draw_layouts

MEASURED = "measured, training"
HEAD = ("traffic / compute", "best layout", "tokens/s", "next", "over next")
EXPLAINED = (
    "The ratio says how slow the links between nodes are: the time of the experts' rows over the compute of a step, "
    "where all ranks share the experts (EP16) and nothing is hidden. It is one link for all layouts. Two layouts are "
    "named where the bar of the lead holds 1: quartiles of rounds where it was measured, both ends of the cluster's "
    "ranges where it was simulated. Simulated ones are the fastest of all layouts that fit."
)


@dataclass(frozen=True)
class RatioPoint:
    """The layouts on links of one ratio: their tokens per second, and those over the best one's."""

    tps: Mapping[str, Quantity]
    over_best: Mapping[str, Quantity]
    used: tuple[Record, ...]

    @property
    def order(self) -> list[str]:
        """The systems, the fastest first."""
        return fastest_first(self.tps)

    def shown(self, system: str) -> Quantity | None:
        """Throughput of a system over the best one's; None where nothing tells."""
        return Quantity.of(1.0, unit="ratio") if system == self.order[0] else self.over_best.get(system)

    @property
    def lead(self) -> Quantity | None:
        """The best layout over the next one; None where nothing tells."""
        behind = self.over_best.get(self.order[1])
        return None if behind is None else inverse(behind)

    @property
    def winner(self) -> str:
        """The best layout; two where the lead's bar holds 1."""
        told = [title_of(system) for system in self.order[:2]]
        is_alone = self.lead is None or self.lead.low > 1
        return told[0] if is_alone else " or ".join(told)


Points = Mapping[float, RatioPoint]


def layouts(findings: Findings) -> PageSection | None:
    """One picture, and a table for each place in which layouts of one job were run, or simulated."""
    places = {MEASURED: measured(findings)}
    names = {name.split(".")[1] for name in findings.by_name if name.startswith("layouts.")}
    places |= {short_environment(name): simulated(findings, name) for name in sorted(names, key=environment_order)}
    places = {title: points for title, points in places.items() if points}
    if not places:
        return None
    used = [record for points in places.values() for point in points.values() for record in point.used]
    picture = Picture(
        "layouts",
        "Which layout is fastest on which link",
        "Throughput over that of the best layout on the same link, which has a ring. Whiskers: quartiles where it was "
        "measured, both ends of the cluster's ranges where it was simulated.",
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
        best = fastest_first(tps)[0]
        ratios = {system: told for system in tps if (told := _over_best(findings, environment, system, best))}
        over_best = {system: quantity for system, (quantity, _) in ratios.items()}
        used = (ratio, *of_place.values(), *(record for _, record in ratios.values()))
        found[convert(ratio, "ratio").value] = RatioPoint(tps, over_best, used)
    return dict(sorted(found.items()))


def _over_best(findings: Findings, environment: str, system: str, best: str) -> tuple[Quantity, Record] | None:
    """A system's throughput over the best one's, round by round, from either one's Record; None without one."""
    record = findings.get("system", environment, "training", system, f"ratio_to_{best}")
    if record is not None:
        return convert(record, "ratio"), record
    record = findings.get("system", environment, "training", best, f"ratio_to_{system}")
    return None if record is None else (inverse(convert(record, "ratio")), record)


def inverse(ratio: Quantity) -> Quantity:
    """The ratio the other way round; median and quartiles stay what they are."""
    return Quantity.of(1 / ratio.value, 1 / ratio.low, 1 / ratio.high, unit="ratio")


def simulated(findings: Findings, environment: str) -> Points:
    """The layouts that `plan --search --traffic` told, by ratio."""
    found: dict[float, dict[str, dict[str, Record]]] = {}
    for name, record in findings.below("layouts", environment).items():
        ratio, system, what = name.split(".")
        found.setdefault(number_in(ratio, "traffic") / 100, {}).setdefault(system, {})[what] = record
    points = {ratio: _simulated_point(its) for ratio, its in sorted(found.items())}
    return {ratio: point for ratio, point in points.items() if len(point.tps) > 1}


def _simulated_point(its: Mapping[str, Mapping[str, Record]]) -> RatioPoint:
    tps = {system: convert(records["tps"], "tokens/s") for system, records in its.items() if "tps" in records}
    over_best = {system: convert(its[system]["over_best"], "ratio") for system in tps if "over_best" in its[system]}
    used = tuple(record for records in its.values() for record in records.values())
    return RatioPoint(tps, over_best, used)


def _panel(title: str, points: Points) -> LayoutPanel:
    """The lines of the layouts that lead or follow somewhere, and of those that the benchmark runs."""
    shown = dict.fromkeys(system for point in points.values() for system in point.order[:2])
    shown |= dict.fromkeys(system for point in points.values() for system in point.tps if system in LAYOUTS)
    order = [*(system for system in SYSTEMS if system in shown), *(system for system in shown if system not in SYSTEMS)]
    overs = {
        system: {ratio: over for ratio, point in points.items() if (over := point.shown(system))} for system in order
    }
    lines = [LayoutLine(system, its) for system, its in overs.items() if its]
    emulated = all(record.emulated for point in points.values() for record in point.used)
    how = " (simulated)" if title != MEASURED else " (emulated)" if emulated else ""
    return LayoutPanel(title, f"throughput over the best{how}", lines)


def _table(title: str, points: Points) -> Table:
    rows = []
    for ratio, point in points.items():
        best, after = point.order[0], point.order[1]
        lead = NONE if point.lead is None else point.lead.text(2)
        rows.append((number(ratio, 2), point.winner, point.tps[best].text(digits=3), title_of(after), lead))
    used = [record for point in points.values() for record in point.used]
    return Table(f"Best layout by link, {title}", HEAD, tuple(rows), basis_of(used), text_columns=len(HEAD))
