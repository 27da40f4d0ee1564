"""A simulated step with its error bar: on the cluster as its file says, and with all numbers at an end of their range.

The bar is wide on purpose: all numbers worse at once, or all better. What is compared is compared at the same end,
since two jobs on one cluster have the same links and devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from ds_moe_ep.config.training import WHOLE
from ds_moe_ep.records.quantity import Quantity
from ds_moe_ep.simulate.cluster.cluster import Cluster
from ds_moe_ep.simulate.step.ep_step import ep_step
from ds_moe_ep.simulate.step.pipeline_step import pipeline_step
from ds_moe_ep.simulate.step.setup import Setup, Step

SETTLED = 4  # micro-batches per stage behind which a pipeline repeats itself


@dataclass(frozen=True)
class Prediction:
    """One job's step on the cluster and on its ends, under one schedule."""

    step: Step
    slow: Step
    fast: Step

    @property
    def steps(self) -> tuple[Step, Step, Step]:
        """The step as the cluster's file has it, and at the slower and the faster end."""
        return self.step, self.slow, self.fast

    def estimate(self, of: Callable[[Step], float], unit: str = "") -> Quantity:
        """A number of the step with its bar."""
        return Quantity.of(*map(of, self.steps), unit=unit)

    def over(self, other: Prediction) -> Quantity:
        """Throughput over that of `other`, both at the same end."""
        pairs = zip(self.steps, other.steps, strict=True)
        return Quantity.of(*(mine.tps / its.tps for mine, its in pairs), unit="ratio")

    @cached_property
    def tps(self) -> Quantity:
        """Tokens per second over all ranks."""
        return self.estimate(lambda step: step.tps, "tokens/s")

    @cached_property
    def hidden(self) -> Quantity | None:
        """Share of the experts' traffic behind compute; None where there is none."""
        shares = [step.hidden for step in self.steps]
        known = [share for share in shares if share is not None]
        return Quantity.of(*known, unit="ratio") if len(known) == len(shares) else None


def simulate_step(setup: Setup) -> Step:
    """The step of the job: by expert parallelism alone, or by a layout.

    A pipeline of many micro-batches repeats itself once it is full: some are simulated, and the others take what one
    more of them takes. Spans are of those that are simulated.
    """
    training = setup.training
    if training.layout == WHOLE:
        return ep_step(setup)
    few = SETTLED * training.layout.pp_size
    if training.accumulation <= 2 * few:
        return pipeline_step(setup)
    some, more = (pipeline_step(_accumulating(setup, times)) for times in (few, 2 * few))
    left = (training.accumulation - 2 * few) / few

    def grown(first: float, second: float) -> float:
        return second + left * (second - first)

    return Step(
        setup=setup,
        step_us=grown(some.step_us, more.step_us),
        parts_us={part: grown(some.parts_us[part], us) for part, us in more.parts_us.items()},
        traffic_us=grown(some.traffic_us, more.traffic_us),
        exposed_us=grown(some.exposed_us, more.exposed_us),
        busy_us=grown(some.busy_us, more.busy_us),
        spans=more.spans,
    )


def _accumulating(setup: Setup, micro_batches: int) -> Setup:
    return dataclasses.replace(setup, training=dataclasses.replace(setup.training, accumulation=micro_batches))


def predict(setup: Setup) -> Prediction:
    """The step of the job, and at both ends of its cluster."""
    slow, fast = setup.cluster.ends()
    return Prediction(simulate_step(setup), simulate_step(on(setup, slow)), simulate_step(on(setup, fast)))


def on(setup: Setup, cluster: Cluster) -> Setup:
    """The same job on another cluster."""
    return dataclasses.replace(setup, cluster=cluster)
