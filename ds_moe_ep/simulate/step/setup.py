"""A training step on a cluster, and the outcome of its simulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ds_moe_ep.config.knobs import ModelConfig, MoEConfig
from ds_moe_ep.config.training import Training
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.names import PARTS, SIMULATED_PARTS
from ds_moe_ep.schedule.placement import Placement
from ds_moe_ep.schedule.spans import Span
from ds_moe_ep.simulate.cluster.cluster import Cluster
from ds_moe_ep.sizing.footprint import forward_flops, tokens_of_batch, tokens_of_rank, training_flops

Algorithm = Literal["ring", "tree", "levels", "auto"]  # of an all-reduce; "auto" takes what its transport would


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One job on one cluster. `loads` has what each rank of an expert group receives over the mean; () is even.

    `placement` has the copies of experts that made the loads as they are, in each layer; None where there are none.
    """

    model: ModelConfig
    moe: MoEConfig
    training: Training
    cluster: Cluster
    loads: tuple[float, ...] = ()
    placement: Placement | None = None
    algorithm: Algorithm = "auto"
    mode: Literal["training", "forward"] = "training"

    def __post_init__(self) -> None:
        world, ranks = self.training.world_size, self.cluster.num_ranks
        if world != ranks:
            raise ConfigError(
                f"cluster.num_ranks={ranks}: the job has {world} ranks, one per device; take a cluster of as many "
                "(--nodes) or another world size"
            )
        if self.loads and len(self.loads) != self.moe.ep_size:
            raise ConfigError(
                f"simulate.loads={len(self.loads)} numbers: one for each of the {self.moe.ep_size} ranks of an "
                "expert group; give as many"
            )

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of a rank (of a tensor group, under a layout) in one micro-batch."""
        return tokens_of_rank(self.model, self.training)

    @property
    def batch_tokens(self) -> int:
        """Tokens of one optimizer step over all ranks."""
        return tokens_of_batch(self.model, self.training)

    @property
    def flops(self) -> float:
        """Arithmetic of one step over all ranks, without what recomputation repeats."""
        of_token = training_flops if self.mode == "training" else forward_flops
        return float(self.batch_tokens) * of_token(self.model, self.moe)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One simulated step of the slowest rank. Micro-batches of expert parallelism follow one another: one is simulated.

    `parts_us` sums to `step_us` by the keys of PARTS and SIMULATED_PARTS. `traffic_us` and `exposed_us` are of the
    experts' rows: how long some transfer is on its way, and how much of that no compute covers; both of a whole step.
    `busy_us` is what the device computes. `spans` are of one micro-batch and, behind it, of what a step does once.
    """

    setup: Setup
    step_us: float
    parts_us: Mapping[str, float]
    traffic_us: float
    exposed_us: float
    busy_us: float
    spans: Sequence[Span] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        assert set(self.parts_us) <= {*PARTS, *SIMULATED_PARTS}, self.parts_us

    @property
    def tps(self) -> float:
        """Tokens per second over all ranks."""
        return 1e6 * self.setup.batch_tokens / self.step_us

    @property
    def tpot_us(self) -> float:
        """Microseconds per token."""
        return self.step_us / self.setup.batch_tokens

    @property
    def hidden(self) -> float | None:
        """Share of the experts' traffic that runs behind compute; None where there is none."""
        return 1 - self.exposed_us / self.traffic_us if self.traffic_us else None

    @property
    def mfu(self) -> float:
        """Model-flop utilization: the step's arithmetic over what all devices could do in its time at their peak."""
        cluster, training = self.setup.cluster, self.setup.training
        on_cores = cluster.computes_on == "host"
        devices = min(cluster.host.cores, training.world_size) if on_cores else training.world_size
        return self.setup.flops / (devices * cluster.device.peak(training.precision) * self.step_us)

    @property
    def busy(self) -> float:
        """Share of the step in which the device computes."""
        return self.busy_us / self.step_us
