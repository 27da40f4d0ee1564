"""Experts that the ranks of a pipeline's stage share: a layer's pass through them, simulated by itself.

Nothing else of the stage runs beside it. So it stands in the stage's chain as three parts: time in which a rank
computes or waits for neither, that of rows which nothing hides, and that of tensor ranks' gathers which neither hides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from ds_moe_ep.schedule.program import START, Event, Program
from ds_moe_ep.schedule.spans import LANES, NEAR_LANES, Tags, overlap
from ds_moe_ep.simulate.step.ep_step import EpJob
from ds_moe_ep.simulate.step.setup import Setup
from ds_moe_ep.simulate.step.shares import TENSOR, exposed_us


@dataclass(frozen=True)
class ExpertsPass:
    """Microseconds of one pass of a layer: of all of it, of rows on their way, and of those that nothing hides.

    `tensor_us` are of collectives of tensor ranks that neither compute nor rows hide.
    """

    total_us: float
    traffic_us: float
    exposed_us: float
    tensor_us: float


@dataclass(frozen=True)
class StageExperts:
    """The passes of a layer's experts under the layout of a Setup, whose ep_size is above 1."""

    setup: Setup

    @property
    def tokens(self) -> int:
        """Tokens that a rank takes to the experts."""
        return self._job.tokens

    @cached_property
    def forward(self) -> ExpertsPass:
        """The exchange of counts, rows out, experts, results back, their sums and what tensor ranks gather."""
        return self._run(lambda program: self._job.through_experts(program, START, "layer"))

    @cached_property
    def backward(self) -> ExpertsPass:
        """Gradients out, experts backward, gradients of rows back and gathered."""

        def add(program: Program) -> Event:
            event = self._job.back_to_results(program, START, Tags("layer", "backward"))
            return self._job.back_through_experts(program, event, "layer")

        return self._run(add)

    @cached_property
    def _job(self) -> EpJob:
        return EpJob(self.setup)

    def _run(self, add: Callable[[Program], Event]) -> ExpertsPass:
        program = Program()
        add(program)
        outcome = program.run(self._job.machine.capacities)
        mine = [span for span in outcome.spans() if span.rank == 0]
        rows = overlap(span for span in mine if span.lane in (*LANES, *NEAR_LANES))
        return ExpertsPass(outcome.makespan_us, rows.total_us, rows.exposed_us, exposed_us(mine, TENSOR))
