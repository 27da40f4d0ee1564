"""What the demo found: step times, hidden shares and their spread, from what the ranks told. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ds_moe_ep.bench.demo.plan import HIDDEN_SIZE, NUM_NODES, NUM_RANKS, NUM_TOKENS, PHASES, SIDES, DemoPlan
from ds_moe_ep.bench.harness.method import Summary, summarize
from ds_moe_ep.bench.harness.processes import Finding
from ds_moe_ep.schedule.spans import Overlap, Span, overlap, span_of


@dataclass(frozen=True)
class MeasuredRound:
    """One measured step of one side: seconds of each pass, of the slowest rank, and the spans of all ranks."""

    side: str
    seconds: dict[str, float]
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, finding: Finding) -> MeasuredRound:
        spans = tuple(span_of(line, "demo.spans") for line in finding.text.splitlines())
        return cls(finding.side, dict(zip(PHASES, finding.values, strict=True)), spans)

    def of_rank(self, rank: int) -> list[Span]:
        return [span for span in self.spans if span.rank == rank]

    def overlap(self, phase: str) -> Overlap:
        """The communication of a pass or of the step, summed over the ranks."""
        spans = [span for span in self.spans if phase in ("step", span.tags.phase)]
        parts = [overlap(span for span in spans if span.rank == rank) for rank in range(NUM_RANKS)]
        return Overlap(sum(part.total_us for part in parts), sum(part.exposed_us for part in parts))


@dataclass(frozen=True)
class Results:
    """All measured turns of one run."""

    plan: DemoPlan
    turns: tuple[MeasuredRound, ...]

    def of_side(self, side: str) -> list[MeasuredRound]:
        return [turn for turn in self.turns if turn.side == side]

    def time_ms(self, side: str, phase: str = "step") -> Summary:
        return summarize([1e3 * turn.seconds[phase] for turn in self.of_side(side)])

    def hidden_percent(self, side: str, phase: str = "step") -> Summary:
        return summarize([turn.overlap(phase).hidden_percent or 0.0 for turn in self.of_side(side)])

    def speedup(self) -> Summary:
        """The serial step's time over the overlapped one's, round by round."""
        pairs = zip(self.of_side("serial"), self.of_side("overlapped"), strict=True)
        return summarize([serial.seconds["step"] / overlapped.seconds["step"] for serial, overlapped in pairs])

    def traffic_ratio(self) -> Summary:
        """The serial step's communication over the experts' emulated time, mean of the ranks."""
        compute_us = 3e3 * self.plan.compute_ms * NUM_RANKS
        return summarize([turn.overlap("step").total_us / compute_us for turn in self.of_side("serial")])

    def shown(self) -> list[MeasuredRound]:
        """The turns of one round, serial first: of that whose overlapped step is nearest to the median."""
        median_ms = self.time_ms("overlapped").median
        rounds: list[tuple[MeasuredRound, ...]] = list(zip(*map(self.of_side, SIDES), strict=True))
        middle = min(rounds, key=lambda turns: abs(1e3 * turns[-1].seconds["step"] - median_ms))
        return list(middle)

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON has them."""
        sides = {
            side: {
                phase: {
                    "ms": asdict(self.time_ms(side, phase)),
                    "hidden_percent": asdict(self.hidden_percent(side, phase)),
                }
                for phase in PHASES
            }
            for side in SIDES
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
            "schedules": {side: dict(knobs) for side, knobs in SIDES.items()},
            "sides": sides,
            "serial_over_overlapped": asdict(self.speedup()),
            "traffic_over_compute": asdict(self.traffic_ratio()),
        }


def results_of(plan: DemoPlan, findings: Sequence[Finding]) -> Results:
    """The results in what rank 0 told."""
    return Results(plan, tuple(MeasuredRound.of(finding) for finding in findings if finding.what == "turn"))
