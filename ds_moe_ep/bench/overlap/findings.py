"""What the ranks of the overlap benchmark told so far, the Records that follow from it, and the tables for README."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from ds_moe_ep.bench.harness.method import summarize
from ds_moe_ep.bench.layer.findings import Collected
from ds_moe_ep.bench.overlap.ranks import PHASES, OverlapPlan
from ds_moe_ep.records.record import Record
from ds_moe_ep.schedule.shaping import COMPUTES, WIRE, link_rate

SPREAD = "lowest and highest 5 % dropped (from 20 rounds on), quartiles"
NOTES = {
    "time": f"slowest rank, {SPREAD}",
    "to_serial": f"ratio to serial in the same round, {SPREAD}",
    "to_native": f"ratio to DeepSpeed's native layer in the same round, {SPREAD}",
    "hidden": f"share of the transfers' time under which the same rank computed, mean of the ranks, {SPREAD}",
    "traffic": f"time of the exchanges alone: serial with experts that take no time, {SPREAD}",
    "over_limit": "time over a limit that was measured in the same run: with emulated devices max(compute, traffic "
    f"alone), with real ones the serial layer with experts that take no time, {SPREAD}",
    "traffic_ratio": f"time of the exchanges alone over the emulated compute, {SPREAD}",
}
UNITS = {"time": "ms", "hidden": "%", "traffic": "ms"}


def exchange_bytes(plan: OverlapPlan) -> float:
    """Bytes of rows that leave a node in one exchange, for even routing."""
    rows = plan.case.num_rows * plan.ranks_per_node * (plan.num_nodes - 1) / plan.num_nodes
    return rows * plan.case.hidden_size * 4


def compute_ms(plan: OverlapPlan, phase: str) -> float:
    """What emulated experts take for the mean rows of a rank."""
    return COMPUTES[phase] * plan.case.num_rows * plan.row_us / 1e3


def link_mbit(plan: OverlapPlan, ratio: float, phase: str) -> float:
    """The link over which the traffic of `phase` takes `ratio` times its emulated compute."""
    return 8 * link_rate(ratio, phase, exchange_bytes(plan), 1e3 * compute_ms(plan, "forward"))


class OverlapFindings(Collected):
    """Collects findings; `records` may be asked for at any time and covers what is complete."""

    def __init__(self, plan: OverlapPlan, command: str, commit: str, hardware: str) -> None:
        super().__init__(command, commit, hardware)
        self._plan = plan

    def records(self) -> list[Record]:
        """Every record that can be made now, shaping by shaping and side by side."""
        return [
            record
            for shaping in self._plan.shapings
            for side in self._plan.sides
            for phase in PHASES
            for record in self._records_of(shaping.name, side, phase)
        ]

    def _records_of(self, shaping: str, side: str, phase: str) -> Iterator[Record]:
        seconds = self._of(shaping, side, phase)
        if not seconds:
            return
        name = f"overlap.{self._plan.device}.{shaping}.{side}.{phase}"
        if side == WIRE:
            traffic_ms = [1e3 * s for s in self._of(shaping, side, f"{phase}.total")]
            yield self._record(f"{name}.traffic", traffic_ms)
            if self._plan.device == "emulated":
                ratios = [ms / compute_ms(self._plan, phase) for ms in traffic_ms]
                yield self._record(f"{name}.traffic_ratio", ratios)
        yield self._record(f"{name}.time", [1e3 * s for s in seconds])
        for base in ("serial", "native"):
            if side != base and (theirs := self._of(shaping, base, phase)):
                pairs = zip(seconds, theirs, strict=False)
                yield self._record(f"{name}.to_{base}", [mine / its for mine, its in pairs])
        if side == WIRE:
            return
        both = list(zip(*(self._of(shaping, side, f"{phase}.{what}") for what in ("exposed", "total")), strict=False))
        if both:
            yield self._record(f"{name}.hidden", [100 * (1 - exposed / total) for exposed, total in both if total])
        if limit_ms := self._limit_ms(shaping, phase):
            yield self._record(f"{name}.over_limit", [1e3 * s / limit_ms for s in seconds])

    def _limit_ms(self, shaping: str, phase: str) -> float:
        """What the step is compared with, measured in the same run; 0 where it was not."""
        if self._plan.device == "emulated":
            wire = self._of(shaping, WIRE, f"{phase}.total")
            return max(compute_ms(self._plan, phase), 1e3 * summarize(wire).median) if wire else 0.0
        wire = self._of(shaping, WIRE, phase)
        return 1e3 * summarize(wire).median if wire else 0.0

    def _of(self, shaping: str, side: str, what: str) -> list[float]:
        return self._values.get((shaping, side, what), [])

    def _record(self, name: str, values: Sequence[float]) -> Record:
        summary, what = summarize(values), name.rsplit(".", 1)[1]
        is_emulated = self._plan.device == "emulated"
        return Record(
            name=name,
            value=summary.median,
            unit=UNITS.get(what, "ratio"),
            spread=(summary.low, summary.high),
            n=summary.n,
            emulated=is_emulated or self._plan.bed is not None,
            notes=("emulated device; " if is_emulated else "") + NOTES[what],
            **self._source,
        )


def markdown_tables(records: Iterable[Record]) -> str:
    """A table a shaping: a row a side, times and hidden shares of each pass."""
    found: dict[str, dict[str, dict[str, Record]]] = {}
    for record in records:
        _, _, rest = record.name.split(".", 2)
        shaping, side, phase, what = rest.rsplit(".", 3)
        found.setdefault(shaping, {}).setdefault(side, {})[f"{phase}.{what}"] = record
    return "\n\n".join(_table(shaping, sides) for shaping, sides in found.items())


def _table(shaping: str, sides: dict[str, dict[str, Record]]) -> str:
    columns = ("forward", "backward", "step", "step, serial = 1", "step, native = 1", "step, limit = 1", "hidden, %")
    lines = [f"| {shaping} | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for side, cells in sides.items():
        if side == WIRE:
            for label, what, digits in (("traffic alone", "traffic", 0), ("traffic / compute", "traffic_ratio", 2)):
                found = [_cell(cells.get(f"{phase}.{what}"), digits) for phase in PHASES]
                if found != ["-"] * len(PHASES):
                    lines.append(f"| {label} | " + " | ".join([*found, *["-"] * 4]) + " |")
        times = [_cell(cells.get(f"{phase}.time"), 0) for phase in PHASES]
        ratios = [_cell(cells.get(f"step.{what}"), 2) for what in ("to_serial", "to_native", "over_limit")]
        hidden = " / ".join(_cell(cells.get(f"{phase}.hidden"), 0, spread=False) for phase in PHASES)
        lines.append(
            f"| {'experts of no time' if side == WIRE else side} | " + " | ".join([*times, *ratios, hidden]) + " |"
        )
    return "\n".join(lines)


def _cell(record: Record | None, digits: int, spread: bool = True) -> str:
    if record is None:
        return "-"
    text = f"{record.value:.{digits}f}"
    return f"{text} ({record.spread[0]:.{digits}f}-{record.spread[1]:.{digits}f})" if spread else text
