"""Results of the demo: step times, hidden shares and their spread, from what the ranks told. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ds_moe_ep.bench.demo.plan import CANDIDATES, HIDDEN_SIZE, NUM_NODES, NUM_RANKS, NUM_TOKENS, PHASES, DemoPlan
from ds_moe_ep.bench.harness.method import Summary, summarize
from ds_moe_ep.bench.harness.processes import Finding
from ds_moe_ep.schedule.spans import Overlap, Span, overlap, span_of


@dataclass(frozen=True)
class MeasuredStep:
    """One measured step of a candidate: seconds of each pass, of the slowest rank, and the spans of all ranks."""

    name: str
    seconds: dict[str, float]
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, finding: Finding) -> MeasuredStep:
        spans = tuple(span_of(line, "demo.spans") for line in finding.text.splitlines())
        return cls(finding.kind, {phase: seconds for phase, (seconds,) in finding.samples.items()}, spans)

    def of_rank(self, rank: int) -> list[Span]:
        return [span for span in self.spans if span.rank == rank]

    def overlap(self, phase: str) -> Overlap:
        """The communication of a pass or of the step, summed over the ranks."""
        spans = [span for span in self.spans if phase in ("step", span.tags.phase)]
        parts = [overlap(span for span in spans if span.rank == rank) for rank in range(NUM_RANKS)]
        return Overlap(sum(part.total_us for part in parts), sum(part.exposed_us for part in parts))


@dataclass(frozen=True)
class Results:
    """All measured steps of one run."""

    plan: DemoPlan
    steps: tuple[MeasuredStep, ...]

    def of(self, name: str) -> list[MeasuredStep]:
        return [step for step in self.steps if step.name == name]

    def time_ms(self, name: str, phase: str = "step") -> Summary:
        return summarize([1e3 * step.seconds[phase] for step in self.of(name)])

    def hidden_percent(self, name: str, phase: str = "step") -> Summary:
        return summarize([step.overlap(phase).hidden_percent or 0.0 for step in self.of(name)])

    def speedup(self) -> Summary:
        """The serial step's time over the overlapped one's, round by round."""
        pairs = zip(self.of("serial"), self.of("overlapped"), strict=True)
        return summarize([serial.seconds["step"] / overlapped.seconds["step"] for serial, overlapped in pairs])

    def traffic_ratio(self) -> Summary:
        """The serial step's communication over the experts' emulated time, mean of the ranks."""
        compute_us = 3e3 * self.plan.compute_ms * NUM_RANKS
        return summarize([step.overlap("step").total_us / compute_us for step in self.of("serial")])

    def shown(self) -> list[MeasuredStep]:
        """The steps of one round, serial first: of that whose overlapped step is nearest to the median."""
        median_ms = self.time_ms("overlapped").median
        rounds: list[tuple[MeasuredStep, ...]] = list(zip(*map(self.of, CANDIDATES), strict=True))
        middle = min(rounds, key=lambda steps: abs(1e3 * steps[-1].seconds["step"] - median_ms))
        return list(middle)

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON has them."""
        figures = {
            name: {
                phase: {
                    "ms": asdict(self.time_ms(name, phase)),
                    "hidden_percent": asdict(self.hidden_percent(name, phase)),
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
            "sides": figures,
            "serial_over_overlapped": asdict(self.speedup()),
            "traffic_over_compute": asdict(self.traffic_ratio()),
        }


def results_of(plan: DemoPlan, findings: Sequence[Finding]) -> Results:
    """The results in what rank 0 told."""
    return Results(plan, tuple(MeasuredStep.of(finding) for finding in findings if finding.kind in CANDIDATES))
