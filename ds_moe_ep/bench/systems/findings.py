"""What the ranks of the systems benchmark told so far, and the Records that follow from it (names.py)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ds_moe_ep.bench.harness.method import summarize
from ds_moe_ep.bench.harness.processes import Finding
from ds_moe_ep.bench.layer.findings import Collected
from ds_moe_ep.bench.systems.plan import SystemsPlan
from ds_moe_ep.records.names import KINDS, PARTS
from ds_moe_ep.records.record import Record
from ds_moe_ep.schedule.spans import Span, span_of

SPREAD = "lowest and highest 5 % dropped, quartiles"
UNITS = {
    "step": "ms",
    "tps": "tokens/s",
    "tpot": "us",
    "busy": "%",
    "hidden": "%",
    "breakdown": "ms",
    "memory": "bytes",
    "loss": "nats",
    "load": "rows",
}
NOTES = {
    "step": f"slowest rank, {SPREAD}",
    "tps": f"all tokens of a step over the time of the slowest rank, {SPREAD}",
    "tpot": f"time of the slowest rank over all tokens of a step, {SPREAD}",
    "ratio": f"throughput over that of the other system in the same round, {SPREAD}",
    "hidden": f"share of the expert rows' time on the wire under which the same rank's experts computed, {SPREAD}",
    "breakdown": f"mean of the ranks, {SPREAD}",
    "memory": "fullest rank, at the kind's own fullest moment in one step",
    "loss": "cross-entropy of the step, mean of all ranks",
    "load": "rows of all ranks in the step",
}


class SystemFindings(Collected):
    """Collects findings; `records` and `spans` may be asked for at any time and cover what is complete."""

    def __init__(self, plan: SystemsPlan, command: str, commit: str, hardware: str) -> None:
        super().__init__(command, commit, hardware)
        self._plan = plan
        self.spans: list[Span] = []

    def add(self, finding: Finding) -> None:
        if finding.what != "span":
            super().add(finding)
            return
        if finding.case == self._plan.beds[0].slug:  # spans do not say where they are from: one bed a file
            self.spans.append(span_of(finding.text, finding.side))

    def records(self) -> list[Record]:
        """Every record that can be made now: bed by bed, mode by mode, system by system."""
        found: list[Record] = []
        for bed in [bed.slug for bed in self._plan.beds]:
            for mode in self._plan.modes:
                for system in self._plan.systems:
                    found += self._timed(bed, mode, system)
                    found += self._single(bed, mode, system)
            found += self._traffic(bed)
        for system in self._plan.systems:
            found += self._memory(system)
        return found

    def _timed(self, bed: str, mode: str, system: str) -> Iterator[Record]:
        seconds = self._of(bed, mode, system, "time")
        if not seconds:
            return
        name, tokens = f"system.{bed}.{mode}.{system}", self._plan.tokens_of_step
        yield self._record(f"{name}.step", [1e3 * s for s in seconds])
        yield self._record(f"{name}.tps", [tokens / s for s in seconds])
        yield self._record(f"{name}.tpot", [1e6 * s / tokens for s in seconds])
        # Columns may differ by one value, when the run was interrupted within a round.
        busy = zip(self._of(bed, mode, system, "busy"), self._of(bed, mode, system, "step"), strict=False)
        if percents := [100 * busy_s / s for busy_s, s in busy]:
            yield self._record(f"{name}.busy", percents, self._busy_note())
        for other in self._plan.systems:
            pairs = zip(seconds, self._of(bed, mode, other, "time"), strict=False)
            if other != system and (ratios := [its / mine for mine, its in pairs]):
                yield self._record(f"{name}.ratio_to_{other}", ratios, NOTES["ratio"])
        if self._plan.device != "cuda":  # its waits are not the host's: nothing would be told apart
            for part in PARTS:
                if parts := self._of(bed, mode, system, f"breakdown.{part}"):
                    yield self._record(f"{name}.breakdown.{part}", [1e3 * s for s in parts])
        traffic = [self._of(bed, mode, system, f"traffic.{what}") for what in ("exposed", "total")]
        hidden = [100 * (1 - exposed / total) for exposed, total in zip(*traffic, strict=False) if total]
        if hidden:
            yield self._record(f"{name}.hidden", hidden)

    def _busy_note(self) -> str:
        kind = {
            "emulated": "emulated compute over wall time",
            "cpu": "processor time of the rank's process over wall time",
            "cuda": "utilization.gpu of nvidia-ml-py",
        }[self._plan.device]
        return f"{kind}, mean of the ranks, {SPREAD}"

    def _single(self, bed: str, mode: str, system: str) -> Iterator[Record]:
        """Losses and loads, a record a step."""
        if mode == "training" and not self._plan.is_emulated:
            for (case, side, what), values in self._values.items():
                if (case, side) == (f"{bed}.{mode}", system) and what.startswith(("loss.", "load.")):
                    yield self._record(f"system.{case}.{system}.{what}", values)

    def _traffic(self, bed: str) -> Iterator[Record]:
        """How EP16's blocking exchanges compare with its emulated compute: what the bed was shaped for."""
        total_s = self._of(bed, "training", "ep16_serial", "traffic.total")
        rate = next(b.rate_mbit for b in self._plan.beds if b.slug == bed)
        if not self._plan.is_emulated or not total_s:
            return
        ratios = [s / self._plan.step_compute_s for s in total_s]
        note = "time of the serial system's exchanges of a training step over the emulated compute of the step"
        yield self._record(f"system.{bed}.traffic.ratio", ratios, note)
        yield self._record(f"system.{bed}.traffic.compute", [1e3 * self._plan.step_compute_s], "as emulated", "ms")
        if rate is not None:
            yield self._record(f"system.{bed}.traffic.link", [rate], "of every node's link, as shaped", "Mbit/s")

    def _memory(self, system: str) -> Iterator[Record]:
        for kind in KINDS:
            values = self._values.get(("memory.training", system, f"memory.{kind}"), [])
            if values:
                yield self._record(f"system.loopback.training.{system}.memory.{kind}", values)

    def _of(self, bed: str, mode: str, system: str, what: str) -> list[float]:
        return self._values.get((f"{bed}.{mode}", system, what), [])

    def _record(self, name: str, values: Sequence[float], notes: str = "", unit: str = "") -> Record:
        summary = summarize(values)
        kind = next((part for part in name.split(".")[4:] if part in UNITS), "")
        is_emulated = self._plan.is_emulated
        return Record(
            name=name,
            value=summary.median,
            unit=unit or UNITS.get(kind, "ratio"),
            spread=(summary.low, summary.high),
            n=summary.n,
            emulated=is_emulated or self._plan.testbed is not None,
            notes=("emulated device; " if is_emulated else "") + (notes or NOTES[kind]),
            **self._source,
        )
