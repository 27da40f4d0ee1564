"""Units and notes of the overlap benchmark's samples, the ratios that follow from them, and its tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ds_moe_ep.bench.candidates.layers import NO_REMEDY, PHASES, TWO_LEVEL
from ds_moe_ep.bench.harness.collector import Collector, DerivedSamples, Metric, ratios
from ds_moe_ep.bench.harness.method import summarize
from ds_moe_ep.bench.overlap.ranks import OverlapPlan
from ds_moe_ep.records.quantity import NONE, cell
from ds_moe_ep.records.record import Record
from ds_moe_ep.records.table import Table, table
from ds_moe_ep.schedule.shaping import WIRE

SPREAD = "lowest and highest 5 % dropped (from 20 rounds on), quartiles"
METRICS = {
    "time": ("ms", f"slowest rank, {SPREAD}"),
    "to_serial": ("ratio", f"ratio to serial in the same round, {SPREAD}"),
    "to_native": ("ratio", f"ratio to DeepSpeed's native layer in the same round, {SPREAD}"),
    "to_one_level": (
        "ratio",
        f"ratio to the same schedule whose rows cross the far link one by one in the same round, {SPREAD}",
    ),
    "to_no_remedy": (
        "ratio",
        f"ratio to the same schedule without a remedy of unequal loads in the same round, {SPREAD}",
    ),
    "to_balanced": ("ratio", f"ratio to the median of that schedule on the balanced workload W0, {SPREAD}"),
    "hidden": (
        "%",
        f"share of the transfers' time under which the same rank computed, mean of the ranks, {SPREAD}",
    ),
    "traffic": ("ms", f"time of the exchanges alone: serial with experts that take no time, {SPREAD}"),
    "over_limit": (
        "ratio",
        "time over a limit that was measured in the same run: with emulated devices max(compute, traffic alone), with "
        f"real ones the serial layer with experts that take no time, {SPREAD}",
    ),
    "traffic_ratio": ("ratio", f"time of the exchanges alone over the emulated compute, {SPREAD}"),
}


def metric(plan: OverlapPlan, name: str) -> Metric:
    """The Metric of a name's last part."""
    unit, note = METRICS[name.rsplit(".", 1)[1]]
    is_emulated = plan.device == "emulated"
    note = f"emulated device; {note}" if is_emulated else note
    return Metric(unit, note, is_emulated=is_emulated or plan.testbed is not None)


def derive(plan: OverlapPlan, found: Collector) -> Iterator[DerivedSamples]:
    """Times over those of others in the same round, and over what cannot be beaten."""
    for environment in plan.places:
        for name in plan.candidates:
            for phase in PHASES:
                of = plan.prefix(environment, name, phase)
                times_ms = found.of(f"{of}.time")
                if plan.workloads:
                    yield from _against_no_remedy(plan, found, environment, name, phase)
                for base in ("serial", "native"):
                    if name != base and (theirs_ms := found.of(f"{plan.prefix(environment, base, phase)}.time")):
                        yield DerivedSamples(f"{of}.to_{base}", ratios(times_ms, theirs_ms))
                one_level = plan.prefix(environment, name.partition(",")[0], phase)
                if name in TWO_LEVEL and (theirs_ms := found.of(f"{one_level}.time")):
                    yield DerivedSamples(f"{of}.to_one_level", ratios(times_ms, theirs_ms))
                if name != WIRE and (limit_ms := _limit_ms(plan, found, environment, phase)):
                    yield DerivedSamples(f"{of}.over_limit", [ms / limit_ms for ms in times_ms])


def _against_no_remedy(
    plan: OverlapPlan, found: Collector, place: str, name: str, phase: str
) -> Iterator[DerivedSamples]:
    """Times over those without a remedy: of the same round, and of the balanced workload with as many micro-batches."""
    of = plan.prefix(place, name, phase)
    times_ms = found.of(f"{of}.time")
    if not times_ms:
        return
    if name != NO_REMEDY and (no_remedy_ms := found.of(f"{plan.prefix(place, NO_REMEDY, phase)}.time")):
        yield DerivedSamples(f"{of}.to_no_remedy", ratios(times_ms, no_remedy_ms))
    environment, _, rest = place.rpartition(", W")
    balanced = f"{environment}, W0{rest[1:]}"
    if base_ms := found.of(f"{plan.prefix(balanced, NO_REMEDY, phase)}.time"):
        median_ms = summarize(base_ms).value
        yield DerivedSamples(f"{of}.to_balanced", [ms / median_ms for ms in times_ms])


def _limit_ms(plan: OverlapPlan, found: Collector, environment: str, phase: str) -> float:
    """The time that a step is compared with, measured in the same run; 0 where it was not."""
    wire = plan.prefix(environment, WIRE, phase)
    if plan.device == "real":
        times_ms = found.of(f"{wire}.time")
        return summarize(times_ms).value if times_ms else 0.0
    traffic_ms = found.of(f"{wire}.traffic")
    return max(plan.compute_ms(phase), summarize(traffic_ms).value) if traffic_ms else 0.0


def overlap_tables(records: Iterable[Record]) -> Iterator[Table]:
    """A table per environment: a row per candidate, times and hidden shares of each pass."""
    found: dict[str, dict[str, dict[str, Record]]] = {}
    for record in records:
        _, _, rest = record.name.split(".", 2)
        environment, name, phase, what = rest.rsplit(".", 3)
        found.setdefault(environment, {}).setdefault(name, {})[f"{phase}.{what}"] = record
    head = (*PHASES, "step, serial = 1", "step, native = 1", "step, limit = 1", "hidden, %")
    loads = {place: its for place, its in found.items() if ", W" in place}
    if loads:
        yield workload_table(loads)
    for environment, of_names in found.items():
        if environment in loads:
            continue
        rows = [row for name, cells in of_names.items() for row in _rows(name, cells)]
        yield table(environment, ("candidate", *head), rows)
        if compared := list(_two_level_rows(of_names)):
            yield table(f"{environment}: one level = 1", ("candidate", *PHASES), compared)


def workload_table(found: Mapping[str, Mapping[str, Mapping[str, Record]]]) -> Table:
    """A row per workload and candidate: the time of a window, and its ratios."""
    compared = ("to_no_remedy", "to_balanced", "to_native")
    rows = []
    for place, of_names in found.items():
        for name, cells in of_names.items():
            ratios_to = [cell(cells.get(f"step.{what}"), "ratio", 2, bar=True) for what in compared]
            rows.append((place, name, cell(cells.get("step.time"), "ms", 0, bar=True), *ratios_to))
    head = ("links, workload, window", "candidate", "window", f"{NO_REMEDY} = 1", "balanced = 1", "native = 1")
    return table("windows of unequal loads", head, rows, text_columns=2)


def _two_level_rows(of_names: Mapping[str, Mapping[str, Record]]) -> Iterator[tuple[str, ...]]:
    """Times with copies, and with sums, over those of the same schedule with one level."""
    for name, cells in of_names.items():
        found = [cells.get(f"{phase}.to_one_level") for phase in PHASES]
        if any(found):
            yield name, *(cell(each, "ratio", 3, bar=True) for each in found)


def _rows(name: str, cells: Mapping[str, Record]) -> Iterator[tuple[str, ...]]:
    if name == WIRE:
        for title, what, unit, decimals in (
            ("traffic alone", "traffic", "ms", 0),
            ("traffic / compute", "traffic_ratio", "ratio", 2),
        ):
            ours = [cell(cells.get(f"{phase}.{what}"), unit, decimals, bar=True) for phase in PHASES]
            if ours != [NONE] * len(PHASES):
                yield title, *ours, *[NONE] * 4
    times = [cell(cells.get(f"{phase}.time"), "ms", 0, bar=True) for phase in PHASES]
    of_step = ("to_serial", "to_native", "over_limit")
    compared = [cell(cells.get(f"step.{what}"), "ratio", 2, bar=True) for what in of_step]
    hidden = " / ".join(cell(cells.get(f"{phase}.hidden"), "percent", 0) for phase in PHASES)
    yield "experts of no time" if name == WIRE else name, *times, *compared, hidden
