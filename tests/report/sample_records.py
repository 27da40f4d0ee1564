"""Records and spans as the benchmarks write them, made up but plausible: what the report's tests are fed with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ds_moe_ep.records.names import SOAK_VERDICTS, SYSTEMS
from ds_moe_ep.records.record import Record, write_records
from ds_moe_ep.report.findings import spans_path
from ds_moe_ep.schedule.spans import Span, Tags, write_spans

BEDS = ("loopback", "cluster", "traffic65", "traffic130")
TPS = {"tp8_pp2": 1180.0, "ep16_serial": 2450.0, "ep16": 3620.0, "native_ep16": 2210.0, "autoep_ep16": 2395.0}
SHARES = {  # of a step: compute, experts_traffic, tensor_traffic, pipeline, gradients, rest
    "tp8_pp2": (0.31, 0.0, 0.38, 0.19, 0.08, 0.04),
    "ep16_serial": (0.52, 0.33, 0.0, 0.0, 0.1, 0.05),
    "ep16": (0.78, 0.03, 0.0, 0.0, 0.13, 0.06),
    "native_ep16": (0.49, 0.34, 0.0, 0.0, 0.12, 0.05),
    "autoep_ep16": (0.5, 0.34, 0.0, 0.0, 0.11, 0.05),
}
PARTS = ("compute", "experts_traffic", "tensor_traffic", "pipeline", "gradients", "rest")
KINDS = {"weights": 96e6, "gradients": 96e6, "optimizer": 384e6, "activations": 71e6, "buffers": 22e6}
STEP_TOKENS = 16384
BY_TRAFFIC = {
    "traffic10": {"ep16": 300.0, "pp2_ep8": 250.0, "ep8": 298.0},
    "traffic400": {"ep16": 90.0, "pp2_ep8": 150.0, "ep8": 110.0},
}
SWEPT = ((1, 1), (4, 1), (16, 1), (16, 4), (16, 16), (64, 1), (1024, 1))  # EP and copies
HARDWARE = "Some CPU, 64 cores, 256 GiB; 16 gloo ranks of one thread; torch 2.13.0, deepspeed 0.19.8, python 3.11.7"


def record(name: str, value: float, unit: str, spread: float = 0.0, **changes: object) -> Record:
    """A Record with quartiles `spread` times its value away; those of shaped links are emulated."""
    values: dict[str, object] = {
        "name": name,
        "value": value,
        "unit": unit,
        "spread": (value - abs(value) * spread, value + abs(value) * spread),
        "n": 20,
        "command": "python -m ds_moe_ep bench systems --rounds 20",
        "commit": "0123abc",
        "hardware": HARDWARE,
        "emulated": "loopback" not in name,
        "notes": "",
    }
    return Record(**(values | changes))  # type: ignore[arg-type]


def system_records(environments: Sequence[str] = BEDS, spread: float = 0.012) -> Iterator[Record]:
    """Speed, shares, ratios, pieces and memory of every system."""
    for place, environment in enumerate(environments):
        for mode, faster in (("training", 1.0), ("forward", 3.1)):
            tps = {name: faster * value / (1 + 0.21 * place) for name, value in TPS.items()}
            for name, value in tps.items():
                yield from _one_system(f"system.{environment}.{mode}.{name}", name, value, spread)
                for other in ("tp8_pp2", "ep16_serial", "native_ep16", "autoep_ep16"):
                    if other != name:
                        ratio = value / tps[other]
                        yield record(f"system.{environment}.{mode}.{name}.ratio_to_{other}", ratio, "ratio", spread)
        yield record(f"system.{environment}.traffic.ratio", 0.65 + 0.2 * place, "ratio")


def _one_system(start: str, name: str, tps: float, spread: float) -> Iterator[Record]:
    step_ms = 1e3 * STEP_TOKENS / tps
    yield record(f"{start}.tps", tps, "tokens/s", spread)
    yield record(f"{start}.tpot", 1e6 / tps, "us", spread)
    yield record(f"{start}.step", step_ms, "ms", spread)
    yield record(f"{start}.busy", SHARES[name][0] + 0.1, "ratio", spread)
    if "ep16" in name:
        yield record(f"{start}.hidden", 0.93 if name == "ep16" else 0.0, "ratio")
    for part, share in zip(PARTS, SHARES[name], strict=True):
        yield record(f"{start}.breakdown.{part}", share * step_ms, "ms", spread)
    for kind, size in KINDS.items():
        size *= 1.4 if name == "tp8_pp2" and kind == "activations" else 1.0
        yield record(f"{start}.memory.{kind}", size, "bytes")


def overlap_records() -> Iterator[Record]:
    """Two shapings of emulated devices and two of real ones, by three sides."""
    for device, shapings in (("emulated", ("2 of step", "0.3 of step")), ("real", ("unshaped", "400 mbit"))):
        for place, shaping in enumerate(shapings):
            for side, time_ms, hidden in (("serial", 4000.0, 0.0), ("peers", 3100.0, 95.0), ("wire", 1050.0, None)):
                start = f"overlap.{device}.{shaping}.{side}.step"
                yield record(f"{start}.time", time_ms + 100 * place, "ms", 0.02)
                if hidden is not None:
                    yield record(f"{start}.hidden", hidden, "%")


def loss_records(
    systems: Sequence[str] = tuple(SYSTEMS), steps: int = 60, environment: str = "loopback"
) -> Iterator[Record]:
    """Losses that fall alike, up to a little rounding that grows."""
    for place, name in enumerate(systems):
        for step in range(1, steps + 1):
            value = (
                2.1 + 3.4 * math.exp(-step / 22) + 0.03 * math.sin(1.7 * step) + 2e-6 * place * step * math.sin(step)
            )
            yield record(f"system.{environment}.training.{name}.loss.step{step}", value, "loss")


def load_records(
    systems: Sequence[str] = ("ep16", "native_ep16"), steps: int = 60, layers: int = 4, environment: str = "loopback"
) -> Iterator[Record]:
    """Rows that begin uneven and are balanced with time."""
    for place, name in enumerate(systems):
        for step in range(1, steps + 1):
            calm = math.exp(-step / (25 + 40 * place))
            for layer in range(layers):
                for expert in range(16):
                    uneven = 0.9 * math.sin(2.3 * expert + layer) * calm + 0.06 * math.sin(9 * expert + step)
                    rows = max(0, round(1024 * (1 + uneven)))
                    start = f"system.{environment}.training.{name}.load.step{step}"
                    yield record(f"{start}.layer{layer}.expert{expert}", rows, "rows")


def scaling_records(
    totals: Sequence[str] = ("constant_rank", "constant_total"), spread: float = 0.04
) -> Iterator[Record]:
    """Points near the four laws, and their fits."""
    units = {"tps": "tokens/s", "tpot": "us", "busy": "ratio", "memory_per_expert": "bytes"}
    for total in totals:
        law = {
            "tps": (226.0, lambda ep: ep),
            "tpot": (4400.0, lambda ep: 1 / ep),
            "busy": (0.93, lambda ep: 1 - 1 / ep),
            "memory_per_expert": (520e6, lambda ep: 1 / ep),
        }
        for what, (coefficient, shape) in law.items():
            for ep in (1, 2, 4, 8, 16):
                value = coefficient * shape(ep) * (1 + 0.06 * math.sin(3 * ep))
                yield record(f"scaling.{total}.ep{ep}.{what}", value, units[what], spread, emulated=True)
            yield record(f"scaling.{total}.fit.{what}.r2", 0.984, "ratio", emulated=True)
            yield record(f"scaling.{total}.fit.{what}.coefficient", coefficient, units[what], emulated=True)


def sweep_records(environment: str = "simulated_some", sizes: Sequence[tuple[int, int]] = SWEPT) -> Iterator[Record]:
    """Simulated points by (EP, copies), and the fits of the laws."""
    units = {"tps": "tokens/s", "tpot": "us", "busy": "ratio", "memory_per_expert": "bytes", "mfu": "ratio"}
    for total in ("constant_rank", "constant_total"):
        for ep, dp in sizes:
            values = {
                "tps": 2e4 * ep * dp,
                "tpot": 50 / ep / dp,
                "busy": 0.97,
                "memory_per_expert": 36e9 / ep,
                "mfu": 0.43,
            }
            for what, value in values.items():
                yield record(
                    f"sweep.{environment}.{total}.ep{ep}.dp{dp}.{what}", value, units[what], 0.1, emulated=True
                )
            yield record(f"sweep.{environment}.{total}.ep{ep}.dp{dp}.memory", 46e9, "bytes", emulated=True)
            if ep > 1:
                yield record(f"sweep.{environment}.{total}.ep{ep}.dp{dp}.hidden", 0.98, "ratio", emulated=True)
        for law, coefficient in (("tps", 2e4), ("tpot", 50.0), ("busy", 1.05), ("memory_per_expert", 36e9)):
            yield record(f"sweep.{environment}.{total}.fit.{law}.r2", 0.991, "ratio", emulated=True)
            yield record(f"sweep.{environment}.{total}.fit.{law}.coefficient", coefficient, units[law], emulated=True)


def layout_records(tps: Mapping[str, Mapping[str, float]], environment: str = "simulated_some") -> Iterator[Record]:
    """Simulated layouts by ratio: tokens per second of each, and over the best one's, with bars of 2 percent."""
    for ratio, its in tps.items():
        for system, value in its.items():
            start = f"layouts.{environment}.{ratio}.{system}"
            yield record(f"{start}.tps", value, "tokens/s", 0.02, emulated=True)
            yield record(f"{start}.over_best", value / max(its.values()), "ratio", 0.02, emulated=True)


def soak_records(steps: int = 40, ranks: int = 16) -> Iterator[Record]:
    """Two runs whose memory is flat, bursts among drifting steps, and the verdicts."""
    for run in (1, 2):
        for step in range(10, steps + 1, 10):
            megabytes = 402 + 0.2 * math.sin(step + run)
            yield record(f"soak.run{run}.memory.step{step:05d}", 1e6 * megabytes, "bytes", 0.004, emulated=False)
        yield record(f"soak.run{run}.peak.memory", 421.5e6, "bytes", emulated=False)
    for step in range(1, steps + 1):
        over_mean = float(ranks) if step % 20 == 7 else 4 + math.sin(step / 9)
        yield record(f"soak.load.step{step:05d}", over_mean, "ratio", n=ranks, emulated=False)
        yield record(f"soak.fullest.step{step:05d}", float(step // 11 % ranks), "expert", n=ranks, emulated=False)
    yield record("soak.weather.bursts", 2.0, "count", n=steps, emulated=False)
    for what in SOAK_VERDICTS:
        holds = float(what != "same")
        yield record(f"soak.verdict.{what}", holds, "ratio", notes=f"all about {what}", emulated=False)


def every_record() -> list[Record]:
    """Records of all kinds."""
    systems = [*system_records(), *loss_records(), *load_records()]
    simulated = [*sweep_records(), *layout_records(BY_TRAFFIC)]
    return [*systems, *overlap_records(), *scaling_records(), *simulated, *soak_records()]


def spans(layer: str = "layers.0.feed_forward", ranks: Sequence[int] = (0, 5)) -> list[Span]:
    """One layer of one step on some ranks: serial, and overlapped by groups of peers."""
    found = []
    for rank in ranks:
        late_us = 1e6 * rank
        found += _serial(f"ep16_serial/{layer}", rank, late_us)
        found += _overlapped(f"ep16/{layer}", rank, late_us)
    return found


def _serial(layer: str, rank: int, start_us: float) -> Iterator[Span]:
    for phase, work_us in (("forward", 52_000.0), ("backward", 54_000.0)):
        at_us = start_us
        for lane, last_us in (("dispatch", 33_000.0), ("compute", work_us), ("combine", 33_000.0)):
            yield Span(f"{lane} 0", rank, lane, at_us, at_us + last_us, Tags(layer, phase, "all peers"))
            at_us += last_us + 300
        if phase == "backward":
            yield Span("weights 0", rank, "compute", at_us, at_us + 50_000, Tags(layer, phase))
        start_us = at_us + 200_000


def _overlapped(layer: str, rank: int, start_us: float) -> Iterator[Span]:
    near = ("near (1/2)", "near (2/2)")
    far = ("node +1", "node +2", "node +3")
    for phase in ("forward", "backward"):
        order = [near[0], *far, near[1]] if phase == "forward" else [*near, "", *far, "", ""]
        sent_us = back_us = now_us = start_us
        ready_us = dict.fromkeys(near, start_us)
        for peers in far:
            yield Span("dispatch", rank, "dispatch", sent_us, sent_us + 9_500, Tags(layer, phase, peers))
            sent_us = ready_us[peers] = sent_us + 9_600
        for peers in order:
            last_us = 14_000.0 if not peers else 7_000.0 if peers in near else 13_500.0
            begin_us = max(now_us, ready_us.get(peers, now_us))
            now_us = begin_us + last_us
            yield Span("compute", rank, "compute", begin_us, now_us, Tags(layer, phase, peers))
            if peers in far:
                back_us = max(back_us, now_us)
                yield Span("combine", rank, "combine", back_us, back_us + 9_500, Tags(layer, phase, peers))
                back_us += 9_600
        start_us = now_us + 200_000


def write_sample(folder: Path, name: str = "systems.jsonl") -> Path:
    """A file of every kind of Record, with spans beside it."""
    path = folder / name
    write_records(path, every_record())
    write_spans(spans_path(path), spans())
    return path
