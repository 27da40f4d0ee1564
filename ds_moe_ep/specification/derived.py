"""The specification's figures beside what its own shapes and links imply; none of them was measured here.

A derived number says what arithmetic allows on the stated hardware, not what any program reached. What is stated comes
from stated.py; both columns are numbers, and every verdict is computed from them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.records.names import LAWS
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
from ds_moe_ep.specification.laws import fit
from ds_moe_ep.specification.stated import (
    BASELINE,
    BATCH_TOKENS,
    EP16,
    EXPERT_TOKENS,
    HARDWARE,
    MODEL,
    STATED,
    TRAINING,
    Hardware,
    Stated,
)
from ds_moe_ep.specification.verdicts import agree, at_least, compared, near, percent, times, within_limit


@dataclass(frozen=True, kw_only=True)
class FigureNumber:
    """One number of a figure, stated and derived, in `unit`; None where there is none."""

    what: str
    unit: str
    stated: float | None = None
    derived: float | None = None


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure: what the specification states, what follows from its shapes, and how the two agree."""

    key: str
    name: str
    section: str  # of the document
    stated: str
    derived: str
    verdict: str
    numbers: tuple[FigureNumber, ...] = ()


RATIO = "tokens a second, EP16 over TP8/PP2"


def stated_and_derived(stated: Stated = STATED, hardware: Hardware = HARDWARE) -> tuple[Figure, ...]:
    """The specification's figures in the order of its sections."""
    return (
        *_memory_figures(stated, hardware),
        *_time_figures(stated, hardware),
        *_rate_figures(stated, hardware),
        *_piece_figures(stated, hardware),
        *_traffic_figures(stated, hardware),
        *_scaling_figures(stated),
    )


def cluster_traffic_ratio(hardware: Hardware = HARDWARE) -> float:
    """EP16's traffic over its compute in training, on the specification's cluster at peak, with a link a node.

    Traffic: four exchanges a layer (dispatch and combine, forward and backward) of a GPU's 12 of 16 rows, of 4 GPUs
    over one 200 GB/s link. Compute: three times the forward arithmetic at 989 TFLOP/s.
    """
    tokens = BATCH_TOKENS // hardware.num_gpus
    far_bytes = tokens * MODEL.hidden_size * 2 * hardware.far_share * hardware.gpus_per_node
    traffic_s = 4 * MODEL.num_layers * far_bytes / hardware.link_bytes_per_s
    return traffic_s / (tokens * training_flops(MODEL, EP16) / hardware.peak_flops)


def _memory_figures(stated: Stated, hardware: Hardware) -> Iterable[Figure]:
    expert, expert_bytes = MODEL.expert_params, 2 * MODEL.expert_params
    counts_parameters = agree(stated.expert_mb * 1e6, expert)
    yield Figure(
        key="expert",
        name="one expert",
        section="2.1",
        stated=f"{stated.expert_mb:g} MB",
        derived=f"{expert / 1e6:.1f} M parameters, {expert_bytes / 1e6:,.0f} MB in FP16",
        verdict="the stated number counts parameters, not bytes"
        if counts_parameters
        else compared(stated.expert_mb * 1e6, expert_bytes),
        numbers=(FigureNumber(what="bytes", unit="bytes", stated=stated.expert_mb * 1e6, derived=expert_bytes),),
    )
    kept, weights = count_memory(MODEL, EP16, TRAINING).persistent, 2 * count_rank_parameters(MODEL, EP16).total
    yield Figure(
        key="memory_ep16",
        name="memory of a GPU, EP16",
        section="3.1",
        stated=f"{stated.ep16_memory_mb:g} MB",
        derived=f"{weights / 1e9:.2f} GB of weights; {kept / 1e9:.1f} GB with gradients, Adam, ZeRO-1",
        verdict=at_least(stated.ep16_memory_mb * 1e6, weights, "the weights alone are"),
        numbers=(FigureNumber(what="peak", unit="bytes", stated=stated.ep16_memory_mb * 1e6, derived=kept),),
    )
    share = 2 * count_parameters(MODEL, EP16).total / hardware.num_gpus
    yield Figure(
        key="memory_tp8_pp2",
        name="memory of a GPU, TP8/PP2",
        section="2.1",
        stated=f"{stated.base_memory_gb:g} GB",
        derived=f"{share / 1e9:.2f} GB of weights, all cut over {hardware.num_gpus}",
        verdict=f"{near(stated.base_memory_gb * 1e9, share)}, by another route",
        numbers=(FigureNumber(what="peak", unit="bytes", stated=stated.base_memory_gb * 1e9, derived=share),),
    )
    hidden = EXPERT_TOKENS * MODEL.expert_width * 2
    fits = hidden + kept <= hardware.memory_bytes
    yield Figure(
        key="activations",
        name="activations of one batch at one expert",
        section="-",
        stated="-",
        derived=f"{hidden / 1e9:.1f} GB",
        verdict="fits in one piece" if fits else "too much in one piece: a batch needs micro-batches and recomputation",
        numbers=(FigureNumber(what="hidden_rows", unit="bytes", derived=hidden),),
    )


def _time_figures(stated: Stated, hardware: Hardware) -> Iterable[Figure]:
    yield Figure(
        key="expert_tokens",
        name="tokens of an expert",
        section="3.1",
        stated=f"{stated.expert_tokens:,}",
        derived=f"{EXPERT_TOKENS:,}",
        verdict=f"{compared(stated.expert_tokens, EXPERT_TOKENS)} for balanced top-1 routing",
        numbers=(FigureNumber(what="rows", unit="rows", stated=stated.expert_tokens, derived=EXPERT_TOKENS),),
    )
    sent = EXPERT_TOKENS * MODEL.hidden_size * 2
    node_ms = sent / hardware.node_bytes_per_s * 1e3
    link_ms = sent * hardware.far_share / hardware.link_bytes_per_s * 1e3
    shared_ms = hardware.gpus_per_node * link_ms
    far_ranks = hardware.num_gpus - hardware.gpus_per_node
    if agree(stated.distribution_ms, node_ms):
        verdict = "holds only if no byte leaves a node"
    else:
        verdict = at_least(stated.distribution_ms, link_ms, "a link a GPU takes")
    yield Figure(
        key="distribution",
        name="distribution of tokens",
        section="3.2",
        stated=f"{stated.distribution_ms:g} ms",
        derived=f"{node_ms:.1f} ms at {hardware.node_bytes_per_s / 1e9:g} GB/s; {link_ms:.1f} ms with a link a GPU; "
        f"{shared_ms:.0f} ms with a link a node",
        verdict=f"{verdict}; {far_ranks} of {hardware.num_gpus} destinations are on others",
        numbers=(
            FigureNumber(what="inside_a_node", unit="ms", stated=stated.distribution_ms, derived=node_ms),
            FigureNumber(what="link_a_gpu", unit="ms", derived=link_ms),
            FigureNumber(what="link_a_node", unit="ms", derived=shared_ms),
        ),
    )
    expert_ms = EXPERT_TOKENS * 2 * MODEL.expert_params / hardware.peak_flops * 1e3
    yield Figure(
        key="expert_time",
        name="expert computation",
        section="3.2",
        stated=f"{stated.expert_ms:.1f} ms",
        derived=f"{expert_ms:.0f} ms at peak",
        verdict=within_limit(1 / stated.expert_ms, 1 / expert_ms, "the peak"),
        numbers=(FigureNumber(what="forward", unit="ms", stated=stated.expert_ms, derived=expert_ms),),
    )
    allowed, derived = (min(compute / (2 * stated.distribution_ms), 1.0) for compute in (stated.expert_ms, expert_ms))
    contradicts = stated.hidden > allowed and not agree(stated.hidden, allowed)
    yield Figure(
        key="hidden",
        name="communication hidden",
        section="3.2",
        stated=percent(stated.hidden),
        derived=f"at most {percent(allowed)} with the stated {stated.expert_ms:.1f} ms; "
        f"{'all of it' if derived == 1 else percent(derived)} with {expert_ms:.0f} ms",
        verdict=f"contradicts the stated times, which allow {percent(allowed)}"
        if contradicts
        else "possible with the stated times",
        numbers=(FigureNumber(what="share", unit="ratio", stated=stated.hidden, derived=derived),),
    )


def _rate_figures(stated: Stated, hardware: Hardware) -> Iterable[Figure]:
    forward, training = forward_flops(MODEL, EP16), training_flops(MODEL, EP16)
    peak = hardware.num_gpus * hardware.peak_flops
    limit = peak / training
    base, ours = stated.tps
    yield Figure(
        key="tps",
        name="tokens a second, TP8/PP2 and EP16",
        section="4.1",
        stated=f"{base:,} and {ours:,}",
        derived=f"limit {peak / forward / 1e6:.2f} M forward, {limit / 1e3:.0f} k training "
        f"({forward / 1e9:.2f} and {training / 1e9:.1f} GFLOP a token)",
        verdict=within_limit(ours, limit, "peak in training", f"{ours / 1e3:g} k is "),
        numbers=(
            FigureNumber(what="tp8_pp2", unit="tokens/s", stated=base, derived=limit),
            FigureNumber(what="ep16", unit="tokens/s", stated=ours, derived=limit),
            FigureNumber(what="ep16_forward", unit="tokens/s", derived=peak / forward),
        ),
    )
    yield Figure(
        key="ratio",
        name=RATIO,
        section="4.1",
        stated=f"{stated.ratio:g}",
        derived=f"{ours / 1e3:g}/{base / 1e3:g} = {ours / base:.2f}",
        verdict=compared(stated.ratio, ours / base),
        numbers=(FigureNumber(what="ep16", unit="ratio", stated=stated.ratio, derived=ours / base),),
    )
    batch_rates = tuple(tps / BATCH_TOKENS for tps in stated.tps)
    token_us, tpot_us = tuple(1e6 / tps for tps in stated.tps), tuple(1e3 * ms for ms in stated.tpot_ms)
    batches = map(compared, stated.batches_per_s, batch_rates)
    yield Figure(
        key="batches",
        name="batches a second",
        section="4.1",
        stated=" and ".join(f"{rate:g}" for rate in stated.batches_per_s),
        derived=" and ".join(f"{rate:.4f}" for rate in batch_rates),
        verdict=_off(batches, "they are thousandths"),
        numbers=_both("1/s", stated.batches_per_s, batch_rates),
    )
    yield Figure(
        key="tpot",
        name="time of a token (TPOT)",
        section="4.2",
        stated=" and ".join(f"{ms:g}" for ms in stated.tpot_ms) + " ms",
        derived=" and ".join(f"{us:.2f}" for us in token_us) + " us",
        verdict=_off(map(compared, tpot_us, token_us), "milliseconds of 1,000 tokens"),
        numbers=_both("us", tpot_us, token_us),
    )


def _piece_figures(stated: Stated, hardware: Hardware) -> Iterable[Figure]:
    for place, (system, pieces) in enumerate((("TP8/PP2", stated.base_pieces_ms), ("EP16", stated.ep16_pieces_ms))):
        total, whole = sum(pieces), stated.tpot_ms[place]
        adds_up = f"{' + '.join(f'{piece:g}' for piece in pieces)} = {whole:g} ms"
        yield Figure(
            key=f"pieces_{('tp8_pp2', 'ep16')[place]}",
            name=f"latency pieces, {system}",
            section="4.2",
            stated=adds_up,
            derived=f"{total:.2f} ms",
            verdict="consistent with itself" if agree(total, whole) else f"does not add up: {percent(total / whole)}",
            numbers=(FigureNumber(what="sum", unit="ms", stated=whole, derived=total),),
        )
    before, after = sum(stated.utilization_percent[0]) / 2, stated.utilization_percent[1][1]
    gain = 100 * (after / before - 1)
    yield Figure(
        key="gain",
        name="gain in GPU efficiency",
        section="4.1",
        stated=f"{stated.gain_percent:g} %",
        derived=f"{after:g}/{before:g} - 1 = {gain:.1f} %",
        verdict=compared(stated.gain_percent, gain),
        numbers=(FigureNumber(what="gain", unit="percent", stated=stated.gain_percent, derived=gain),),
    )
    peak = hardware.num_gpus * hardware.peak_flops / training_flops(MODEL, EP16)
    needed = tuple(tps / peak for tps in stated.tps)
    is_busy_share = all(need <= low / 100 for need, (low, _) in zip(needed, stated.utilization_percent, strict=True))
    yield Figure(
        key="utilization",
        name="utilization, TP8/PP2 and EP16",
        section="4.1",
        stated=" and ".join(f"{low:g}-{high:g} %" for low, high in stated.utilization_percent),
        derived=f"{' and '.join(map(percent, needed))} of peak are what the stated tokens a second need in training",
        verdict="possible as shares of time busy, which are not shares of peak"
        if is_busy_share
        else "contradicts the stated tokens a second, which need more",
        numbers=_both("ratio", tuple(sum(pair) / 200 for pair in stated.utilization_percent), needed),
    )


def _traffic_figures(stated: Stated, hardware: Hardware) -> Iterable[Figure]:
    ep16 = 2 * dispatch_bytes(BATCH_TOKENS // hardware.num_gpus, MODEL, EP16, "fp16")
    tp = BASELINE.tp_size
    tp8 = 2 * (tp - 1) / tp * 2 * BATCH_TOKENS * MODEL.hidden_size * 2
    yield Figure(
        key="bytes",
        name="bytes of a GPU and layer, forward, TP8 and EP16",
        section="-",
        stated="-",
        derived=f"{tp8 / 1e9:.0f} GB and {ep16 / 1e9:.1f} GB",
        verdict=f"why experts win: {times(tp8 / ep16)} fewer bytes" if tp8 > ep16 else "experts move no fewer bytes",
        numbers=_both("bytes", None, (tp8, ep16)),
    )
    training = dataclasses.replace(TRAINING, layout=BASELINE, accumulation=stated.micro_batches)
    yield Figure(
        key="bubble",
        name=f"pipeline bubble, {BASELINE.pp_size} stages, {stated.micro_batches} micro-batches",
        section="2.1",
        stated="-",
        derived=percent(bubble(training)),
        verdict="the baseline's",
        numbers=(FigureNumber(what="share", unit="ratio", derived=bubble(training)),),
    )
    torus = Torus(hardware.num_gpus // hardware.gpus_per_node, hardware.gpus_per_node)
    peers = MoEConfig(ep_size=16, schedule="peers", depth=1)
    wrong = [fault for make in (forward_schedule, backward_schedule) for fault in check(make(peers, torus))]
    yield Figure(
        key="connections",
        name="CUDA_DEVICE_MAX_CONNECTIONS",
        section="5.1",
        stated=f"{stated.max_connections}",
        derived="launches run in issue order, so a transfer must be issued before the compute that hides it",
        verdict=f"not held: {wrong[0]}" if wrong else "held by the schedule, as its check finds",
        numbers=(FigureNumber(what="connections", unit="count", stated=stated.max_connections),),
    )


def _scaling_figures(stated: Stated) -> Iterable[Figure]:
    on_free_links = "1 on links that cost nothing", "possible"
    derived = {
        "tps": on_free_links,
        "tpot": on_free_links,
        "busy": ("the law is 0 at EP=1, where a GPU waits for nobody", "contradicts what happens at EP=1"),
    }
    for (law, title), r2 in zip(LAWS.items(), stated.r2, strict=True):
        from_shapes = _memory_r2() if law == "memory_per_expert" else None
        if from_shapes is not None:
            derived[law] = f"{from_shapes:.3f} from shapes, EP = 1 to 16", compared(r2, from_shapes)
        yield Figure(
            key=f"law_{law}",
            name=f"R\u00b2 of {title}",
            section="4.3",
            stated=f"{r2:g}",
            derived=derived[law][0],
            verdict=derived[law][1],
            numbers=(FigureNumber(what="r2", unit="ratio", stated=r2, derived=from_shapes),),
        )


def _memory_r2() -> float | None:
    """How well 1/EP describes weights, gradients and optimizer states of a rank, over the experts of a layer."""
    values = {}
    for ep in (1, 2, 4, 8, 16):
        moe = dataclasses.replace(EP16, ep_size=ep)
        training = dataclasses.replace(TRAINING, world_size=ep, ep_size=ep)
        values[ep] = count_memory(MODEL, moe, training).persistent / moe.num_experts
    return fit("memory_per_expert", values).r2


def _off(verdicts: Iterable[str], remark: str) -> str:
    """One verdict for both systems; the remark where both are off by 1,000."""
    found = list(dict.fromkeys(verdicts))
    if found == ["off by 1,000"]:
        return f"{found[0]}: {remark}"
    return " and ".join(found)


def _both(unit: str, stated: Iterable[float] | None, derived: Iterable[float]) -> tuple[FigureNumber, ...]:
    """A number of each system."""
    values = list(stated) if stated is not None else [None, None]
    pairs = zip(("tp8_pp2", "ep16"), values, derived, strict=True)
    return tuple(FigureNumber(what=what, unit=unit, stated=a, derived=b) for what, a, b in pairs)
