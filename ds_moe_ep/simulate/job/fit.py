"""Fit of a job to the devices of a cluster: how much is to spare, and how large a micro-batch may be.

The bytes are those of sizing/, of the fullest stage under a layout, at the load of the fullest rank. They are
counted for training; forward passes run in an engine that trains.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ds_moe_ep.config.training import Training
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.quantity import gigabytes
from ds_moe_ep.simulate.cluster.cluster import Cluster
from ds_moe_ep.simulate.step.setup import Setup
from ds_moe_ep.sizing.fit import fullest_memory, largest_micro_batch, memory_fix, needs
from ds_moe_ep.sizing.footprint import Memory


@dataclass(frozen=True, kw_only=True)
class MemoryFit:
    """Memory of a device, the part that the job needs, and the micro-batches for which there is room."""

    memory: Memory
    device_bytes: float
    reserve_bytes: float  # for the driver, communicators and fragmentation
    spare_range: tuple[float, float]  # bytes left at the larger and at the smaller end of the reserve's range
    largest: int  # sequences of the largest micro-batch that fits; 0 where one does not
    largest_of_batch: int  # of those that also cut the batch into whole micro-batches

    @property
    def spare_bytes(self) -> float:
        """Bytes that are left; negative where the job does not fit."""
        return self.device_bytes - self.reserve_bytes - self.memory.peak

    @property
    def fits(self) -> bool:
        """True where a device has room for all of it."""
        return self.spare_bytes >= 0

    def to_dict(self) -> dict[str, Any]:
        """The fit as plain values, for JSON."""
        return {
            "fits": self.fits,
            "memory_bytes": self.memory.to_dict(),
            "device_bytes": self.device_bytes,
            "reserve_bytes": self.reserve_bytes,
            "spare_bytes": [self.spare_bytes, *self.spare_range],
            "largest_micro_batch": self.largest,
            "largest_micro_batch_of_batch": self.largest_of_batch,
        }


def fit_memory(setup: Setup) -> MemoryFit:
    """Fit of the job of `setup` to its cluster's devices."""
    device = setup.cluster.device
    memory = memory_of(setup, setup.training)
    slow, fast = setup.cluster.ends()
    left = [_free_bytes(end) - memory.peak for end in (slow, fast)]

    free_bytes, load = _free_bytes(setup.cluster), max(setup.loads, default=1.0)
    cuts = cuts_of_batch(setup.training)
    return MemoryFit(
        memory=memory,
        device_bytes=device.memory_bytes,
        reserve_bytes=device.reserve_bytes,
        spare_range=(min(left), max(left)),
        largest=largest_micro_batch(setup.model, setup.moe, setup.training, free_bytes, load),
        largest_of_batch=max((t.micro_batch for t in cuts if memory_of(setup, t).peak <= free_bytes), default=0),
    )


def memory_of(setup: Setup, training: Training) -> Memory:
    """Bytes of the fullest device by kind, at the load of the fullest rank."""
    return fullest_memory(setup.model, setup.moe, training, max(setup.loads, default=1.0))


def cuts_of_batch(training: Training) -> list[Training]:
    """The job with each size of micro-batch that cuts the same batch into whole ones, the smallest first."""
    sequences = training.micro_batch * training.accumulation
    sizes = [size for size in range(1, sequences + 1) if sequences % size == 0]
    return [replace(training, micro_batch=size, accumulation=sequences // size) for size in sizes]


def with_micro_batch(training: Training, micro_batch: int) -> Training:
    """The job with another micro-batch and the same batch. Raises ConfigError where it cannot be cut so."""
    cuts = {cut.micro_batch: cut for cut in cuts_of_batch(training)}
    if micro_batch not in cuts:
        nearest = min(cuts, key=lambda size: abs(size - micro_batch))
        raise ConfigError(
            f"micro_batch={micro_batch}: does not cut the {max(cuts):,} sequences that a copy of the model takes of a "
            f"batch into whole micro-batches; {nearest} is the nearest that does"
        )
    return cuts[micro_batch]


def refuse_what_does_not_fit(path: str, setup: Setup, fit: MemoryFit) -> None:
    """Raises ConfigError with what is missing and the fix, where the job does not fit."""
    if fit.fits:
        return
    device = setup.cluster.device
    load = max(setup.loads, default=1.0)
    fix = memory_fix(setup.model, setup.moe, setup.training, _free_bytes(setup.cluster), load)
    raise ConfigError(
        f"cluster.device.memory_bytes={device.memory_bytes / 1e9:g} GB with {path}: {needs(fit.memory)} beside a "
        f"reserve of {device.reserve_bytes / 1e9:g}: {gigabytes(-fit.spare_bytes, 1)} too many; {fix}"
    )


def _free_bytes(cluster: Cluster) -> float:
    return cluster.device.memory_bytes - cluster.device.reserve_bytes
