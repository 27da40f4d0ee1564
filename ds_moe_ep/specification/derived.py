"""The derived column of the claims: what the document's own shapes and links imply. Nothing was measured here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.records.quantity import gigabytes, number
from ds_moe_ep.schedule.build import backward_schedule, forward_schedule
from ds_moe_ep.schedule.check import check
from ds_moe_ep.sizing.footprint import (
    count_memory,
    count_parameters,
    count_rank_parameters,
    dispatch_bytes,
    forward_flops,
    training_flops,
)
from ds_moe_ep.sizing.pipeline import bubble
from ds_moe_ep.specification.claim import SYSTEMS, Derived, FigureNumber
from ds_moe_ep.specification.laws import fit
from ds_moe_ep.specification.stated import (
    BASELINE,
    BATCH_TOKENS,
    EP16,
    EXPERT_TOKENS,
    HARDWARE,
    MODEL,
    TRAINING,
    Hardware,
    Stated,
)
from ds_moe_ep.specification.verdicts import rounded_percent


def figure_number(what: str, unit: str, stated: float | None = None, derived: float | None = None) -> FigureNumber:
    """A number of a claim."""
    return FigureNumber(what=what, unit=unit, stated=stated, derived=derived)


def pair(unit: str, stated: Iterable[float] | None, derived: Iterable[float]) -> tuple[FigureNumber, ...]:
    """A number of each system."""
    values: Iterable[float | None] = stated if stated is not None else (None, None)
    return tuple(figure_number(what, unit, a, b) for what, a, b in zip(SYSTEMS, values, derived, strict=True))


def cluster_traffic_ratio(hardware: Hardware = HARDWARE) -> float:
    """EP16's traffic over its compute in training, on the specification's cluster at peak, with a link per node.

    Traffic: four exchanges per layer (dispatch and combine, forward and backward) of a GPU's 12 of 16 rows, of 4 GPUs
    over one 200 GB/s link. Compute: three times the forward arithmetic at 989 TFLOP/s.
    """
    tokens = BATCH_TOKENS // hardware.num_gpus
    far_bytes = tokens * MODEL.hidden_size * 2 * hardware.far_share * hardware.gpus_per_node
    traffic_s = 4 * MODEL.num_layers * far_bytes / hardware.link_bytes_per_s
    return traffic_s / (tokens * training_flops(MODEL, EP16) / hardware.peak_flops)


def expert(stated: Stated, hardware: Hardware) -> Derived:
    """Parameters of one expert, and their bytes."""
    params, num_bytes = MODEL.expert_params, 2 * MODEL.expert_params
    text = f"{number(params / 1e6, 1)} M parameters, {number(num_bytes / 1e6, 0)} MB in FP16"
    numbers = (figure_number("bytes", "bytes", stated.expert_mb * 1e6, num_bytes),)
    return Derived(text, numbers, {"parameters": params, "bytes": num_bytes})


def memory_ep16(stated: Stated, hardware: Hardware) -> Derived:
    """Bytes that a GPU of EP16 keeps from step to step."""
    kept, weights = count_memory(MODEL, EP16, TRAINING).persistent, 2 * count_rank_parameters(MODEL, EP16).total
    text = f"{gigabytes(weights, 2)} of weights; {gigabytes(kept, 1)} with gradients, Adam, ZeRO-1"
    return Derived(text, (figure_number("peak", "bytes", stated.ep16_memory_mb * 1e6, kept),), {"weights": weights})


def memory_tp8_pp2(stated: Stated, hardware: Hardware) -> Derived:
    """Bytes of a GPU's share of all weights."""
    share = 2 * count_parameters(MODEL, EP16).total / hardware.num_gpus
    text = f"{gigabytes(share, 2)} of weights, all cut over {hardware.num_gpus}"
    return Derived(text, (figure_number("peak", "bytes", stated.base_memory_gb * 1e9, share),), {"share": share})


def activations(stated: Stated, hardware: Hardware) -> Derived:
    """Bytes of one batch's hidden rows at one expert, and the room for them."""
    rows = EXPERT_TOKENS * MODEL.expert_width * 2
    room = hardware.memory_bytes - count_memory(MODEL, EP16, TRAINING).persistent
    return Derived(
        gigabytes(rows, 1), (figure_number("hidden_rows", "bytes", None, rows),), {"rows": rows, "room": room}
    )


def expert_tokens(stated: Stated, hardware: Hardware) -> Derived:
    """Rows of an expert under balanced top-1 routing."""
    return Derived(f"{EXPERT_TOKENS:,}", (figure_number("rows", "rows", stated.expert_tokens, EXPERT_TOKENS),))


def distribution(stated: Stated, hardware: Hardware) -> Derived:
    """Milliseconds of one dispatch on three kinds of links."""
    sent = EXPERT_TOKENS * MODEL.hidden_size * 2
    node_ms = sent / hardware.node_bytes_per_s * 1e3
    link_ms = sent * hardware.far_share / hardware.link_bytes_per_s * 1e3
    shared_ms = hardware.gpus_per_node * link_ms
    text = (
        f"{number(node_ms, 1)} ms at {hardware.node_bytes_per_s / 1e9:g} GB/s; "
        f"{number(link_ms, 1)} ms with a link per GPU; {number(shared_ms, 0)} ms with a link per node"
    )
    numbers = (
        figure_number("inside_a_node", "ms", stated.distribution_ms, node_ms),
        figure_number("link_a_gpu", "ms", None, link_ms),
        figure_number("link_a_node", "ms", None, shared_ms),
    )
    far, num_gpus = hardware.num_gpus - hardware.gpus_per_node, hardware.num_gpus
    return Derived(text, numbers, {"node_ms": node_ms, "link_ms": link_ms, "far": far, "all": num_gpus})


def _expert_ms(hardware: Hardware) -> float:
    return EXPERT_TOKENS * 2 * MODEL.expert_params / hardware.peak_flops * 1e3


def expert_time(stated: Stated, hardware: Hardware) -> Derived:
    """Milliseconds of an expert's forward pass at the peak."""
    ms = _expert_ms(hardware)
    return Derived(f"{number(ms, 0)} ms at peak", (figure_number("forward", "ms", stated.expert_ms, ms),), {"ms": ms})


def hidden(stated: Stated, hardware: Hardware) -> Derived:
    """Share of the exchanges that computation is long enough to cover."""
    times = stated.expert_ms, _expert_ms(hardware)
    allowed, share = (min(compute / (2 * stated.distribution_ms), 1.0) for compute in times)
    text = (
        f"at most {rounded_percent(allowed)} with the stated {number(times[0], 1)} ms; "
        f"{'all of it' if share == 1 else rounded_percent(share)} with {number(times[1], 0)} ms"
    )
    return Derived(text, (figure_number("share", "ratio", stated.hidden, share),), {"allowed": allowed})


def _limit(hardware: Hardware) -> float:
    """Tokens per second in training at the peak."""
    return hardware.num_gpus * hardware.peak_flops / training_flops(MODEL, EP16)


def tps(stated: Stated, hardware: Hardware) -> Derived:
    """Limits of the tokens per second."""
    forward, training = forward_flops(MODEL, EP16), training_flops(MODEL, EP16)
    limit, forward_limit = _limit(hardware), hardware.num_gpus * hardware.peak_flops / forward
    text = (
        f"limit {number(forward_limit / 1e6, 2)} M forward, {number(limit / 1e3, 0)} k training "
        f"({number(forward / 1e9, 2)} and {number(training / 1e9, 1)} GFLOP per token)"
    )
    numbers = (
        *pair("tokens/s", stated.tps, (limit, limit)),
        figure_number("ep16_forward", "tokens/s", None, forward_limit),
    )
    return Derived(text, numbers, {"limit": limit})


def ratio(stated: Stated, hardware: Hardware) -> Derived:
    """Quotient of the stated tokens per second."""
    base, ours = stated.tps
    text = f"{ours / 1e3:g}/{base / 1e3:g} = {number(ours / base, 2)}"
    return Derived(text, (figure_number("ep16", "ratio", stated.ratio, ours / base),), {"ratio": ours / base})


def batches(stated: Stated, hardware: Hardware) -> Derived:
    """Batches per second that the stated tokens per second make."""
    rates = [its / BATCH_TOKENS for its in stated.tps]
    text = " and ".join(number(rate, 4) for rate in rates)
    return Derived(text, pair("1/s", stated.batches_per_s, rates), dict(zip(SYSTEMS, rates, strict=True)))


def tpot(stated: Stated, hardware: Hardware) -> Derived:
    """Microseconds per token that the stated tokens per second make."""
    token_us = [1e6 / its for its in stated.tps]
    text = " and ".join(number(us, 2) for us in token_us) + " us"
    numbers = pair("us", [1e3 * ms for ms in stated.tpot_ms], token_us)
    return Derived(text, numbers, dict(zip(SYSTEMS, token_us, strict=True)))


def pieces(which: int) -> Callable[[Stated, Hardware], Derived]:
    """The derivation for a system: what its pieces sum to."""

    def derive(stated: Stated, hardware: Hardware) -> Derived:
        total, whole = sum((stated.base_pieces_ms, stated.ep16_pieces_ms)[which]), stated.tpot_ms[which]
        return Derived(
            f"{number(total, 2)} ms", (figure_number("sum", "ms", whole, total),), {"total": total, "whole": whole}
        )

    return derive


def gain(stated: Stated, hardware: Hardware) -> Derived:
    """Gain that the stated utilizations make."""
    before, after = sum(stated.utilization_percent[0]) / 2, stated.utilization_percent[1][1]
    found = 100 * (after / before - 1)
    text = f"{after:g}/{before:g} - 1 = {number(found, 1)} %"
    return Derived(text, (figure_number("gain", "percent", stated.gain_percent, found),), {"gain": found})


def utilization(stated: Stated, hardware: Hardware) -> Derived:
    """Share of the peak that the stated tokens per second need."""
    needed = [its / _limit(hardware) for its in stated.tps]
    text = (
        f"{' and '.join(map(rounded_percent, needed))} of peak are what the stated tokens per second need in training"
    )
    numbers = pair("ratio", [sum(both) / 200 for both in stated.utilization_percent], needed)
    return Derived(text, numbers, dict(zip(SYSTEMS, needed, strict=True)))


def traffic_bytes(stated: Stated, hardware: Hardware) -> Derived:
    """Bytes of a layer, forward, in both systems."""
    ep16 = 2 * dispatch_bytes(BATCH_TOKENS // hardware.num_gpus, MODEL, EP16, "fp16")
    tp = BASELINE.tp_size
    tp8 = 2 * (tp - 1) / tp * 2 * BATCH_TOKENS * MODEL.hidden_size * 2
    text = f"{gigabytes(tp8, 0)} and {gigabytes(ep16, 1)}"
    return Derived(text, pair("bytes", None, (tp8, ep16)), {"tp8_pp2": tp8, "ep16": ep16})


def pipeline_bubble(stated: Stated, hardware: Hardware) -> Derived:
    """Share of the baseline's step that a stage waits."""
    share = bubble(dataclasses.replace(TRAINING, layout=BASELINE, accumulation=stated.micro_batches))
    return Derived(rounded_percent(share), (figure_number("share", "ratio", None, share),))


def connections(stated: Stated, hardware: Hardware) -> Derived:
    """Rule that follows from a single hardware queue."""
    text = "launches run in issue order, so a transfer must be issued before the compute that hides it"
    return Derived(text, (figure_number("connections", "count", stated.max_connections),))


def schedule_faults() -> list[str]:
    """Findings of the schedule's check, which holds the order of launches."""
    torus = Torus(HARDWARE.num_gpus // HARDWARE.gpus_per_node, HARDWARE.gpus_per_node)
    peers = MoEConfig(ep_size=16, schedule="peers", depth=1)
    return [fault for make in (forward_schedule, backward_schedule) for fault in check(make(peers, torus))]


def law(name: str, index: int) -> Callable[[Stated, Hardware], Derived]:
    """The derivation of a scaling law's R2; memory's follows from shapes."""
    texts = {
        "tps": "1 on links that cost nothing",
        "tpot": "1 on links that cost nothing",
        "busy": "the law is 0 at EP=1, where a GPU waits for nobody",
    }

    def derive(stated: Stated, hardware: Hardware) -> Derived:
        r2 = _memory_r2() if name == "memory_per_expert" else None
        text = texts[name] if r2 is None else f"{number(r2, 3)} from shapes, EP = 1 to 16"
        return Derived(text, (figure_number("r2", "ratio", stated.r2[index], r2),), {} if r2 is None else {"r2": r2})

    return derive


def _memory_r2() -> float:
    """R2 of 1/EP for weights, gradients and optimizer states of a rank, over the experts of a layer."""
    values = {}
    for ep in (1, 2, 4, 8, 16):
        moe = dataclasses.replace(EP16, ep_size=ep)
        training = dataclasses.replace(TRAINING, world_size=ep, ep_size=ep)
        values[ep] = count_memory(MODEL, moe, training).persistent / moe.num_experts
    r2 = fit("memory_per_expert", values).r2
    assert r2 is not None, "memory falls with EP"
    return r2
