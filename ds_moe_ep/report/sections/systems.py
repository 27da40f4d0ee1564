"""The sections on whole systems: throughput, where a step's time goes, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ds_moe_ep.records.names import BASELINE, KINDS, MODES, PARTS, SIMULATED, SYSTEMS, environment_title
from ds_moe_ep.records.quantity import TIMES, cell, convert, number
from ds_moe_ep.records.record import Record
from ds_moe_ep.records.table import Table
from ds_moe_ep.report.findings import Findings
from ds_moe_ep.report.known_names import short_environment
from ds_moe_ep.report.page import Block, Lines, PageSection, Picture, Prose, basis_of
from ds_moe_ep.report.plots.bars import Bar, BarPanel, Stack, StackPanel, draw_bars, draw_stacks
from ds_moe_ep.report.plots.style import KIND_COLORS, PART_COLORS

OURS = "ep16"
HEADLINE = ("tps", "tpot", "step", "busy", "hidden")
DECOMPOSITION = (("ep16_serial", "tp8_pp2"), ("ep16", "ep16_serial"), ("ep16", "tp8_pp2"))
REFERENCES = ("native_ep16", "autoep_ep16")
SIMULATION = (
    " Of a simulated environment nothing was measured: its brackets and whiskers hold what the simulation gives where "
    "all of the cluster's ranges are at their slower ends, and where all are at their faster ones."
)


def throughput(findings: Findings) -> PageSection | None:
    """The headline: a table for each environment and mode, and the bars."""
    whats = (*HEADLINE, *(f"ratio_to_{system}" for system in SYSTEMS))
    blocks: list[Block] = []
    for environment, mode in findings.places(*whats):
        blocks += _headline(findings, environment, mode, findings.systems(*whats, environment=environment, mode=mode))
    if not blocks:
        return None
    explained = Prose(
        f"Values are medians, with the quartiles in brackets where they differ. {TIMES} {SYSTEMS[BASELINE]} is the "
        f"throughput over that of {SYSTEMS[BASELINE]}: above 1 is faster. Busy is the share of a step in which "
        "a device works: emulated compute, processor time on a CPU that ranks share, utilization.gpu on a GPU. Hidden "
        "is the share of the experts' traffic that ran behind compute."
        + (SIMULATION if any(environment.startswith(SIMULATED) for environment in findings.environments) else "")
    )
    bars = _throughput_bars(findings)
    return PageSection("Throughput", (explained, *([bars] if bars else []), *blocks))


def _headline(findings: Findings, environment: str, mode: str, systems: Sequence[str]) -> list[Block]:
    of_place = {system: findings.below("system", environment, mode, system) for system in systems}
    used = [
        record
        for records in of_place.values()
        for what, record in records.items()
        if what in HEADLINE or what.startswith("ratio_to_")
    ]
    with_hidden = any("hidden" in records for records in of_place.values())
    head = ["system", "tokens/s", "\u00b5s per token", "ms per step", "busy %", *(["hidden %"] if with_hidden else [])]
    rows = []
    for system, records in of_place.items():
        row = [SYSTEMS[system], cell(records.get("tps"), "tokens/s", bar=True)]
        row += [cell(records.get("tpot"), "us"), cell(records.get("step"), "ms"), cell(records.get("busy"), "percent")]
        row += [cell(records.get("hidden"), "percent")] if with_hidden else []
        ratio = records.get(f"ratio_to_{BASELINE}")
        rows.append((*row, "baseline" if system == BASELINE else cell(ratio, "ratio", bar=True)))
    strong = frozenset(index for index, system in enumerate(of_place) if system == OURS)
    title = f"{environment_title(environment)} \u2013 {MODES[mode]}"
    table = Table(title, (*head, f"{TIMES} {SYSTEMS[BASELINE]}"), tuple(rows), basis_of(used), strong_rows=strong)
    told = [line for line in (_traffic(findings, environment), *_ratios(of_place)) if line]
    return [table, *([Lines(tuple(told))] if told else [])]


def _ratios(of_place: Mapping[str, Mapping[str, Record]]) -> list[str]:
    """The decomposition of the gain, and the gain over DeepSpeed's own layers, as sentences."""

    def told(system: str, other: str) -> str:
        record = of_place.get(system, {}).get(f"ratio_to_{other}")
        return f"{convert(record, 'ratio').text()} {TIMES}" if record else ""

    steps = [(f"{SYSTEMS[other]} \u2192 {SYSTEMS[system]}", told(system, other)) for system, other in DECOMPOSITION]
    lines = ["; ".join(f"{path}: {times}" for path, times in steps if times)]
    against = [(SYSTEMS[other], told(OURS, other)) for other in REFERENCES]
    lines.append("; ".join(f"{SYSTEMS[OURS]} over {other}: {times}" for other, times in against if times))
    return [line for line in lines if line]


def _traffic(findings: Findings, environment: str) -> str:
    """The measured traffic of an environment's links."""
    record = findings.get("system", environment, "traffic", "ratio")
    if record is None:
        return ""
    return f"EP16's traffic alone took {number(convert(record, 'ratio').value)} of the time of its compute here."


def _throughput_bars(findings: Findings) -> Picture | None:
    panels, used = [], []
    for environment, mode in findings.places("tps"):
        bars = []
        for system in findings.systems("tps", environment=environment, mode=mode):
            record = findings.by_name[f"system.{environment}.{mode}.{system}.tps"]
            ratio = findings.get("system", environment, mode, system, f"ratio_to_{BASELINE}")
            quantity = convert(record, "tokens/s")
            text = number(quantity.value) + (f"  {number(convert(ratio, 'ratio').value)} {TIMES}" if ratio else "")
            bars.append(Bar(system, SYSTEMS[system], quantity, text))
            used += [record, *([ratio] if ratio and system != BASELINE else [])]
        panels.append(BarPanel(_title(environment, mode), _axis("tokens per second", used[-1]), bars))
    if not panels:
        return None
    caption = (
        f"Tokens per second of all ranks together. Whiskers: quartiles. {TIMES}: throughput over that of "
        f"{SYSTEMS[BASELINE]} in the same panel."
    )
    return Picture("throughput", "Throughput", caption, draw_bars(panels), basis_of(used))


def latency(findings: Findings) -> PageSection | None:
    """Where a step's time goes."""
    places = findings.places("breakdown")
    if not places:
        return None
    panels, used = [], []
    for environment, mode in places:
        stacks = []
        for system in findings.systems("breakdown", environment=environment, mode=mode):
            parts = findings.below("system", environment, mode, system, "breakdown")
            step = findings.get("system", environment, mode, system, "step")
            used += [*parts.values(), *([step] if step else [])]
            stacks.append(_stack(system, parts, "ms", f"step {cell(step, 'ms')}" if step else ""))
        panels.append(StackPanel(_title(environment, mode), _axis("ms of a step", used[-1]), stacks))
    caption = (
        "A step of the mean rank, cut into parts that sum to it. Traffic counts only while no compute hides it. "
        "Behind the bars: the median step."
    )
    drawing = draw_stacks(panels, PARTS, PART_COLORS)
    picture = Picture("latency", "Where a step's time goes", caption, drawing, basis_of(used))
    return PageSection("Where the time goes", (picture,))


def memory(findings: Findings) -> PageSection | None:
    """Memory of the fullest rank, by kind."""
    places = findings.places("memory")
    if not places:
        return None
    of_places = {
        place: {system: findings.below("system", *place, system, "memory") for system in systems}
        for place in places
        if (systems := findings.systems("memory", environment=place[0], mode=place[1]))
    }
    used = [record for of_place in of_places.values() for records in of_place.values() for record in records.values()]
    unit = "GB" if max(convert(record, "GB").value for record in used) >= 1 else "MB"
    panels = []
    for place, of_place in of_places.items():
        stacks = [_stack(system, records, unit, "") for system, records in of_place.items()]
        first = next(record for records in of_place.values() for record in records.values())
        panels.append(StackPanel(_title(*place), _axis(f"{unit} of the fullest rank", first), stacks))
    caption = f"Bytes of the fullest rank by kind (1 {unit} = {'1e9' if unit == 'GB' else '1e6'} bytes)."
    drawing = draw_stacks(panels, KINDS, KIND_COLORS)
    return PageSection("Memory", (Picture("memory", "Memory of a rank", caption, drawing, basis_of(used)),))


def _stack(system: str, parts: Mapping[str, Record], unit: str, text: str) -> Stack:
    return Stack(system, SYSTEMS[system], {part: convert(record, unit).value for part, record in parts.items()}, text)


def _title(environment: str, mode: str) -> str:
    return f"{short_environment(environment)}, {MODES[mode]}"


def _axis(unit: str, record: Record) -> str:
    """An axis' unit, and that its values are emulated where they are."""
    return f"{unit} (emulated)" if record.emulated else unit
