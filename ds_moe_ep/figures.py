"""The specification's figures beside what its own shapes and links imply; none of them was measured here.

A derived number says what arithmetic allows on the stated hardware (16 GPUs of 989 TFLOP/s dense FP16, 4
nodes of 4, 400 GB/s inside a node, 200 GB/s a link between nodes), not what any program reached.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_moe_ep.config import SPECIFICATION, MoEConfig
from ds_moe_ep.footprint import (
    count_memory,
    count_parameters,
    count_rank_parameters,
    dispatch_bytes,
    forward_flops,
    training_flops,
)
from ds_moe_ep.training import Training

NUM_GPUS = 16
GPUS_PER_NODE = 4
PEAK_FLOPS = 989e12  # dense FP16 of one H100
NODE_BYTES_PER_S = 400e9  # NVLink, as the specification counts it
LINK_BYTES_PER_S = 200e9  # one InfiniBand link
BATCH_SEQUENCES = 1024
STATED_TPS = {"TP8/PP2": 120_000, "EP16": 450_000}

MODEL = SPECIFICATION
EP16 = MoEConfig(num_experts=16, ep_size=16)
BATCH_TOKENS = BATCH_SEQUENCES * MODEL.sequence_length
EXPERT_TOKENS = BATCH_TOKENS // EP16.num_experts
TRAINING = Training(
    world_size=NUM_GPUS,
    ep_size=16,
    micro_batch=1,
    accumulation=BATCH_SEQUENCES // NUM_GPUS,
    precision="fp16",
    gradient_precision="fp16",
    zero_stage=1,
    optimizer="Adam",
    optimizer_states=2,
    offload=False,
    bucket_elements=0,
)


@dataclass(frozen=True)
class Figure:
    """One figure: what the specification states, what follows from its shapes, and how the two agree."""

    name: str
    stated: str
    derived: str
    verdict: str


def stated_and_derived() -> tuple[Figure, ...]:
    """The specification's figures in the order of its sections."""
    return (*_memory_figures(), *_time_figures(), *_rate_figures(), *_traffic_figures())


def cluster_traffic_ratio() -> float:
    """EP16's traffic over its compute in training, on the specification's cluster at peak, with a link a node.

    Traffic: four exchanges a layer (dispatch and combine, forward and backward) of a GPU's 12 of 16 rows, of 4 GPUs
    over one 200 GB/s link. Compute: three times the forward arithmetic at 989 TFLOP/s.
    """
    tokens = BATCH_TOKENS // NUM_GPUS
    far_bytes = tokens * MODEL.hidden_size * 2 * (NUM_GPUS - GPUS_PER_NODE) // NUM_GPUS * GPUS_PER_NODE
    traffic_s = 4 * MODEL.num_layers * far_bytes / LINK_BYTES_PER_S
    return traffic_s / (tokens * training_flops(MODEL, EP16) / PEAK_FLOPS)


def _memory_figures() -> tuple[Figure, ...]:
    expert = MODEL.expert_params
    ep16 = count_memory(MODEL, EP16, TRAINING)
    weights = 2 * count_rank_parameters(MODEL, EP16).total
    whole = 2 * count_parameters(MODEL, EP16).total
    hidden = EXPERT_TOKENS * MODEL.expert_width * 2
    return (
        Figure(
            "one expert",
            "537 MB",
            f"{expert / 1e6:.1f} M parameters, {2 * expert / 1e6:,.0f} MB in FP16",
            "the stated number counts parameters, not bytes",
        ),
        Figure(
            "memory of a GPU, EP16",
            "668 MB",
            f"{weights / 1e9:.2f} GB of weights; {ep16.persistent / 1e9:.1f} GB with gradients, Adam, ZeRO-1",
            "impossible: the weights alone are more",
        ),
        Figure(
            "memory of a GPU, TP8/PP2",
            "5.4 GB",
            f"{whole / NUM_GPUS / 1e9:.2f} GB of weights, all cut over 16",
            "close, by another route",
        ),
        Figure(
            "activations of one batch at one expert",
            "-",
            f"{hidden / 1e9:.1f} GB",
            "a batch needs micro-batches and recomputation",
        ),
    )


def _time_figures() -> tuple[Figure, ...]:
    row_bytes = MODEL.hidden_size * 2
    sent = EXPERT_TOKENS * row_bytes
    remote = sent * (NUM_GPUS - GPUS_PER_NODE) / NUM_GPUS
    compute_ms = EXPERT_TOKENS * 2 * MODEL.expert_params / PEAK_FLOPS * 1e3
    stated_share = 5.0 / 52.4
    node_ms, link_ms = sent / NODE_BYTES_PER_S * 1e3, remote / LINK_BYTES_PER_S * 1e3
    return (
        Figure("tokens of an expert", "640,000", f"{EXPERT_TOKENS:,}", "holds for balanced top-1 routing"),
        Figure(
            "distribution of tokens",
            "26.2 ms",
            f"{node_ms:.1f} ms at 400 GB/s; {link_ms:.1f} ms with a link a GPU; "
            f"{GPUS_PER_NODE * link_ms:.0f} ms with a link a node",
            "holds only if no byte leaves a node; 12 of 16 destinations are on others",
        ),
        Figure(
            "expert computation",
            "5.0 ms",
            f"{compute_ms:.0f} ms at peak",
            f"impossible: {compute_ms / 5.0:.0f} times the peak",
        ),
        Figure(
            "communication hidden",
            "80 %",
            f"at most {100 * stated_share:.0f} % with the stated 5.0 ms; all of it with {compute_ms:.0f} ms",
            "to be measured",
        ),
    )


def _rate_figures() -> tuple[Figure, ...]:
    forward, training = forward_flops(MODEL, EP16), training_flops(MODEL, EP16)
    limit = NUM_GPUS * PEAK_FLOPS / training
    base, ours = STATED_TPS["TP8/PP2"], STATED_TPS["EP16"]
    return (
        Figure(
            "tokens a second, TP8/PP2 and EP16",
            f"{base:,} and {ours:,}",
            f"limit {NUM_GPUS * PEAK_FLOPS / forward / 1e6:.2f} M forward, {limit / 1e3:.0f} k training "
            f"({forward / 1e9:.2f} and {training / 1e9:.1f} GFLOP a token)",
            f"possible: 450 k is {100 * ours / limit:.0f} % of peak in training",
        ),
        Figure(
            "batches a second",
            "11.7 and 43.9",
            f"{base / BATCH_TOKENS:.4f} and {ours / BATCH_TOKENS:.4f}",
            "off by 1,000: they are thousandths",
        ),
        Figure(
            "time of a token (TPOT)",
            "8.3 and 2.2 ms",
            f"{1e6 / base:.2f} and {1e6 / ours:.2f} us",
            "off by 1,000: milliseconds of 1,000 tokens",
        ),
        Figure(
            "latency pieces, EP16",
            "0.31 + 0.44 + 0 = 2.2 ms",
            f"{0.31 + 0.44:.2f} ms",
            "does not add up",
        ),
        Figure("gain in GPU efficiency", "50.8 %", f"98/65 - 1 = {100 * (98 / 65 - 1):.1f} %", "holds"),
    )


def _traffic_figures() -> tuple[Figure, ...]:
    ep16 = 2 * dispatch_bytes(BATCH_TOKENS // NUM_GPUS, MODEL, EP16, "fp16")
    tp8 = 2 * (7 / 8) * 2 * BATCH_TOKENS * MODEL.hidden_size * 2
    return (
        Figure(
            "bytes of a GPU and layer, forward, TP8 and EP16",
            "-",
            f"{tp8 / 1e9:.0f} GB and {ep16 / 1e9:.1f} GB",
            f"why experts win: {tp8 / ep16:.0f} times fewer bytes",
        ),
        Figure("pipeline bubble, 2 stages, 4 micro-batches", "-", f"{100 / (4 + 2 - 1):.0f} %", "the baseline's"),
    )
