"""Results of the demo: step times, hidden shares and their spread, from what the ranks told. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ds_moe_ep.bench.demo.plan import CANDIDATES, HIDDEN_SIZE, NUM_NODES, NUM_RANKS, NUM_TOKENS, PHASES, DemoPlan
from ds_moe_ep.bench.harness.collector import Collector, DerivedSamples, Metric, ratios
from ds_moe_ep.bench.harness.processes import Finding
from ds_moe_ep.records.quantity import Quantity
from ds_moe_ep.schedule.spans import Overlap, Span, line_of, overlap, span_of

UNITS = {"time": "ms", "hidden": "percent", "speedup": "ratio", "traffic_ratio": "ratio"}
SPEEDUP, TRAFFIC_RATIO = "step.speedup", "step.traffic_ratio"


@dataclass(frozen=True)
class MeasuredStep:
    """One measured step of a candidate: seconds of each pass, of the slowest rank, and the spans of all ranks."""

    name: str
    seconds: dict[str, float]
    spans: tuple[Span, ...]

    def finding(self) -> Finding:
        """The step as a rank tells it: its spans in lines, and its samples by name."""
        return Finding(self.name, "\n".join(map(line_of, self.spans)), dict(self._samples()))

    def _samples(self) -> Iterator[tuple[str, tuple[float, ...]]]:
        for phase in PHASES:
            yield f"{self.name}.{phase}.time", (1e3 * self.seconds[phase],)
            yield f"{self.name}.{phase}.hidden", (self._communication(phase).hidden_percent or 0.0,)
        yield f"{self.name}.communication", (self._communication("step").total_us,)

    def _communication(self, phase: str) -> Overlap:
        """The communication of a pass or of the step, summed over the ranks."""
        spans = [span for span in self.spans if phase in ("step", span.tags.phase)]
        parts = [overlap(span for span in spans if span.rank == rank) for rank in range(NUM_RANKS)]
        return Overlap(sum(part.total_us for part in parts), sum(part.exposed_us for part in parts))


def metric(name: str) -> Metric | None:
    """The Metric of a name's last part; None for an ingredient of others."""
    unit = UNITS.get(name.rsplit(".", 1)[-1])
    return Metric(unit, "emulated experts and link", is_emulated=True) if unit else None


class Results:
    """All measured steps of one run."""

    def __init__(self, plan: DemoPlan, findings: Iterable[Finding]) -> None:
        self.plan = plan
        self._found = Collector(None, metric, self._derive)
        for finding in findings:
            self._found.add(finding)
        self._quantities = {quantity.name: quantity for quantity in self._found.quantities()}

    def _derive(self, found: Collector) -> Iterator[DerivedSamples]:
        """The serial step's time over the overlapped one's; its communication over the experts' emulated time."""
        yield DerivedSamples(SPEEDUP, ratios(*(found.of(f"{name}.step.time") for name in CANDIDATES)))
        compute_us = 3e3 * self.plan.compute_ms * NUM_RANKS
        yield DerivedSamples(TRAFFIC_RATIO, [us / compute_us for us in found.of("serial.communication")])

    def __getitem__(self, name: str) -> Quantity:
        """A number by its name, like `overlapped.step.hidden`: median and quartiles."""
        return self._quantities[name]

    def shown(self) -> dict[str, list[Span]]:
        """The spans of all ranks in one round by candidate: of that whose overlapped step is nearest to the median."""
        times_ms = self._found.of("overlapped.step.time")
        median_ms = self["overlapped.step.time"].value
        middle = min(range(len(times_ms)), key=lambda index: abs(times_ms[index] - median_ms))
        return {name: _spans(self._found.texts[name][middle]) for name in CANDIDATES}

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON has them."""
        sides = {
            name: {
                phase: {
                    "ms": _values(self[f"{name}.{phase}.time"]),
                    "hidden_percent": _values(self[f"{name}.{phase}.hidden"]),
                }
                for phase in PHASES
            }
            for name in CANDIDATES
        }
        return {
            "emulated": True,
            "what_is_emulated": "the experts' time and the pace of the link between nodes",
            "ranks": NUM_RANKS,
            "nodes": NUM_NODES,
            "tokens_per_rank": NUM_TOKENS,
            "hidden_size": HIDDEN_SIZE,
            "link_bytes_per_s": self.plan.bytes_per_s,
            "forward_compute_ms": self.plan.compute_ms,
            "rounds": self.plan.rounds,
            "schedules": {name: dict(knobs) for name, knobs in CANDIDATES.items()},
            "sides": sides,
            "serial_over_overlapped": _values(self[SPEEDUP]),
            "traffic_over_compute": _values(self[TRAFFIC_RATIO]),
        }


def _spans(text: str) -> list[Span]:
    return [span_of(line, "demo.spans") for line in text.splitlines()]


def _values(quantity: Quantity) -> dict[str, float]:
    return {"median": quantity.value, "low": quantity.low, "high": quantity.high, "n": quantity.n}
