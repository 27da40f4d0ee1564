"""Units and notes of the systems benchmark's samples, the ratios that follow, and its tables (records/names.py)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ds_moe_ep.bench.harness.collector import Collector, DerivedSamples, Metric, ratios
from ds_moe_ep.bench.systems.plan import SystemsPlan
from ds_moe_ep.records.names import BASELINE, MODES, SYSTEMS, environment_title
from ds_moe_ep.records.quantity import cell
from ds_moe_ep.records.record import Record
from ds_moe_ep.records.table import Table, table

SPREAD = "lowest and highest 5 % dropped, quartiles"
BUSY = {
    "emulated": "emulated compute over wall time",
    "cpu": "processor time of the rank's process over wall time",
    "cuda": "utilization.gpu of nvidia-ml-py",
}
METRICS = {
    "step": ("ms", f"slowest rank, {SPREAD}"),
    "tps": ("tokens/s", f"all tokens of a step over the time of the slowest rank, {SPREAD}"),
    "tpot": ("us", f"time of the slowest rank over all tokens of a step, {SPREAD}"),
    "busy": ("%", f"{{busy}}, mean of the ranks, {SPREAD}"),
    "hidden": (
        "%",
        f"share of the expert rows' time on the wire under which the same rank's experts computed, {SPREAD}",
    ),
    "breakdown": ("ms", f"mean of the ranks, {SPREAD}"),
    "memory": ("bytes", "fullest rank, at the part's own fullest moment in one step"),
    "loss": ("nats", "cross-entropy of the step, mean of all ranks"),
    "load": ("rows", "rows of all ranks in the step"),
}
RATIO = ("ratio", f"throughput over that of the other system in the same round, {SPREAD}")
TRAFFIC = {
    "ratio": (
        "ratio",
        "time of the serial system's exchanges of a training step over the emulated compute of the step",
    ),
    "compute": ("ms", "as emulated"),
    "link": ("Mbit/s", "of every node's link, as shaped"),
}
COLUMNS = (
    ("step, ms", "step", "ms", 0),
    ("tokens/s", "tps", "tokens/s", 0),
    ("us/token", "tpot", "us", 1),
    ("busy, %", "busy", "percent", 0),
    (f"{SYSTEMS[BASELINE]} = 1", f"ratio_to_{BASELINE}", "ratio", 2),
    ("serial = 1", "ratio_to_ep16_serial", "ratio", 2),
    ("native = 1", "ratio_to_native_ep16", "ratio", 2),
    ("AutoEP = 1", "ratio_to_autoep_ep16", "ratio", 2),
    ("hidden, %", "hidden", "percent", 0),
)


def metric(plan: SystemsPlan, name: str) -> Metric | None:
    """The Metric of what a name says behind the system, or behind "traffic"."""
    parts = name.split(".")
    if parts[-1] == "mean_step":
        return None
    unit, note = TRAFFIC[parts[3]] if parts[2] == "traffic" else METRICS.get(parts[4], RATIO)
    note = note.format(busy=BUSY[plan.device])
    note = f"emulated device; {note}" if plan.is_emulated else note
    return Metric(unit, note, is_emulated=plan.is_emulated or plan.testbed is not None)


def derive(plan: SystemsPlan, found: Collector) -> Iterator[DerivedSamples]:
    """Throughput over that of each other system, and what the links were shaped for."""
    for environment in plan.environments:
        for mode in plan.modes:
            prefixes = {name: plan.prefix(environment.name, mode, name) for name in plan.systems}
            steps = {name: its_ms for name, of in prefixes.items() if (its_ms := found.of(f"{of}.step"))}
            for name, mine_ms in steps.items():
                for other, its_ms in steps.items():
                    if name != other:
                        yield DerivedSamples(f"{prefixes[name]}.ratio_to_{other}", ratios(its_ms, mine_ms))
        if found.of(f"system.{environment.name}.traffic.ratio"):
            yield DerivedSamples(f"system.{environment.name}.traffic.compute", [1e3 * plan.step_compute_s])
            if environment.rate_mbit is not None:
                yield DerivedSamples(f"system.{environment.name}.traffic.link", [environment.rate_mbit])


def summary_tables(records: Iterable[Record]) -> Iterator[Table]:
    """A table per environment and mode: throughput of each system, and how many times that of the others it is."""
    found: dict[tuple[str, str], dict[str, dict[str, Record]]] = {}
    for record in records:
        kind, environment, mode, system, *what = record.name.split(".")
        if kind == "system" and mode in MODES and len(what) == 1:
            found.setdefault((environment, mode), {}).setdefault(system, {})[what[0]] = record
    for (environment, mode), systems in found.items():
        title = f"{environment_title(environment)}, {MODES[mode]}: median (quartiles); higher ratios are faster"
        rows = (
            (SYSTEMS[system], *(cell(cells.get(what), unit, decimals, bar=True) for _, what, unit, decimals in COLUMNS))
            for system, cells in systems.items()
        )
        yield table(title, ("system", *(title for title, *_ in COLUMNS)), rows)
