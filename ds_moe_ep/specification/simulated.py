"""The simulated column of the claims: what the document's two jobs do on a cluster.

EP16 runs on the batch of 1,024 sequences, one per micro-batch, under the schedule that "auto" would take; TP8/PP2 in
its 4 micro-batches, which are as large as fit. Both recompute activations, as their ds_configs do, and are simulated
without it, too, where that fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ds_moe_ep.records.names import LAWS, PARTS, TOTALS
from ds_moe_ep.records.quantity import Quantity, gigabytes, number
from ds_moe_ep.specification.claim import SYSTEMS, Simulated, SimulatedJobs, SimulatedStep
from ds_moe_ep.specification.laws import r2_text
from ds_moe_ep.specification.stated import BATCH_TOKENS, MODEL, Stated
from ds_moe_ep.specification.verdicts import compared_range, reached, slower

Answer = Callable[[SimulatedJobs, Stated], Simulated]


def memory(system: str) -> Answer:
    """The answer for a system: the bytes of its fullest device, and whether it has so many."""

    def answer(jobs: SimulatedJobs, stated: Stated) -> Simulated:
        found, sequences = jobs.memory(system)
        text = f"{gigabytes(found.peak, 1)} with activations of {sequences} sequence{'s' * (sequences > 1)} and buffers"
        if found.peak > jobs.free_bytes:
            text += f": does not fit, times are of devices with more than {gigabytes(jobs.free_bytes, 1)} free"
        return Simulated(text=text, numbers=(Quantity.of(found.peak, unit="bytes", name="peak"),))

    return answer


def distribution(jobs: SimulatedJobs, stated: Stated) -> Simulated:
    """A batch's dispatch in one layer: half of what a layer exchanges forward."""
    ms = jobs.serial.estimate(lambda step: step.traffic_us / (2 * MODEL.num_layers) / 1e3, "ms").named("each_way")
    verdict = slower(stated.distribution_ms, ms.low, ms.high)
    return Simulated(text=f"{_text(ms)} ms, each way and layer", numbers=(ms,), verdict=verdict)


def expert_time(jobs: SimulatedJobs, stated: Stated) -> Simulated:
    """Time of a batch at a layer's experts, forward."""
    ms = jobs.serial.estimate(lambda step: _expert_us(step) / MODEL.num_layers / 1e3, "ms").named("forward")
    return Simulated(text=f"{_text(ms)} ms", numbers=(ms,), verdict=slower(stated.expert_ms, ms.low, ms.high))


def _expert_us(step: Any) -> float:
    """Microseconds that all layers' experts compute in a step of forward passes."""
    spans = (span for span in step.spans if span.lane == "compute" and span.name.startswith("compute "))
    found: float = step.setup.training.accumulation * sum(span.stop_us - span.start_us for span in spans)
    return found


def hidden(jobs: SimulatedJobs, stated: Stated) -> Simulated:
    """Share of EP16's traffic behind compute in training."""
    found = jobs.ep16.hidden
    if found is None:
        return Simulated(text="nothing travels")
    verdict = reached(stated.hidden, found.low, found.high)
    return Simulated(text=f"{_text(found.scaled(100))} % in training", numbers=(found.named("share"),), verdict=verdict)


def tps(jobs: SimulatedJobs, stated: Stated) -> Simulated:
    """Tokens per second of both systems, in training and forward."""
    found = {
        ("training", ""): (jobs.base, jobs.ep16),
        ("forward", "_forward"): (jobs.base_forward, jobs.ep16_forward),
        ("training without recomputation", "_without_recompute"): (jobs.base_kept, jobs.ep16_kept),
    }
    texts, verdicts, numbers = [], [], []
    for (mode, end), both in found.items():
        its = [(name, step.tps) for name, step in zip(SYSTEMS, both, strict=True) if step is not None]
        if its:
            limits = dict(zip(SYSTEMS, stated.tps, strict=True))
            said = (f"{SYSTEMS[name]} {reached(limits[name], rate.low, rate.high)}" for name, rate in its)
            texts.append(f"{mode}: {_both([rate for _, rate in its])}")
            verdicts.append(f"{', '.join(said)} ({mode})")
            numbers += [rate.named(name + end) for name, rate in its]
    return Simulated(text="; ".join(texts), numbers=tuple(numbers), verdict="; ".join(verdicts))


def ratio(jobs: SimulatedJobs, stated: Stated) -> Simulated:
    """Throughput of EP16 over that of TP8/PP2."""
    found = {"training": jobs.ep16.over(jobs.base), "forward": jobs.ep16_forward.over(jobs.base_forward)}
    if jobs.ep16_kept is not None and jobs.base_kept is not None:
        found["training without recomputation"] = jobs.ep16_kept.over(jobs.base_kept)
    return Simulated(
        text=", ".join(f"{_text(its)} {mode}" for mode, its in found.items()),
        numbers=tuple(its.named(mode.replace(" ", "_")) for mode, its in found.items()),
        verdict="; ".join(f"{reached(stated.ratio, its.low, its.high)} ({mode})" for mode, its in found.items()),
    )


def batches(jobs: SimulatedJobs, stated: Stated) -> Simulated:
    """Batches per second of both systems."""
    return _of_both([step.tps.scaled(1 / BATCH_TOKENS, "1/s") for step in (jobs.base, jobs.ep16)], "in training")


def tpot(jobs: SimulatedJobs, stated: Stated) -> Simulated:
    """Time per token of both systems."""
    found = [step.estimate(lambda its: its.tpot_us, "us") for step in (jobs.base, jobs.ep16)]
    return _of_both(found, "us in training")


def _of_both(found: Sequence[Quantity], said: str) -> Simulated:
    return Simulated(text=f"{_both(found)} {said}", numbers=_named(found))


def pieces_tp8_pp2(jobs: SimulatedJobs, stated: Stated) -> Simulated:
    """TP8/PP2's time per token in parts."""
    return _pieces(jobs.base)


def pieces_ep16(jobs: SimulatedJobs, stated: Stated) -> Simulated:
    """EP16's time per token in parts."""
    return _pieces(jobs.ep16)


def _pieces(job: SimulatedStep) -> Simulated:
    """Time of a token in each part of a step."""
    tokens, parts_us = job.step.setup.batch_tokens, job.step.parts_us
    parts = {part: parts_us[part] / tokens for part in PARTS if parts_us.get(part)}
    text = f"{' + '.join(f'{number(us, significant=2)} {PARTS[part]}' for part, us in parts.items())} us per token"
    return Simulated(text=text, numbers=tuple(Quantity.of(us, unit="us", name=part) for part, us in parts.items()))


def gain(jobs: SimulatedJobs, stated: Stated) -> Simulated:
    """Gain of EP16 in the share of a step that is busy."""
    pairs = zip(jobs.ep16.steps, jobs.base.steps, strict=True)
    found = Quantity.of(*(100 * (ours.busy / theirs.busy - 1) for ours, theirs in pairs), unit="percent", name="gain")
    verdict = reached(stated.gain_percent, found.low, found.high)
    return Simulated(text=f"{_text(found)} % more of a step busy", numbers=(found,), verdict=verdict)


def utilization(jobs: SimulatedJobs, stated: Stated) -> Simulated:
    """Shares of a step that are busy, and of the peak that is used."""
    both = jobs.base, jobs.ep16
    busy = [step.estimate(lambda its: its.busy, "ratio") for step in both]
    mfu = [step.estimate(lambda its: its.mfu, "ratio") for step in both]
    shares = [" and ".join(f"{_text(its.scaled(100))} %" for its in found) for found in (busy, mfu)]
    triples = zip(SYSTEMS.values(), stated.utilization_percent, busy, strict=True)
    places = ", ".join(
        f"{title} {compared_range(its, 100 * found.low, 100 * found.high)}" for title, its, found in triples
    )
    return Simulated(
        text=f"busy: {shares[0]}; of peak: {shares[1]}",
        numbers=(*_named(busy), *_named(mfu, "_of_peak")),
        verdict=f"busy share {places} what is stated",
    )


def bubble(jobs: SimulatedJobs, stated: Stated) -> Simulated:
    """Share of TP8/PP2's step that waits."""
    share = jobs.base.estimate(lambda step: step.parts_us["pipeline"] / step.step_us, "ratio").named("share")
    return Simulated(
        text=f"{_text(share.scaled(100))} % of a step waits for the other stage or sends", numbers=(share,)
    )


def law(name: str) -> Answer:
    """The answer for a scaling law: its R2 under both totals."""

    def answer(jobs: SimulatedJobs, stated: Stated) -> Simulated:
        least, numbers = dict(zip(LAWS, stated.r2, strict=True))[name], []
        for total in TOTALS:
            for its in jobs.law_fits(total):
                if its.law == name and its.r2 is not None:
                    numbers.append(Quantity.of(its.r2, unit="ratio", name=total, title=TOTALS[total]))
        text = ", ".join(f"{r2_text(r2.value, 3)} {r2.title}" for r2 in numbers) or "nothing varies"
        holds = numbers and min(r2.value for r2 in numbers) >= least
        return Simulated(text=text, numbers=tuple(numbers), verdict="holds" if holds else "does not hold")

    return answer


def _named(found: Sequence[Quantity], end: str = "") -> tuple[Quantity, ...]:
    return tuple(quantity.named(name + end) for name, quantity in zip(SYSTEMS, found, strict=True))


def _both(found: Sequence[Quantity]) -> str:
    return " and ".join(map(_text, found))


def _text(quantity: Quantity) -> str:
    return quantity.text(digits=3)
