"""The specification's figures: stated, derived from shapes, simulated on a cluster, and what that makes of them.

What is stated and derived comes from derived.py, on the cluster's peak and links. Simulated are the specification's two
jobs on all of its devices: EP16 on the batch of 1,024 sequences, one a micro-batch, under the schedule that "auto"
would take; TP8/PP2 in its 4 micro-batches, which are as large as fit. Both recompute activations, as their ds_configs
do, and are simulated without it, too, where that fits. Every verdict is computed from the row's numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ds_moe_ep.records.names import LAWS, PARTS, TOTALS
from ds_moe_ep.simulate.audit.runs import Runs, hardware_of
from ds_moe_ep.simulate.cluster.cluster import Cluster
from ds_moe_ep.simulate.job.fit import memory_of
from ds_moe_ep.simulate.step.predict import Estimate, Prediction
from ds_moe_ep.simulate.step.setup import Step
from ds_moe_ep.sizing.footprint import Memory
from ds_moe_ep.specification.derived import Figure, stated_and_derived
from ds_moe_ep.specification.laws import r2_text
from ds_moe_ep.specification.stated import BATCH_TOKENS, MODEL, STATED, Stated
from ds_moe_ep.specification.verdicts import compared_range, reached, slower

NONE = "-"
TITLES = {"tp8_pp2": "TP8/PP2", "ep16": "EP16"}


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """What the simulation says to one figure: as text, as numbers with their units, and what it adds to the verdict."""

    text: str
    numbers: Mapping[str, tuple[Estimate, str]] = dataclasses.field(default_factory=dict)
    verdict: str = ""


@dataclass(frozen=True, kw_only=True)
class AuditRow:
    """One figure of the audit; nothing is simulated of what only shapes decide."""

    figure: Figure
    simulated: Simulated | None

    @property
    def numbers(self) -> Mapping[str, tuple[Estimate, str]]:
        """What was simulated, with its units."""
        return self.simulated.numbers if self.simulated else {}

    @property
    def verdict(self) -> str:
        """What the stated number is worth, from all three columns."""
        added = self.simulated.verdict if self.simulated else ""
        return f"{self.figure.verdict}; simulated: {added}" if added else self.figure.verdict

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text, under `HEAD`."""
        figure = self.figure
        text = self.simulated.text if self.simulated else NONE
        return figure.name, figure.section, figure.stated, figure.derived, text, self.verdict


HEAD = ("figure", "section", "stated", "derived", "simulated", "verdict")


def audit(cluster: Cluster, stated: Stated = STATED) -> tuple[AuditRow, ...]:
    """Every figure of the specification on a cluster of 16 devices. Raises ConfigError for another number of them."""
    runs = Runs(cluster)
    rows = []
    for figure in stated_and_derived(stated, hardware_of(cluster)):
        answer = ANSWERS.get(figure.key)
        rows.append(AuditRow(figure=figure, simulated=answer(runs, stated) if answer else None))
    return tuple(rows)


Answer = Callable[[Runs, Stated], Simulated]


def _memory(runs: Runs, which: str) -> Simulated:
    setup = runs.ep16_setup if which == "ep16" else runs.base_setup
    memory: Memory = memory_of(setup, setup.training)
    sequences = setup.training.micro_batch
    text = f"{memory.peak / 1e9:.1f} GB with activations of {sequences} sequence{'s' * (sequences > 1)} and buffers"
    if memory.peak > runs.free_bytes:
        text += f": does not fit, times are of devices with more than {runs.free_bytes / 1e9:.1f} GB free"
    return Simulated(text=text, numbers={"peak": (Estimate.exactly(memory.peak), "bytes")})


def _distribution(runs: Runs, stated: Stated) -> Simulated:
    """A batch's dispatch in one layer: half of what a layer exchanges forward."""
    ms = runs.serial.estimate(lambda step: step.traffic_us / (2 * MODEL.num_layers) / 1e3)
    text = f"{_bar(ms)} ms, each way and layer"
    return Simulated(
        text=text, numbers={"each_way": (ms, "ms")}, verdict=slower(stated.distribution_ms, ms.low, ms.high)
    )


def _expert_time(runs: Runs, stated: Stated) -> Simulated:
    ms = runs.serial.estimate(lambda step: _expert_us(step) / MODEL.num_layers / 1e3)
    text = f"{_bar(ms)} ms"
    return Simulated(text=text, numbers={"forward": (ms, "ms")}, verdict=slower(stated.expert_ms, ms.low, ms.high))


def _expert_us(step: Step) -> float:
    """Microseconds that all layers' experts compute in a step of forward passes."""
    spans = (span for span in step.spans if span.lane == "compute" and span.name.startswith("compute "))
    return step.setup.training.accumulation * sum(span.stop_us - span.start_us for span in spans)


def _hidden(runs: Runs, stated: Stated) -> Simulated:
    found = runs.ep16.hidden
    if found is None:
        return Simulated(text="nothing travels")
    text = f"{_bar(found.scaled(100))} % in training"
    verdict = reached(stated.hidden, found.low, found.high)
    return Simulated(text=text, numbers={"share": (found, "ratio")}, verdict=verdict)


def _tps(runs: Runs, stated: Stated) -> Simulated:
    found = {
        "training": {"tp8_pp2": runs.base.tps, "ep16": runs.ep16.tps},
        "forward": {"tp8_pp2": runs.base_forward.tps, "ep16": runs.ep16_forward.tps},
    }
    kept = {"tp8_pp2": runs.base_kept, "ep16": runs.ep16_kept}
    if any(kept.values()):
        found["training without recomputation"] = {what: its.tps for what, its in kept.items() if its is not None}
    texts = [f"{mode}: {' and '.join(map(_bar, its.values()))}" for mode, its in found.items()]
    limits = dict(zip(TITLES, stated.tps, strict=True))
    verdicts = [
        ", ".join(f"{TITLES[what]} {reached(limits[what], e.low, e.high)}" for what, e in its.items()) + f" ({mode})"
        for mode, its in found.items()
    ]
    ends = dict(zip(found, ("", "_forward", "_without_recompute"), strict=False))
    numbers = {f"{what}{ends[mode]}": (tps, "tokens/s") for mode, its in found.items() for what, tps in its.items()}
    return Simulated(text="; ".join(texts), numbers=numbers, verdict="; ".join(verdicts))


def _ratio(runs: Runs, stated: Stated) -> Simulated:
    found = {"training": runs.ep16.over(runs.base), "forward": runs.ep16_forward.over(runs.base_forward)}
    if runs.ep16_kept is not None and runs.base_kept is not None:
        found["training without recomputation"] = runs.ep16_kept.over(runs.base_kept)
    return Simulated(
        text=", ".join(f"{_bar(ratio)} {mode}" for mode, ratio in found.items()),
        numbers={mode.replace(" ", "_"): (ratio, "ratio") for mode, ratio in found.items()},
        verdict="; ".join(f"{reached(stated.ratio, its.low, its.high)} ({mode})" for mode, its in found.items()),
    )


def _rates(runs: Runs, stated: Stated) -> Simulated:
    found = [prediction.tps.scaled(1 / BATCH_TOKENS) for prediction in (runs.base, runs.ep16)]
    return _both(found, "1/s", "in training")


def _tpot(runs: Runs, stated: Stated) -> Simulated:
    found = [prediction.estimate(lambda step: step.tpot_us) for prediction in (runs.base, runs.ep16)]
    return _both(found, "us", "us in training")


def _both(found: list[Estimate], unit: str, said: str) -> Simulated:
    numbers = {what: (estimate, unit) for what, estimate in zip(TITLES, found, strict=True)}
    return Simulated(text=f"{' and '.join(map(_bar, found))} {said}", numbers=numbers)


def _pieces(prediction: Prediction) -> Simulated:
    """What a token takes in each part of a step."""
    tokens, parts_us = prediction.step.setup.batch_tokens, prediction.step.parts_us
    parts = {part: parts_us[part] / tokens for part in PARTS if parts_us.get(part)}
    text = f"{' + '.join(f'{us:.2g} {PARTS[part]}' for part, us in parts.items())} us a token"
    return Simulated(text=text, numbers={part: (Estimate.exactly(us), "us") for part, us in parts.items()})


def _gain(runs: Runs, stated: Stated) -> Simulated:
    pairs = zip(_steps(runs.ep16), _steps(runs.base), strict=True)
    gain = Estimate.of(*(100 * (ours.busy / theirs.busy - 1) for ours, theirs in pairs))
    verdict = reached(stated.gain_percent, gain.low, gain.high)
    return Simulated(text=f"{_bar(gain)} % more of a step busy", numbers={"gain": (gain, "percent")}, verdict=verdict)


def _steps(prediction: Prediction) -> tuple[Step, Step, Step]:
    return prediction.step, prediction.slow, prediction.fast


def _utilization(runs: Runs, stated: Stated) -> Simulated:
    both = {"tp8_pp2": runs.base, "ep16": runs.ep16}
    busy = {what: prediction.estimate(lambda step: step.busy) for what, prediction in both.items()}
    mfu = {what: prediction.estimate(lambda step: step.mfu) for what, prediction in both.items()}
    shares = [" and ".join(f"{_bar(its.scaled(100))} %" for its in found.values()) for found in (busy, mfu)]
    numbers = {what: (its, "ratio") for what, its in busy.items()}
    numbers |= {f"{what}_of_peak": (its, "ratio") for what, its in mfu.items()}
    pairs = zip(TITLES.values(), stated.utilization_percent, busy.values(), strict=True)
    verdict = ", ".join(
        f"{title} {compared_range(its, 100 * found.low, 100 * found.high)}" for title, its, found in pairs
    )
    text = f"busy: {shares[0]}; of peak: {shares[1]}"
    return Simulated(text=text, numbers=numbers, verdict=f"busy share {verdict} what is stated")


def _bubble(runs: Runs, stated: Stated) -> Simulated:
    share = runs.base.estimate(lambda step: step.parts_us["pipeline"] / step.step_us)
    text = f"{_bar(share.scaled(100))} % of a step waits for the other stage or sends"
    return Simulated(text=text, numbers={"share": (share, "ratio")})


def _law(law: str) -> Answer:
    def answer(runs: Runs, stated: Stated) -> Simulated:
        fits = {total: its for total in TOTALS for its in runs.scaling.law_fits(total) if its.law == law}
        least, values = dict(zip(LAWS, stated.r2, strict=True))[law], {}
        for total, its in fits.items():
            if its.r2 is not None:
                values[total] = (Estimate.exactly(its.r2), "ratio")
        text = (
            ", ".join(f"{r2_text(r2.value, 3)} {TOTALS[total]}" for total, (r2, _) in values.items())
            or "nothing varies"
        )
        holds = values and min(r2.value for r2, _ in values.values()) >= least
        verdict = "holds" if holds else "does not hold"
        return Simulated(text=text, numbers=values, verdict=verdict)

    return answer


def _bar(estimate: Estimate) -> str:
    """The value, and its bar in brackets where it has one."""
    value, low, high = (_three(number) for number in (estimate.value, estimate.low, estimate.high))
    return value if low == high else f"{value} ({low}-{high})"


def _three(value: float) -> str:
    return f"{float(f'{value:.3g}'):,.10g}"


ANSWERS: Mapping[str, Answer] = {  # by the key of a figure
    "memory_ep16": lambda runs, _: _memory(runs, "ep16"),
    "memory_tp8_pp2": lambda runs, _: _memory(runs, "tp8_pp2"),
    "distribution": _distribution,
    "expert_time": _expert_time,
    "hidden": _hidden,
    "tps": _tps,
    "ratio": _ratio,
    "batches": _rates,
    "tpot": _tpot,
    "pieces_tp8_pp2": lambda runs, _: _pieces(runs.base),
    "pieces_ep16": lambda runs, _: _pieces(runs.ep16),
    "gain": _gain,
    "utilization": _utilization,
    "bubble": _bubble,
    **{f"law_{law}": _law(law) for law in LAWS},
}
