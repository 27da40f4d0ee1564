"""Clusters and jobs that tests simulate, with numbers that can be followed by hand."""

from __future__ import annotations

from typing import Any

from ds_moe_ep.config.knobs import ModelConfig, MoEConfig
from ds_moe_ep.config.training import Training
from ds_moe_ep.simulate.cluster.cluster import Cluster, Device, Host, Link
from ds_moe_ep.simulate.step.setup import Setup

FREE = Link()  # infinitely fast, without latency
MODEL = ModelConfig(num_layers=2, hidden_size=64, num_heads=4, expert_width=256, sequence_length=128, recompute=False)


def cluster(num_nodes: int = 4, node_size: int = 4, **parts: Any) -> Cluster:
    """Devices of 1,000 flop/us that do nothing but matrix products, on free links where none are given."""
    given = {
        "device": Device(memory_bytes=80e9, peak_fp16=1e3, peak_bf16=1e3, peak_fp32=1e3),
        "near": FREE,
        "far": FREE,
        "host": Host(),
        **parts,
    }
    return Cluster(name="a cluster", num_nodes=num_nodes, node_size=node_size, **given)


def setup(on: Cluster, model: ModelConfig = MODEL, accumulation: int = 1, **knobs: Any) -> Setup:
    """A job of one rank per device; `knobs` are of the layer, and of the Setup where they are its own."""
    own = {name: knobs.pop(name) for name in ("loads", "mode", "algorithm") if name in knobs}
    size = on.num_ranks
    moe = MoEConfig(**{"num_experts": size, "ep_size": size, "node_size": on.node_size, "schedule": "peers", **knobs})
    training = Training(
        world_size=size,
        ep_size=moe.ep_size,
        micro_batch=2,
        accumulation=accumulation,
        precision="fp16",
        gradient_precision="fp16",
        zero_stage=1,
        optimizer="Adam",
        optimizer_states=2,
        offload=False,
        bucket_elements=0,
    )
    return Setup(model=model, moe=moe, training=training, cluster=on, **own)


def slow_link(bytes_per_us: float, shared_by: float = 1.0, latency_us: float = 0.0) -> Link:
    """A link of so many bytes per microsecond and direction."""
    return Link(bandwidth=bytes_per_us, shared_by=shared_by, latency_us=latency_us)
