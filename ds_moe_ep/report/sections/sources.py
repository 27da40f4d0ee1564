"""The page's head and its end: what was measured on what, and how to measure it again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ds_moe_ep.records.names import SIMULATED, SYSTEMS, TOTALS, environment_title
from ds_moe_ep.records.table import Table
from ds_moe_ep.report.findings import Findings
from ds_moe_ep.report.page import EMULATED, REAL, Block, Code, Lines, PageSection, Prose, emulation_of

MAX_LINES = 12
ALL_EMULATED = "Emulated: a device or a link was simulated or shaped."
MEANING = "Emulated means that a device or a link was simulated or shaped."


def head(findings: Findings, absent: Sequence[str]) -> PageSection:
    """Systems, environments, hardware and revision of what was measured; emulated or not; sections without Records."""
    records = list(findings.by_name.values())
    measured = [name for name in findings.by_name if not name.startswith(f"layouts.{SIMULATED}")]
    named = {system for system in SYSTEMS for name in measured if f".{system}." in name}
    systems = ", ".join(title for system, title in SYSTEMS.items() if system in named)
    environments = "; ".join(map(environment_title, findings.environments))
    totals = ", ".join(title for total, title in TOTALS.items() if findings.below("scaling", total))
    items = [f"Systems: {systems}." if systems else "", f"Environments: {environments}." if environments else ""]
    items += [f"Scaling with {totals}." if totals else ""]
    items += [f"Hardware: {hardware}." for hardware in _first(_unique(record.hardware for record in records))]
    commits = _unique(record.commit for record in records)
    items += [f"Revision of the sources: {', '.join(f'`{commit}`' for commit in commits)}." if commits else ""]
    emulation = emulation_of(records)
    items.append(ALL_EMULATED if emulation == EMULATED else REAL if emulation == REAL else f"{emulation} {MEANING}")
    items += [f"Absent for lack of Records: {'; '.join(absent)}."] if absent else []
    if findings.num_others:
        items.append(f"{findings.num_others} other records were not used.")
    if findings.num_replaced:
        items.append(f"{findings.num_replaced} records were replaced by later ones of the same name.")
    return PageSection("What was measured", (Lines(tuple(filter(None, items))),))


def sources(findings: Findings) -> PageSection:
    """The files of Records and the commands that write them again."""
    rows = [
        (source.path.name, f"{len(source.records):,}", f"{len(source.known):,}", f"{len(source.spans):,}")
        for source in findings.sources
    ]
    files = Table("Files", ("file", "records", "used", "spans"), tuple(rows))
    commands = _unique(record.command for record in findings.by_name.values())
    blocks: list[Block] = [files]
    if commands:
        blocks += [Prose("To measure the same again:"), Code(tuple(commands))]
    return PageSection("Records and commands", tuple(blocks))


def _unique(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _first(texts: Sequence[str]) -> list[str]:
    left = len(texts) - MAX_LINES
    return [*texts[:MAX_LINES], *([f"and {left} more"] if left > 0 else [])]
