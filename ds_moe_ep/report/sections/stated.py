"""The section that answers the specification: stated, derived, measured here, simulated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from ds_moe_ep.records.names import KINDS, LAWS, MODES, PARTS, SIMULATED, TOTALS
from ds_moe_ep.records.quantity import NONE, convert, number
from ds_moe_ep.records.record import Record
from ds_moe_ep.records.table import Table
from ds_moe_ep.report.findings import Findings
from ds_moe_ep.report.known_names import short_environment
from ds_moe_ep.report.page import PageSection, Prose, emulation_of
from ds_moe_ep.report.sections.scaling import r2_of
from ds_moe_ep.specification.claims import RATIO, stated_and_derived
from ds_moe_ep.specification.laws import r2_text

NOT_MEASURED = "not measured"

Found = tuple[str, str, Sequence[Record]]  # where, what was measured there, and the Records that say so
Answer = Callable[[Findings], Iterator[Found]]


def stated(findings: Findings) -> PageSection | None:
    """The specification's figures beside what follows from its shapes, what was measured and what was simulated."""
    used: list[Record] = []
    rows: list[tuple[str, ...]] = []
    for figure in stated_and_derived():
        answer = ANSWERS.get(figure.name)
        found = list(answer(findings)) if answer else []
        used += [record for *_, records in found for record in records]
        simulated = [its for its in found if any(map(_is_simulated, its[-1]))]
        measured = [its for its in found if its not in simulated]
        here = (_told(measured) or NOT_MEASURED, _told(simulated) or NONE)
        rows.append((figure.name, figure.stated, figure.derived, *here, figure.verdict))
    if not used:
        return None
    explained = Prose(
        "Derived is what the specification's own shapes and links imply on its hardware. Measured is what was reached "
        "on the hardware named above, which need not be the specification's: compare ratios and shares. Values are of "
        "training where it was measured, and of forward passes elsewhere; of pieces, those that are not 0."
    )
    head: tuple[str, ...] = ("figure", "stated", "derived", "measured here", "simulated", "remarks")
    if not any(map(_is_simulated, used)):
        head, rows = (*head[:4], *head[5:]), [(*row[:4], *row[5:]) for row in rows]
    return PageSection(
        "The specification's figures", (explained, Table("", head, tuple(rows), (emulation_of(used),), len(head)))
    )


def _is_simulated(record: Record) -> bool:
    return record.name.split(".")[1].startswith(SIMULATED)


def _told(found: Sequence[Found]) -> str:
    """A line for each answer, with the places where it was the same; nothing where there is none."""
    places_of: dict[str, list[str]] = {}
    for place, text, _ in found:
        places_of.setdefault(text, []).append(place)
    return "\n".join(f"{', '.join(places)}: {text}" for text, places in places_of.items())


def _values(systems: Sequence[str], whats: Mapping[str, str], unit: str, end: str = "") -> Answer:
    """A line per environment that has all of these Records of these systems, with their titles where there are some."""

    def answer(findings: Findings) -> Iterator[Found]:
        for environment in findings.environments:
            for mode in MODES:
                of_systems = [_some(findings, environment, mode, system, whats) for system in systems]
                if all(of_systems):
                    texts = [_listed(of_system, whats, unit) for of_system in of_systems]
                    records = [record for of_system in of_systems for record in of_system.values()]
                    yield short_environment(environment), f"{' and '.join(texts)}{end}", records
                    break

    return answer


def _some(findings: Findings, environment: str, mode: str, system: str, whats: Mapping[str, str]) -> dict[str, Record]:
    found = {what: findings.get("system", environment, mode, system, what) for what in whats}
    return {what: record for what, record in found.items() if record is not None}


def _listed(records: Mapping[str, Record], titles: Mapping[str, str], unit: str) -> str:
    """Values with their titles; of several values those that are not 0 in this unit."""
    values = {what: convert(record, unit).value for what, record in records.items()}
    return "; ".join(
        f"{titles[what]} {number(value)}".strip()
        for what, value in values.items()
        if abs(value) >= 0.001 or len(values) == 1
    )


def _fit(law: str) -> Answer:
    def answer(findings: Findings) -> Iterator[Found]:
        for total, title in TOTALS.items():
            record = r2_of(findings, total, law)
            if record is not None:
                yield title, r2_text(record.value), [record]
        for environment in findings.swept:
            for total, title in TOTALS.items():
                record = findings.get("sweep", environment, total, "fit", law, "r2")
                if record is not None:
                    yield f"{short_environment(environment)}, {title}", r2_text(record.value), [record]

    return answer


def _of_devices(answer: Answer) -> Answer:
    """The answer without what was measured on a CPU that ranks share: its busy share tells of the machine."""

    def of_devices(findings: Findings) -> Iterator[Found]:
        for place, text, records in answer(findings):
            if not any("processor time" in record.notes for record in records):
                yield place, text, records

    return of_devices


def _under(what: str, titles: Mapping[str, str]) -> dict[str, str]:
    return {f"{what}.{name}": title for name, title in titles.items()}


BOTH = ("tp8_pp2", "ep16")
ANSWERS: Mapping[str, Answer] = {
    "memory of a GPU, EP16": _values(["ep16"], _under("memory", KINDS), "MB", " MB"),
    "memory of a GPU, TP8/PP2": _values(["tp8_pp2"], _under("memory", KINDS), "MB", " MB"),
    "distribution of tokens": _values(
        ["ep16_serial"], {"breakdown.experts_traffic": ""}, "ms", " ms of a step, blocking"
    ),
    "expert computation": _values(["ep16"], {"breakdown.compute": ""}, "ms", " ms of a step, all compute"),
    "communication hidden": _values(["ep16"], {"hidden": ""}, "percent", " %"),
    "tokens per second, TP8/PP2 and EP16": _values(BOTH, {"tps": ""}, "tokens/s"),
    RATIO: _values(["ep16"], {"ratio_to_tp8_pp2": ""}, "ratio"),
    "time per token (TPOT)": _values(BOTH, {"tpot": ""}, "us", " \u00b5s"),
    "latency pieces, EP16": _values(["ep16"], _under("breakdown", PARTS), "ms", " ms of a step"),
    "gain in GPU efficiency": _of_devices(_values(BOTH, {"busy": ""}, "percent", " % busy")),
    "pipeline bubble, 2 stages, 4 micro-batches": _values(
        ["tp8_pp2"], {"breakdown.pipeline": "waiting", "step": "step"}, "ms", " ms"
    ),
    **{f"R\u00b2 of {title}": _fit(law) for law, title in LAWS.items()},
}
