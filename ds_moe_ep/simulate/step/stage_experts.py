"""Experts that the ranks of a pipeline's stage share: a layer's pass through them, simulated by itself.

Nothing else of the stage runs beside it. So it stands in the stage's chain as two parts: time in which a rank computes
or waits for no row, and the time of rows that nothing hides. Each tensor rank has its part of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from ds_moe_ep.schedule.program import START, Event, Program
from ds_moe_ep.schedule.spans import LANES, Tags, overlap
from ds_moe_ep.simulate.step.costs import LayerCosts
from ds_moe_ep.simulate.step.ep_step import EpJob
from ds_moe_ep.simulate.step.setup import Setup


@dataclass(frozen=True)
class ExpertsPass:
    """Microseconds of one pass of a layer: of all of it, of rows on their way, and of those that nothing hides."""

    total_us: float
    traffic_us: float
    exposed_us: float


@dataclass(frozen=True)
class StageExperts:
    """The passes of a layer's experts under the layout of a Setup, whose ep_size is above 1."""

    setup: Setup

    @property
    def costs(self) -> LayerCosts:
        """Times of what a rank does before and behind the experts: their widths are whole."""
        return self._job.costs

    @property
    def tokens(self) -> int:
        """Tokens that a rank takes to the experts."""
        return self._job.tokens

    @cached_property
    def forward(self) -> ExpertsPass:
        """The exchange of counts, rows out, experts, results back."""

        def add(program: Program) -> Event:
            counted = self._job.counts(program, START, Tags("layer", "forward"))
            return self._job.layer.forward(program, counted, "layer")

        return self._run(add)

    @cached_property
    def backward(self) -> ExpertsPass:
        """Gradients out, experts backward, gradients of rows back."""
        return self._run(lambda program: self._job.layer.backward(program, START, "layer"))

    @cached_property
    def _job(self) -> EpJob:
        return EpJob(self.setup)

    def _run(self, add: Callable[[Program], Event]) -> ExpertsPass:
        program = Program()
        add(program)
        outcome = program.run(self._job.machine.capacities)
        rows = overlap(span for span in outcome.spans() if span.rank == 0 and span.lane in LANES)
        return ExpertsPass(outcome.makespan_us, rows.total_us, rows.exposed_us)
