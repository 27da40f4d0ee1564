"""Bounds of a step: the resource that would save most if it took no time, found by simulating the step without it.

Shares of a step's time do not tell it: traffic that is hidden costs nothing, and less compute may only uncover traffic.
Savings of two resources do not add up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

from ds_moe_ep.records.quantity import Quantity, Row
from ds_moe_ep.simulate.cluster.cluster import Cluster, Link
from ds_moe_ep.simulate.step.predict import Prediction, on, simulate_step


def bounds(prediction: Prediction) -> tuple[Row, ...]:
    """`step_ms` without each resource that the cluster has, and `saved_ratio` of it; what saves most comes first."""
    found = []
    for resource, without in RESOURCES.items():
        if not _has(prediction.step.setup.cluster, resource):
            continue
        left_us = [simulate_step(on(step.setup, without(step.setup.cluster))).step_us for step in prediction.steps]
        saved = [1 - left / step.step_us for left, step in zip(left_us, prediction.steps, strict=True)]
        step = Quantity.of(left_us[0] / 1e3, unit="ms", name="step")
        found.append(Row({"resource": resource}, (step, Quantity.of(*saved, unit="ratio", name="saved"))))
    return tuple(sorted(found, key=lambda bound: -bound["saved_ratio"].value))


def _has(cluster: Cluster, resource: str) -> bool:
    if resource == NEAR:
        return cluster.node_size > 1
    return resource != FAR or cluster.num_nodes > 1


def _no_compute(cluster: Cluster) -> Cluster:
    device = cluster.device
    peaks = {name: math.inf for name in ("peak_fp16", "peak_bf16", "peak_fp32") if getattr(device, name)}
    return replace(cluster, device=replace(device, **peaks))


def _no_memory(cluster: Cluster) -> Cluster:
    return replace(cluster, device=replace(cluster.device, memory_bandwidth=math.inf))


def _no_launches(cluster: Cluster) -> Cluster:
    host = {name: 0.0 for name in vars(cluster.host) if name != "cores"}
    device = replace(cluster.device, launch_us=0.0, sync_us=0.0)
    return replace(cluster, device=device, host=replace(cluster.host, **host))


def _free(link: Link) -> Link:
    return replace(link, bandwidth=math.inf, latency_us=0.0, message_us=0.0)


NEAR, FAR = "links inside a node", "links between nodes"
RESOURCES: Mapping[str, Callable[[Cluster], Cluster]] = {
    "matrix products and attention": _no_compute,
    "memory bandwidth": _no_memory,
    NEAR: lambda cluster: replace(cluster, near=_free(cluster.near)),
    FAR: lambda cluster: replace(cluster, far=_free(cluster.far)),
    "launches and host": _no_launches,
}
