"""From Records of the probe to numbers of a cluster, each with its source and its range.

1. Products: 1/throughput = (1 + half_rows/rows)/(peak*efficiency) is a line in 1/rows. The file's peak stays, since
   utilization refers to it; without one, or with one that was exceeded, it is where the line ends.
2. Links: time = latency + bytes/rate is a line in bytes, and `shared_by` is how much steeper it is when all ranks of a
   node send at once. On a CPU the host's core time is in there: what it explains is no latency, and no rate.
3. The rest is measured as such. A range goes from quartile to quartile, and as far as the line misses its own points.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.quantity import Quantity, number, rounded
from ds_moe_ep.records.record import Record
from ds_moe_ep.simulate.calibrate.probe_samples import (  # fmt: skip
    PREFIX,
    FittedLine,
    Sample,
    fit_line,
    is_held_out,
    one_sample,
    samples_below,
    split,
)
from ds_moe_ep.simulate.cluster.cluster import PARTS, SCALES, Cluster, Device, Host, Link
from ds_moe_ep.simulate.step.formulas import matmul_us

DIGITS = 5  # that a fitted number has
PRECISIONS = ("bf16", "fp16", "fp32")
WAYS = ("near", "far")


Numbers = dict[str, Quantity]  # by the path in a cluster; a note names the source


@dataclass(frozen=True)
class SamplePoint:
    """Prediction of the fitted cluster for one size, beside the measurement."""

    group: str
    label: str
    unit: str
    simulated: float
    measured: float
    is_held_out: bool

    @property
    def error(self) -> float:
        """Relative; positive where the simulation is above what was measured."""
        return self.simulated / self.measured - 1


@dataclass(frozen=True)
class ProbeFit:
    """A cluster with the probe's numbers, which of its numbers these are, and how it does on what was measured."""

    cluster: Cluster
    fitted: tuple[str, ...]
    points: tuple[SamplePoint, ...]


def fit_probe(cluster: Cluster, records: Sequence[Record], hold_out: float, precision: str | None = None) -> ProbeFit:
    """The cluster with what the probe measured in place of its own numbers; the rest stays.

    `hold_out` is the share of row counts and message sizes that stay out of the fit. `precision` is the one whose
    products decide on efficiency and half_rows; without it the fastest. Raises ConfigError for too few Records.
    """
    numbers: Numbers = {}
    numbers |= _host(records)
    numbers |= _matmul(cluster.device, records, hold_out, precision)
    fitted = with_numbers(cluster, numbers)
    numbers |= _device(fitted.device, records)
    for way in WAYS:
        numbers |= _link(fitted, way, records, hold_out)
    if not numbers:
        raise ConfigError(f"records: {len(records)} of the probe, none for a number of a cluster; probe again")
    fitted = with_numbers(cluster, numbers)
    return ProbeFit(fitted, tuple(numbers), tuple(_points(fitted, records, hold_out)))


def with_numbers(cluster: Cluster, numbers: Mapping[str, Quantity]) -> Cluster:
    """The cluster with these numbers, rounded, in place of its own, their sources and their ranges."""
    given = {path: _with_digits(found) for path, found in numbers.items()}
    parts = {
        part: dataclasses.replace(
            getattr(cluster, part),
            **{path.split(".")[1]: found.value for path, found in given.items() if path.startswith(f"{part}.")},
        )
        for part in PARTS
    }
    ranges = {path: pair for path, pair in cluster.ranges.items() if path not in given}
    ranges |= {path: (n.low, n.high) for path, n in given.items() if n.is_spread and math.isfinite(n.high)}
    sources = {**cluster.sources, **{path: found.note for path, found in given.items()}}
    return dataclasses.replace(cluster, ranges=ranges, sources=sources, **parts)


def _with_digits(found: Quantity) -> Quantity:
    """The number with DIGITS digits, and a range that still holds it."""
    return Quantity.of(*(rounded(each, DIGITS) for each in found.bar), note=found.note)


def _matmul(device: Device, records: Sequence[Record], hold_out: float, precision: str | None) -> Numbers:
    lines: dict[str, tuple[FittedLine, str]] = {}
    for name in PRECISIONS:
        samples = samples_below(records, f"matmul.{name}", "flop/us")
        if samples:
            fitted = split(samples, hold_out, f"{PREFIX}matmul.{name}")
            points = [(1 / sample.size, (1 / sample.high, 1 / sample.value, 1 / sample.low)) for sample in fitted]
            lines[name] = fit_line(points), samples[0].source
            if not lines[name][0].start:
                raise ConfigError(
                    f"{PREFIX}matmul.{name}: throughput rises with the rows up to the most that were measured, so it "
                    "has no end yet; probe for longer (--seconds)"
                )
    if not lines:
        return {}
    main = precision or max(lines, key=lambda name: 1 / lines[name][0].start)
    if main not in lines:
        raise ConfigError(f"calibrate.precision={main!r}: was not measured; choose one of {', '.join(lines)}")
    line, source = lines[main]
    reached = _inverse(line.start, line.starts, line.residual, source)
    numbers = _share(f"device.peak_{main}", "device.matmul_efficiency", getattr(device, f"peak_{main}"), reached)
    numbers["device.half_rows"] = _quotient((line.slope, line.start), line.slopes, line.starts, source)
    efficiency = numbers["device.matmul_efficiency"].value
    for name, (other, its_source) in lines.items():
        if name != main and not getattr(device, f"peak_{name}"):  # the peak that gives its products at that efficiency
            numbers[f"device.peak_{name}"] = _inverse(other.start, other.starts, other.residual, its_source).scaled(
                1 / efficiency
            )
    return numbers


def _inverse(value: float, ends: tuple[float, float], residual: float, source: str) -> Quantity:
    """A rate from its inverse; its range goes at least as far as the line misses its points."""
    rate = 1 / value
    high = 1 / ends[0] if ends[0] else rate
    ends_of_rate = 1 / ends[1], rate / (1 + residual), high, rate * (1 + residual)
    return Quantity.of(rate, *ends_of_rate, note=source)


def _quotient(
    value: tuple[float, float], above: tuple[float, float], below: tuple[float, float], source: str
) -> Quantity:
    """A quotient of two numbers that each have a range; an end that would be infinite is the value."""
    middle = value[0] / value[1]
    return Quantity.of(middle, above[0] / below[1], above[1] / below[0] if below[0] else middle, note=source)


def _share(whole: str, share: str, given: float, measured: Quantity) -> Numbers:
    """`share` of the file's number `whole`; where it has none, or a lower one, `whole` is what was measured."""
    if 0 < given < math.inf and measured.value <= given:
        return {share: _within(measured.scaled(1 / given), 0.0, 1.0)}
    return {whole: measured, share: Quantity.of(1.0, note=measured.note)}


def _within(found: Quantity, least: float, most: float) -> Quantity:
    """The number and its range, moved into bounds."""
    return Quantity.of(*(min(max(each, least), most) for each in found.bar), note=found.note)


def _device(device: Device, records: Sequence[Record]) -> Numbers:
    """Attention, memory, launches: as measured. `device` has its peaks already."""
    numbers: Numbers = {}
    for precision in PRECISIONS:
        sample, peak = one_sample(records, f"attention.{precision}", "flop/us"), getattr(device, f"peak_{precision}")
        if sample is not None and peak:
            numbers["device.attention_efficiency"] = _within(_as_number(sample).scaled(1 / peak), 0.0, 1.0)
            break
    memory = one_sample(records, "memory", "bytes/us")
    if memory is not None:
        whole, share = "device.memory_bandwidth", "device.memory_efficiency"
        numbers |= _share(whole, share, device.memory_bandwidth, _as_number(memory))
    for name in ("launch", "sync"):
        sample = one_sample(records, name, "us")
        if sample is not None:
            numbers[f"device.{name}_us"] = _as_number(sample)
    return numbers


def _host(records: Sequence[Record]) -> Numbers:
    """Cores, and core time of messages and bytes: as measured; nothing where ranks have GPUs."""
    kinds = {"cores": ("cores", "cores"), "pairwise": ("pairwise_us", "us"), "collective": ("collective_us", "us")}
    kinds["byte"] = ("byte_us", "us/byte")
    found = {field: one_sample(records, f"host.{name}", kind) for name, (field, kind) in kinds.items()}
    return {f"host.{field}": _as_number(sample) for field, sample in found.items() if sample is not None}


def _link(cluster: Cluster, way: str, records: Sequence[Record], hold_out: float) -> Numbers:
    """Latency, rate, and how many ranks share it. `cluster` has the host's costs already."""
    alone = samples_below(records, f"{way}.one", "us")
    if not alone:
        return {}
    source, host, link = alone[0].source, cluster.host, getattr(cluster, way)
    line = _line(alone, hold_out, f"{PREFIX}{way}.one")
    latency = [max(0.0, start - host.pairwise_us) for start in (line.start, *line.starts)]
    numbers = {f"{way}.latency_us": Quantity.of(*latency, note=source)}
    if line.slope > host.byte_us:
        rate = _inverse(line.slope, line.slopes, line.residual, source)
        numbers |= _share(f"{way}.bandwidth", f"{way}.efficiency", link.bandwidth, rate)
    else:
        numbers[f"{way}.bandwidth"] = Quantity.of(math.inf, note=source)
    everyone = samples_below(records, f"{way}.all", "us") if way == "far" or not host.cores else []
    if everyone and line.slope > host.byte_us:  # near ranks of a CPU share its cores, and that is in the host's costs
        shared = _line(everyone, hold_out, f"{PREFIX}{way}.all")
        times = _quotient((shared.slope, line.slope), shared.slopes, line.slopes, source)
        numbers[f"{way}.shared_by"] = _within(times, 1.0, cluster.node_size)
    return numbers


def _line(samples: Sequence[Sample], hold_out: float, what: str) -> FittedLine:
    fitted = split(samples, hold_out, what)
    return fit_line([(sample.size, (sample.low, sample.value, sample.high)) for sample in fitted])


def _as_number(sample: Sample) -> Quantity:
    return Quantity.of(sample.value, sample.low, sample.high, note=sample.source)


def exchange_us(link: Link, host: Host, num_bytes: float, senders: float = 1.0) -> float:
    """A message each way: pairwise + latency + max(bytes*byte_us, bytes*senders/rate), the host beside the link."""
    return host.pairwise_us + link.latency_us + max(num_bytes * host.byte_us, num_bytes * senders / link.rate)


def _points(cluster: Cluster, records: Sequence[Record], hold_out: float) -> Iterator[SamplePoint]:
    """Every size that was measured, as the fitted cluster has it."""
    bare = dataclasses.replace(cluster.device, launch_us=0.0)  # products queue: the probe has no launch in them
    for precision in PRECISIONS:
        for index, sample in enumerate(samples_below(records, f"matmul.{precision}", "flop/us")):
            simulated = 1e6 / matmul_us(bare, precision, 1e6, sample.size)
            label, held_out = f"{number(sample.size, 0)} rows", is_held_out(index, hold_out)
            unit = "TFLOP/s" if sample.value > SCALES["flop/us"]["TFLOP/s"] else "GFLOP/s"
            scale = SCALES["flop/us"][unit]
            yield SamplePoint(
                f"products in {precision}", label, unit, simulated / scale, sample.value / scale, held_out
            )
    for way in WAYS:
        link: Link = getattr(cluster, way)
        for load, title, senders in (("one", "a pair alone", 1.0), ("all", "all pairs", link.shared_by)):
            if load == "all" and cluster.host.cores and way == "near":
                continue  # pairs share the host's cores, and what comes of that is what `plan` simulates
            for index, sample in enumerate(samples_below(records, f"{way}.{load}", "us")):
                simulated, label = (
                    exchange_us(link, cluster.host, sample.size, senders),
                    f"{number(sample.size, 0)} bytes",
                )
                yield SamplePoint(
                    f"{way} link, {title}", label, "us", simulated, sample.value, is_held_out(index, hold_out)
                )
