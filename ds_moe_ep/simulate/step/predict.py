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
from ds_moe_ep.simulate.cluster.cluster import Cluster
from ds_moe_ep.simulate.step.ep_step import ep_step
from ds_moe_ep.simulate.step.pipeline_step import pipeline_step
from ds_moe_ep.simulate.step.setup import Setup, Step

SETTLED = 4  # micro-batches a stage behind which a pipeline repeats itself


@dataclass(frozen=True)
class Estimate:
    """A value, and the least and the most that it is at the cluster's ends."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, slow: float, fast: float) -> Estimate:
        """The value with its bar from what it is at the slower and at the faster end."""
        return cls(value, min(value, slow, fast), max(value, slow, fast))

    @classmethod
    def exactly(cls, value: float) -> Estimate:
        """A number that no range of the cluster changes."""
        return cls(value, value, value)

    def scaled(self, factor: float) -> Estimate:
        """The same in another unit."""
        return Estimate(factor * self.value, factor * self.low, factor * self.high)


@dataclass(frozen=True)
class Prediction:
    """One job's step on the cluster and on its ends, under one schedule."""

    step: Step
    slow: Step
    fast: Step

    def estimate(self, of: Callable[[Step], float]) -> Estimate:
        """A number of the step with its bar."""
        return Estimate.of(of(self.step), of(self.slow), of(self.fast))

    def over(self, other: Prediction) -> Estimate:
        """Throughput over that of `other`, both at the same end."""
        return Estimate.of(
            self.step.tps / other.step.tps, self.slow.tps / other.slow.tps, self.fast.tps / other.fast.tps
        )

    @cached_property
    def tps(self) -> Estimate:
        """Tokens a second over all ranks."""
        return self.estimate(lambda step: step.tps)

    @cached_property
    def step_us(self) -> Estimate:
        """Microseconds of a step."""
        return self.estimate(lambda step: step.step_us)

    @cached_property
    def hidden(self) -> Estimate | None:
        """Share of the experts' traffic behind compute; None where there is none."""
        shares = [step.hidden for step in (self.step, self.slow, self.fast)]
        known = [share for share in shares if share is not None]
        return Estimate.of(*known) if len(known) == len(shares) else None


def simulate_step(setup: Setup) -> Step:
    """The step of the job: by expert parallelism, or by tensor and pipeline parallelism where it has a layout.

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
        traffic_us=0.0,
        exposed_us=0.0,
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
