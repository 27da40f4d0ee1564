"""The page's headline: at most three sentences on what the Records come to, each of numbers that are in Records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from ds_moe_ep.records.names import (
    BASELINE,
    DEVICES,
    LAWS,
    MODES,
    SIDES,
    SIMULATED,
    SOAK_VERDICTS,
    SYSTEMS,
    TOTALS,
    environment_title,
)
from ds_moe_ep.records.quantity import TIMES, cell, convert, number
from ds_moe_ep.records.record import Record
from ds_moe_ep.report.findings import Findings
from ds_moe_ep.report.known_names import number_in

OURS, SERIAL, NATIVE = "ep16", "ep16_serial", "native_ep16"
MOST = 3
VERBS = {"training": "trains", "forward": "passes forward"}
FIRST_ENVIRONMENTS = ("cluster", "traffic", SIMULATED, "unshaped", "loopback")  # those with links before those without


def headline(findings: Findings) -> tuple[str, ...]:
    """The first sentences that the Records have numbers for, from the gain of whole systems to the soak's verdicts."""
    schedules = [partial(_schedules, device) for device in DEVICES]
    tellers: Sequence[Callable[[Findings], str]] = (_gain, _hidden, _laws, *schedules, _losses, _simulated, _soak)
    return tuple(sentence for tell in tellers if (sentence := tell(findings)))[:MOST]


def _gain(findings: Findings) -> str:
    """The throughput over the baseline, and over DeepSpeed's own layer."""
    place = _first_place(findings, f"ratio_to_{BASELINE}")
    if place is None:
        return ""
    over = [
        f"{_ratio(record)} as fast as {SYSTEMS[other]}"
        for other in (BASELINE, NATIVE)
        if (record := findings.get("system", *place, OURS, f"ratio_to_{other}"))
    ]
    return f"{SYSTEMS[OURS]} {VERBS[place[1]]} {' and '.join(over)} ({_where(findings, *place)})."


def _hidden(findings: Findings) -> str:
    """The share of traffic behind compute, and the speed that this brings."""
    place = _first_place(findings, "hidden")
    if place is None:
        return ""
    hidden = findings.get("system", *place, OURS, "hidden")
    gain = findings.get("system", *place, OURS, f"ratio_to_{SERIAL}")
    told = f"{SYSTEMS[OURS]} hides {cell(hidden, 'percent')} % of the experts' traffic behind compute"
    told += f", which makes it {_ratio(gain)} as fast as {SYSTEMS[SERIAL]}" if gain else ""
    return f"{told} ({_where(findings, *place)})."


def _laws(findings: Findings) -> str:
    """The scaling laws that fit what was measured, and those that do not."""
    for total, title in TOTALS.items():
        fits = {law: record for law in LAWS if (record := findings.get("scaling", total, "fit", law, "r2"))}
        if fits:
            good = [f"{LAWS[law]} (R\u00b2 {number(fit.value)})" for law, fit in fits.items() if fit.value >= 0]
            bad = [f"{LAWS[law]} does not fit" for law, fit in fits.items() if fit.value < 0]
            told = [f"what was measured follows {_listed(good)}" if good else "", _listed(bad)]
            return f"With {title}, {'; '.join(filter(None, told))}."
    return ""


def _schedules(device: str, findings: Findings) -> str:
    """One layer under the first of the schedules that hide: its speed over serial and what it hides, over the links."""
    below = findings.below("overlap", device)
    for side in (side for side in SIDES if side not in ("serial", "wire")):
        times = {name: record for name, record in below.items() if name.endswith(f".{side}.step.time")}
        pairs = [(below.get(name.replace(f".{side}.", ".serial.")), record) for name, record in times.items()]
        gains = [serial.value / record.value for serial, record in pairs if serial]
        if gains:
            hidden = [convert(below[name], "percent").value for name in below if name.endswith(f".{side}.step.hidden")]
            told = f", and hides {_range(hidden)} % of its transfers" if hidden else ""
            links = f"{len(gains)} links" if len(gains) > 1 else "one link"
            layer = f"One layer on {DEVICES[device]}, with the schedule {side}"
            return f"{layer}, is {_range(gains)} {TIMES} as fast as serial over {links}{told}."
    return ""


def _range(values: Sequence[float]) -> str:
    """The least and the most: 1.2 to 1.5."""
    return " to ".join(dict.fromkeys((number(min(values)), number(max(values)))))


def _losses(findings: Findings) -> str:
    """The spread of the systems' losses at the last step that all of them have."""
    for environment in findings.environments:
        losses = {system: findings.below("system", environment, "training", system, "loss") for system in SYSTEMS}
        runs = [records for records in losses.values() if records]
        common = set.intersection(*map(set, runs)) if len(runs) > 1 else set()
        if common:
            last = max(common, key=lambda step: number_in(step, "step"))
            ends = [convert(records[last], "loss").value for records in runs]
            told = f"lie within {number(max(ends) - min(ends))} of each other after {number_in(last, 'step')} steps"
            return f"The losses of {len(runs)} systems {told}, at {number(min(ends))} to {number(max(ends))}."
    return ""


def _simulated(findings: Findings) -> str:
    """Throughput over the simulated sizes."""
    for environment in findings.swept:
        for total in TOTALS:
            points: dict[int, Record] = {}
            for name, record in findings.below("sweep", environment, total).items():
                parts = name.split(".")
                if parts[0].startswith("ep") and parts[1:] == ["dp1", "tps"]:
                    points[number_in(parts[0], "ep")] = record
            if len(points) > 1:
                least, most = min(points), max(points)
                ends = [f"{cell(points[ep], 'tokens/s')} tokens/s at EP={ep}" for ep in (least, most)]
                return (
                    f"Throughput goes from {' to '.join(ends)} with {TOTALS[total]} ({environment_title(environment)})."
                )
    return ""


def _soak(findings: Findings) -> str:
    """The soak's verdicts that hold, and those that do not."""
    found = findings.below("soak", "verdict")
    if not found:
        return ""
    failed = [title for what, title in SOAK_VERDICTS.items() if what in found and not found[what].value]
    told = f"{len(found) - len(failed)} of the soak's {len(found)} verdicts hold"
    return f"{told}; {_listed(failed)}: not so." if failed else f"{told}."


def _first_place(findings: Findings, what: str) -> tuple[str, str] | None:
    """The environment and mode for a headline: links before none, training before forward passes."""
    places = [
        (environment, mode)
        for environment, mode in findings.places(what)
        if findings.get("system", environment, mode, OURS, what)
    ]
    return min(places, key=lambda place: (_rank(place[0]), list(MODES).index(place[1])), default=None)


def _rank(environment: str) -> int:
    return next(place for place, start in enumerate(FIRST_ENVIRONMENTS) if environment.startswith(start))


def _where(findings: Findings, environment: str, mode: str) -> str:
    record = next(iter(findings.below("system", environment, mode, OURS).values()))
    return environment_title(environment) + (
        "; emulated" if record.emulated and not environment.startswith(SIMULATED) else ""
    )


def _ratio(record: Record) -> str:
    return f"{cell(record, 'ratio')} {TIMES}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
