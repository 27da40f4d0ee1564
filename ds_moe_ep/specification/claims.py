"""The claims of the specification's document, in the order of its sections: each is a row of one table.

What is stated comes from stated.py, what follows from it from derived.py, and what its jobs do from simulated.py;
`figures` prints the first two, `audit` all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ds_moe_ep.records.names import LAWS
from ds_moe_ep.records.quantity import number
from ds_moe_ep.specification import derived, simulated
from ds_moe_ep.specification.claim import SYSTEMS, Claim, Derived, Figure
from ds_moe_ep.specification.stated import BASELINE, EXPERT_TOKENS, HARDWARE, STATED, Hardware, Stated
from ds_moe_ep.specification.verdicts import agree, at_least, compared, near, rounded_percent, times, within_limit

RATIO = "tokens per second, EP16 over TP8/PP2"
NOT_STATED = "-"


def _expert(stated: Stated, its: Derived) -> str:
    if agree(stated.expert_mb * 1e6, its["parameters"]):
        return "the stated number counts parameters, not bytes"
    return compared(stated.expert_mb * 1e6, its["bytes"])


def _activations(stated: Stated, its: Derived) -> str:
    if its["rows"] <= its["room"]:
        return "fits in one piece"
    return "too much in one piece: a batch needs micro-batches and recomputation"


def _distribution(stated: Stated, its: Derived) -> str:
    if agree(stated.distribution_ms, its["node_ms"]):
        verdict = "holds only if no byte leaves a node"
    else:
        verdict = at_least(stated.distribution_ms, its["link_ms"], "a link per GPU takes")
    return f"{verdict}; {number(its['far'], 0)} of {number(its['all'], 0)} destinations are on others"


def _hidden(stated: Stated, its: Derived) -> str:
    allowed = its["allowed"]
    if stated.hidden > allowed and not agree(stated.hidden, allowed):
        return f"contradicts the stated times, which allow {rounded_percent(allowed)}"
    return "possible with the stated times"


def _utilization(stated: Stated, its: Derived) -> str:
    needed = [its[name] for name in SYSTEMS]
    if all(need <= low / 100 for need, (low, _) in zip(needed, stated.utilization_percent, strict=True)):
        return "possible as shares of time busy, which are not shares of peak"
    return "contradicts the stated tokens per second, which need more"


def _bytes(stated: Stated, its: Derived) -> str:
    tp8, ep16 = its["tp8_pp2"], its["ep16"]
    return f"why experts win: {times(tp8 / ep16)} fewer bytes" if tp8 > ep16 else "experts move no fewer bytes"


def _connections(stated: Stated, its: Derived) -> str:
    faults = derived.schedule_faults()
    return f"not held: {faults[0]}" if faults else "held by the schedule, as its check finds"


def _pieces(stated: Stated, its: Derived) -> str:
    total, whole = its["total"], its["whole"]
    return "consistent with itself" if agree(total, whole) else f"does not add up: {rounded_percent(total / whole)}"


def _off(stated: Iterable[float], its: Derived, remark: str) -> str:
    """One verdict for both systems; the remark where both are off by 1,000."""
    found = list(dict.fromkeys(compared(a, its[name]) for a, name in zip(stated, SYSTEMS, strict=True)))
    return f"{found[0]}: {remark}" if found == ["off by 1,000"] else " and ".join(found)


def _law(name: str, index: int) -> Callable[[Stated, Derived], str]:
    verdicts = {"tps": "possible", "tpot": "possible", "busy": "contradicts what happens at EP=1"}

    def judge(stated: Stated, its: Derived) -> str:
        return compared(stated.r2[index], its["r2"]) if name == "memory_per_expert" else verdicts[name]

    return judge


def _quotient(stated: float, derived: float) -> str:
    """The verdict on a number that follows from others that are stated: it holds of those, measured or not."""
    verdict = compared(stated, derived)
    return f"{verdict} as a quotient of what is stated" if verdict == "holds" else verdict


def _nothing(stated: Stated) -> str:
    return NOT_STATED


def _each(numbers: Iterable[float], sign: str = " and ") -> str:
    return sign.join(number(each, significant=6) for each in numbers)


def _law_claim(index: int, name: str, title: str) -> Claim:
    return Claim(f"law_{name}", f"R\u00b2 of {title}", "4.3", lambda s: f"{s.r2[index]:g}",
        derived.law(name, index), _law(name, index), simulated.law(name))  # fmt: skip


# key, name, section, stated, derive, judge, simulate
CLAIMS = (
    Claim("expert", "one expert", "2.1", lambda s: f"{s.expert_mb:g} MB", derived.expert, _expert),
    Claim("memory_ep16", "memory of a GPU, EP16", "3.1", lambda s: f"{s.ep16_memory_mb:g} MB", derived.memory_ep16,
        lambda s, its: at_least(s.ep16_memory_mb * 1e6, its["weights"], "the weights alone are"),
        simulated.memory("ep16")),
    Claim("memory_tp8_pp2", "memory of a GPU, TP8/PP2", "2.1", lambda s: f"{s.base_memory_gb:g} GB",
        derived.memory_tp8_pp2, lambda s, its: f"{near(s.base_memory_gb * 1e9, its['share'])}, by another route",
        simulated.memory("tp8_pp2")),
    Claim("activations", "activations of one batch at one expert", "-", _nothing, derived.activations, _activations),
    Claim("expert_tokens", "tokens of an expert", "3.1", lambda s: f"{s.expert_tokens:,}", derived.expert_tokens,
        lambda s, _: f"{compared(s.expert_tokens, EXPERT_TOKENS)} for balanced top-1 routing"),
    Claim("distribution", "distribution of tokens", "3.2", lambda s: f"{s.distribution_ms:g} ms",
        derived.distribution, _distribution, simulated.distribution),
    Claim("expert_time", "expert computation", "3.2", lambda s: f"{number(s.expert_ms, 1)} ms", derived.expert_time,
        lambda s, its: within_limit(1 / s.expert_ms, 1 / its["ms"], "the peak"), simulated.expert_time),
    Claim("hidden", "communication hidden", "3.2", lambda s: rounded_percent(s.hidden),
        derived.hidden, _hidden, simulated.hidden),
    Claim("tps", "tokens per second, TP8/PP2 and EP16", "4.1", lambda s: f"{s.tps[0]:,} and {s.tps[1]:,}", derived.tps,
        lambda s, its: within_limit(s.tps[1], its["limit"], "peak in training", f"{s.tps[1] / 1e3:g} k is "),
        simulated.tps),
    Claim("ratio", RATIO, "4.1", lambda s: f"{s.ratio:g}", derived.ratio,
        lambda s, its: _quotient(s.ratio, its["ratio"]), simulated.ratio),
    Claim("batches", "batches per second", "4.1", lambda s: _each(s.batches_per_s), derived.batches,
        lambda s, its: _off(s.batches_per_s, its, "they are thousandths"), simulated.batches),
    Claim("tpot", "time per token (TPOT)", "4.2", lambda s: f"{_each(s.tpot_ms)} ms", derived.tpot,
        lambda s, its: _off([1e3 * ms for ms in s.tpot_ms], its, "milliseconds of 1,000 tokens"), simulated.tpot),
    Claim("pieces_tp8_pp2", "latency pieces, TP8/PP2", "4.2",
        lambda s: f"{_each(s.base_pieces_ms, ' + ')} = {s.tpot_ms[0]:g} ms",
        derived.pieces(0), _pieces, simulated.pieces_tp8_pp2),
    Claim("pieces_ep16", "latency pieces, EP16", "4.2",
        lambda s: f"{_each(s.ep16_pieces_ms, ' + ')} = {s.tpot_ms[1]:g} ms",
        derived.pieces(1), _pieces, simulated.pieces_ep16),
    Claim("gain", "gain in GPU efficiency", "4.1", lambda s: f"{s.gain_percent:g} %", derived.gain,
        lambda s, its: _quotient(s.gain_percent, its["gain"]), simulated.gain),
    Claim("utilization", "utilization, TP8/PP2 and EP16", "4.1",
        lambda s: " and ".join(f"{low:g}-{high:g} %" for low, high in s.utilization_percent),
        derived.utilization, _utilization, simulated.utilization),
    Claim("bytes", "bytes per GPU and layer, forward, TP8 and EP16", "-", _nothing, derived.traffic_bytes, _bytes),
    Claim("bubble", f"pipeline bubble, {BASELINE.pp_size} stages, {STATED.micro_batches} micro-batches", "2.1",
        _nothing, derived.pipeline_bubble, lambda *_: "the baseline's", simulated.bubble),
    Claim("connections", "CUDA_DEVICE_MAX_CONNECTIONS", "5.1", lambda s: f"{s.max_connections}",
        derived.connections, _connections),
    *(_law_claim(index, name, title) for index, (name, title) in enumerate(LAWS.items())),
)  # fmt: skip


def stated_and_derived(stated: Stated = STATED, hardware: Hardware = HARDWARE) -> tuple[Figure, ...]:
    """Every claim on some hardware, without a simulation."""
    return tuple(claim.figure(stated, hardware) for claim in CLAIMS)
