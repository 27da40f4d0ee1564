"""The specification's two jobs on a cluster of 16 devices, simulated: the basis of the audit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ds_moe_ep.config.knobs import ModelConfig
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.simulate.cluster.cluster import Cluster
from ds_moe_ep.simulate.job.choose import as_auto, with_knobs
from ds_moe_ep.simulate.job.fit import memory_of
from ds_moe_ep.simulate.step.predict import Prediction, predict
from ds_moe_ep.simulate.step.setup import Setup
from ds_moe_ep.simulate.sweep.sweep import Sizes, Sweep, sweep
from ds_moe_ep.sizing.fit import largest_micro_batch
from ds_moe_ep.sizing.footprint import Memory
from ds_moe_ep.specification.laws import LawFit
from ds_moe_ep.specification.stated import BASELINE, EP16, MODEL, STATED, TRAINING, Hardware

KEEPING = dataclasses.replace(MODEL, recompute=False)


def hardware_of(cluster: Cluster) -> Hardware:
    """The cluster's hardware as the derived column counts it: peaks and whole links, as on data sheets."""
    return Hardware(
        num_gpus=cluster.num_ranks,
        gpus_per_node=cluster.node_size,
        memory_bytes=cluster.device.memory_bytes,
        peak_flops=1e6 * cluster.device.peak(TRAINING.precision),
        node_bytes_per_s=1e6 * cluster.near.bandwidth,
        link_bytes_per_s=1e6 * cluster.far.bandwidth,
    )


@dataclass(frozen=True)
class Runs:
    """The specification's jobs on a cluster, simulated when they are asked for."""

    cluster: Cluster

    def __post_init__(self) -> None:
        if self.cluster.num_ranks != TRAINING.world_size:
            raise ConfigError(
                f"cluster.num_ranks={self.cluster.num_ranks}: the specification's jobs are of {TRAINING.world_size} "
                "devices; take a cluster of as many"
            )

    @cached_property
    def ep16_setup(self) -> Setup:
        """EP16 under the schedule that `auto` would take."""
        return as_auto(Setup(model=MODEL, moe=EP16, training=TRAINING, cluster=self.cluster))

    @cached_property
    def base_setup(self) -> Setup:
        """TP8/PP2 in micro-batches as large as fit, of whole parts for every rank of a tensor group if they can be."""
        return self._base(MODEL)

    def _base(self, model: ModelConfig) -> Setup:
        moe = dataclasses.replace(EP16, ep_size=1)
        cut = dataclasses.replace(TRAINING, layout=BASELINE, ep_size=1, accumulation=STATED.micro_batches)
        largest = largest_micro_batch(model, moe, cut, int(self.free_bytes))
        whole = largest - largest % BASELINE.tp_size
        training = dataclasses.replace(cut, micro_batch=max(whole or largest, 1))
        return Setup(model=model, moe=moe, training=training, cluster=self.cluster)

    @property
    def free_bytes(self) -> float:
        """Memory of a device, without its reserve."""
        return self.cluster.device.memory_bytes - self.cluster.device.reserve_bytes

    def memory(self, system: str) -> tuple[Memory, int]:
        """Bytes of a job's fullest device, and the sequences of its micro-batch."""
        setup = self.ep16_setup if system == "ep16" else self.base_setup
        return memory_of(setup, setup.training), setup.training.micro_batch

    @cached_property
    def ep16(self) -> Prediction:
        """EP16's training step."""
        return predict(self.ep16_setup)

    @cached_property
    def base(self) -> Prediction:
        """TP8/PP2's training step."""
        return predict(self.base_setup)

    @cached_property
    def ep16_forward(self) -> Prediction:
        """EP16's forward passes alone."""
        return predict(dataclasses.replace(self.ep16_setup, mode="forward"))

    @cached_property
    def base_forward(self) -> Prediction:
        """TP8/PP2's forward passes alone."""
        return predict(dataclasses.replace(self.base_setup, mode="forward"))

    @cached_property
    def ep16_kept(self) -> Prediction | None:
        """EP16 where every activation is kept for the backward pass; None where that does not fit."""
        return self._predicted(dataclasses.replace(self.ep16_setup, model=KEEPING))

    @cached_property
    def base_kept(self) -> Prediction | None:
        """TP8/PP2 likewise."""
        return self._predicted(self._base(KEEPING))

    def _predicted(self, setup: Setup) -> Prediction | None:
        return predict(setup) if memory_of(setup, setup.training).peak <= self.free_bytes else None

    @cached_property
    def serial(self) -> Prediction:
        """EP16's forward pass where nothing is hidden: every exchange stands alone."""
        return predict(dataclasses.replace(with_knobs(self.ep16_setup, {"schedule": "serial"}), mode="forward"))

    @cached_property
    def scaling(self) -> Sweep:
        """EP = 1 to 16, as the specification's laws were."""
        setup = Setup(model=MODEL, moe=EP16, training=TRAINING, cluster=self.cluster)
        return sweep(setup, Sizes(ep=(1, 2, 4, 8, 16)))

    def law_fits(self, total: str) -> Sequence[LawFit]:
        """The document's laws fitted to these sizes, with `total` held constant."""
        return self.scaling.law_fits(total)
