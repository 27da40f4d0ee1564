"""The section on a soak: memory and routing over many steps, and the verdicts."""

from __future__ import annotations

from ds_moe_ep.records.names import SOAK_VERDICTS
from ds_moe_ep.records.quantity import NONE, convert, number
from ds_moe_ep.records.record import Record
from ds_moe_ep.records.table import Table
from ds_moe_ep.report.findings import Findings
from ds_moe_ep.report.known_names import number_in
from ds_moe_ep.report.page import Block, PageSection, Picture, emulation_of
from ds_moe_ep.report.plots.soak import RunMemory, StepLoad, draw_soak

WORKLOAD = {  # of what: the note of its Record says the rest
    "bursts": "bursts",
    "empty_batches": "empty batches",
    "idle_ranks": "ranks without rows",
    "experts_led": "experts that were the fullest",
}


def soak(findings: Findings) -> PageSection | None:
    """A picture over the steps and a table of verdicts."""
    used: list[Record] = []
    runs = []
    for run in _runs(findings):
        memory = findings.below("soak", f"run{run}", "memory")
        used += memory.values()
        at_step = {number_in(step, "step"): convert(record, "MB") for step, record in memory.items()}
        runs.append(RunMemory(f"run {run}", at_step))
    blocks: list[Block] = []
    if runs:
        caption = f"Every step trains on routing that drifts and bursts. {_workload(findings)}".strip()
        drawing = draw_soak(runs, _loads(findings))
        blocks.append(Picture("soak", "Soak", caption, drawing, (emulation_of(used),)))
    if table := _verdicts(findings):
        blocks.append(table)
    return PageSection("Soak", tuple(blocks)) if blocks else None


def _runs(findings: Findings) -> list[int]:
    names = {name.split(".")[0] for name in findings.below("soak") if ".memory." in name}
    return sorted(number_in(run, "run") for run in names)


def _loads(findings: Findings) -> list[StepLoad]:
    loads, fullest = findings.below("soak", "load"), findings.below("soak", "fullest")
    return [
        StepLoad(number_in(step, "step"), load.value, round(fullest[step].value), load.n)
        for step, load in sorted(loads.items())
        if step in fullest
    ]


def _workload(findings: Findings) -> str:
    told = [(record, title) for what, title in WORKLOAD.items() if (record := findings.get("soak", "weather", what))]
    counts = ", ".join(f"{number(record.value, 0)} {title}" for record, title in told)
    return f"In {told[0][0].n:,} steps: {counts}." if told else ""


def _verdicts(findings: Findings) -> Table | None:
    found = findings.below("soak", "verdict")
    rows = [
        (title, "yes" if record.value else "no", record.notes)
        for what, title in SOAK_VERDICTS.items()
        if (record := found.get(what))
    ]
    peaks = [record for run in _runs(findings) if (record := findings.get("soak", f"run{run}", "peak", "memory"))]
    if peaks:
        most = max(peaks, key=lambda record: record.spread[1])
        text = f"{number(convert(most, 'MB').high)} MB of the fullest rank at its fullest moment"
        rows.append(("peak, bursts included", NONE, text))
    if not rows:
        return None
    return Table("Verdicts", ("verdict", "holds", "found"), tuple(rows), (emulation_of([*found.values(), *peaks]),), 3)
