"""A cluster as data: devices, links and hosts, read from JSON in which each number has its unit, source and range.

    "bandwidth": {"value": 200, "unit": "GB/s", "range": [170, 200], "source": "the specification, section 5.1"}

A range says how far the number may be off; `ends` makes the cluster of all the worse and of all the better ends, and
what is simulated on both is the error bar of a prediction. Without a range a number is taken as exact.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ds_moe_ep.config.shipped import FOLDER, path_of, shipped_clusters, way_to
from ds_moe_ep.errors import ConfigError, nearest

EXAMPLES = f"see those in {FOLDER / 'clusters'}"
SCALES: Mapping[str, Mapping[str, float]] = {  # unit -> factor to what the fields below hold
    "bytes": {"bytes": 1.0, "GB": 1e9, "GiB": 2.0**30},
    "bytes/us": {"GB/s": 1e3, "TB/s": 1e6, "MB/s": 1.0, "Mbit/s": 0.125, "Gbit/s": 125.0},
    "flop/us": {"TFLOP/s": 1e6, "GFLOP/s": 1e3},
    "us": {"us": 1.0, "ms": 1e3, "ns": 1e-3},
    "us/byte": {"us/MB": 1e-6, "ns/byte": 1e-3},
    "ratio": {"ratio": 1.0, "percent": 0.01},
    "rows": {"rows": 1.0},
    "ranks": {"ranks": 1.0},
    "cores": {"cores": 1.0},
}


def quantity(kind: str, better: str, help: str, default: float | None = None, minimum: float = 0.0) -> Any:
    """A field that a file gives as {"value", "unit", "range", "source"}; `better` is which end of a range is faster."""
    metadata = {"kind": kind, "better": better, "help": help, "minimum": minimum}
    if default is None:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Device:
    """The device that computes for one rank. Rates are per microsecond."""

    memory_bytes: float = quantity("bytes", "high", "memory of one device")
    reserve_bytes: float = quantity("bytes", "low", "of it for the driver, communicators and fragmentation", 0.0)
    peak_fp16: float = quantity("flop/us", "high", "dense matrix products in fp16", 0.0)
    peak_bf16: float = quantity("flop/us", "high", "dense matrix products in bf16", 0.0)
    peak_fp32: float = quantity("flop/us", "high", "dense matrix products in fp32", 0.0)
    matmul_efficiency: float = quantity("ratio", "high", "share of the peak that large products reach", 1.0)
    half_rows: float = quantity("rows", "low", "rows at which a product reaches half of that", 0.0)
    attention_efficiency: float = quantity("ratio", "high", "share of the peak that causal attention reaches", 1.0)
    memory_bandwidth: float = quantity("bytes/us", "high", "bytes that the memory moves", math.inf)
    memory_efficiency: float = quantity("ratio", "high", "share of it that elementwise kernels reach", 1.0)
    launch_us: float = quantity("us", "low", "between two kernels", 0.0)
    sync_us: float = quantity("us", "low", "until the host has read a number of the device", 0.0)

    def peak(self, precision: str) -> float:
        """Floating-point operations per microsecond. Raises ConfigError where the file gives none."""
        peak: float = getattr(self, f"peak_{precision}")
        if not peak:
            raise ConfigError(
                f"cluster.device.peak_{precision}: missing, and the run computes in {precision}; give the device's peak"
            )
        return peak


@dataclass(frozen=True, kw_only=True)
class Link:
    """One way of a full-duplex link out of a device (near) or towards other nodes (far)."""

    bandwidth: float = quantity("bytes/us", "high", "bytes per microsecond and direction", math.inf)
    efficiency: float = quantity("ratio", "high", "share of it that rows get", 1.0)
    latency_us: float = quantity("us", "low", "of one message", 0.0)
    message_us: float = quantity("us", "low", "between two messages of one transfer", 0.0)
    shared_by: float = quantity("ranks", "low", "ranks of a node that one such link serves", 1.0, minimum=1.0)

    @property
    def rate(self) -> float:
        """Bytes of rows per microsecond and direction."""
        return self.bandwidth * self.efficiency


@dataclass(frozen=True, kw_only=True)
class Host:
    """Costs of messages on the processor that all ranks share; `cores` 0 leaves it out: each rank has its own there."""

    cores: float = quantity("cores", "high", "processor cores that all ranks of the machine share", 0.0)
    pairwise_us: float = quantity("us", "low", "core time of one message between two ranks, both ends", 0.0)
    collective_us: float = quantity("us", "low", "core time of one message in an all-to-all, both ends", 0.0)
    transfer_us: float = quantity("us", "low", "core time of one transfer beside its messages", 0.0)
    byte_us: float = quantity("us/byte", "low", "core time of a byte that goes to another rank, both ends", 0.0)
    forward_us: float = quantity("us", "low", "core time of a layer beside its experts and rows, forward", 0.0)
    backward_us: float = quantity("us", "low", "the same, backward", 0.0)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes of equal devices, with what joins them."""

    name: str
    num_nodes: int
    node_size: int
    device: Device
    near: Link
    far: Link
    host: Host = field(default_factory=Host)
    computes_on: Literal["device", "host"] = "device"  # a device a rank, or the host's cores, a peak each
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)  # path of a number -> where it is from
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict, compare=False)

    @property
    def num_ranks(self) -> int:
        """Devices of all nodes, a rank each."""
        return self.num_nodes * self.node_size

    def with_nodes(self, num_nodes: int) -> Cluster:
        """The same with another number of nodes."""
        return dataclasses.replace(self, num_nodes=num_nodes)

    def with_far(self, **changes: float) -> Cluster:
        """The same with another link between nodes."""
        return dataclasses.replace(self, far=dataclasses.replace(self.far, **changes))

    def ends(self) -> tuple[Cluster, Cluster]:
        """The cluster with every number at the slower end of its range, and at the faster one."""
        return self._at(faster=False), self._at(faster=True)

    def _at(self, faster: bool) -> Cluster:
        changed: dict[str, Any] = {}
        for name, part in _parts(self):
            values = {
                f.name: self.ranges[f"{name}.{f.name}"][(f.metadata["better"] == "high") == faster]
                for f in dataclasses.fields(part)
                if f"{name}.{f.name}" in self.ranges
            }
            changed[name] = dataclasses.replace(part, **values)
        return dataclasses.replace(self, **changed)


PARTS: Mapping[str, type[Any]] = {"device": Device, "near": Link, "far": Link, "host": Host}


def _parts(cluster: Cluster) -> Iterator[tuple[str, Any]]:
    for name in PARTS:
        yield name, getattr(cluster, name)


def load_cluster(path: str | os.PathLike[str]) -> Cluster:
    """The cluster that a JSON file describes, or one that ships, by its name (`h100_4x4`).

    Raises ConfigError for a file or a number that cannot be.
    """
    shipped = shipped_clusters()
    where = path_of(path, shipped)
    try:
        values = json.loads(where.read_text(encoding="utf-8"))
    except OSError as error:
        message = f"cluster={str(where)!r}: cannot be read ({error.strerror}); {way_to(where, shipped)}"
        raise ConfigError(message) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"cluster={str(where)!r}: no JSON ({error}); {EXAMPLES}") from error
    return read_cluster(values)


def read_cluster(values: Any) -> Cluster:
    """The cluster of plain values: name, num_nodes, node_size and the parts. Raises ConfigError."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"cluster={values!r}: expected an object; {EXAMPLES}")
    known = {"name", "num_nodes", "node_size", "notes", "computes_on", *PARTS}
    for key in values:
        if key not in known:
            raise ConfigError(f"cluster.{key}={values[key]!r}: unknown key; {nearest(key, known)}")
    for key in ("name", "num_nodes", "node_size", "device", "near", "far"):
        if key not in values:
            raise ConfigError(f"cluster.{key}: missing; a cluster has name, num_nodes, node_size, device, near and far")
    for key in ("num_nodes", "node_size"):
        if type(values[key]) is not int or values[key] < 1:
            raise ConfigError(f"cluster.{key}={values[key]!r}: needs a whole number of at least 1")
    if not isinstance(values["name"], str) or not values["name"].strip():
        raise ConfigError(f"cluster.name={values['name']!r}: needs a text; give the cluster a name")
    computes_on = values.get("computes_on", "device")
    if computes_on not in ("device", "host"):
        raise ConfigError(f"cluster.computes_on={computes_on!r}: choose 'device' or 'host'")
    sources: dict[str, str] = {}
    ranges: dict[str, tuple[float, float]] = {}
    parts = {name: _read_part(name, values.get(name, {}), sources, ranges) for name in PARTS}
    cluster = Cluster(
        name=values["name"],
        num_nodes=values["num_nodes"],
        node_size=values["node_size"],
        computes_on=computes_on,
        sources=sources,
        ranges=ranges,
        **parts,
    )
    if cluster.far.shared_by > cluster.node_size:
        raise ConfigError(
            f"cluster.far.shared_by={cluster.far.shared_by:g} with node_size={cluster.node_size}: a node has no more "
            "ranks than that; lower it"
        )
    if computes_on == "host" and not cluster.host.cores:
        raise ConfigError("cluster.computes_on='host': says nothing without host.cores; give the machine's cores")
    return cluster


def _read_part(name: str, given: Any, sources: dict[str, str], ranges: dict[str, tuple[float, float]]) -> Any:
    kind = PARTS[name]
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if not isinstance(given, Mapping):
        raise ConfigError(f"cluster.{name}={given!r}: expected an object of numbers; write {{...}}")
    found: dict[str, float] = {}
    for key, value in given.items():
        path = f"{name}.{key}"
        if key not in fields:
            raise ConfigError(f"cluster.{path}={value!r}: unknown key; {nearest(key, fields)}")
        found[key], pair, sources[path] = _read_quantity(f"cluster.{path}", value, fields[key].metadata)
        if pair is not None:
            ranges[path] = pair
    for key, declared in fields.items():
        if key not in found and declared.default is dataclasses.MISSING:
            raise ConfigError(f"cluster.{name}.{key}: missing ({declared.metadata['help']}); give it")
    return kind(**found)


def _read_quantity(path: str, given: Any, metadata: Mapping[str, Any]) -> tuple[float, tuple[float, float] | None, str]:
    """(value, range, source) of one number, in the units of the fields."""
    scales = SCALES[metadata["kind"]]
    fix = f'write {{"value": ..., "unit": "{next(iter(scales))}", "source": "..."}}'
    if not isinstance(given, Mapping) or not {"value", "unit", "source"} <= set(given):
        raise ConfigError(f"{path}={given!r}: {metadata['help']}; each number has a unit and a source: {fix}")
    for key in given:
        if key not in ("value", "unit", "source", "range"):
            raise ConfigError(
                f"{path}.{key}={given[key]!r}: unknown key; {nearest(key, ('value', 'unit', 'source', 'range'))}"
            )
    unit, source = given["unit"], given["source"]
    if not isinstance(unit, str) or unit not in scales:
        raise ConfigError(f"{path}.unit={unit!r}: no unit of this; choose one of {', '.join(map(repr, scales))}")
    if not isinstance(source, str) or not source.strip():
        raise ConfigError(f"{path}.source={source!r}: says where the number is from; give a text")
    span = given.get("range", [])
    if not isinstance(span, Sequence) or ("range" in given and len(span) != 2):
        raise ConfigError(f"{path}.range={span!r}: two numbers with the value between them; write [low, high]")
    numbers = [given["value"], *span]
    if not all(type(number) in (int, float) and number >= metadata["minimum"] for number in numbers):
        raise ConfigError(f"{path}={numbers!r}: {metadata['help']}; needs numbers of at least {metadata['minimum']:g}")
    value, *pair = (number * scales[unit] for number in numbers)
    if metadata["kind"] in ("ratio", "bytes/us") and not all(numbers):
        raise ConfigError(f"{path}={numbers!r}: {metadata['help']}; at 0 nothing would ever end: give more")
    if metadata["kind"] == "ratio" and max(value, *pair, 0.0) > 1:
        raise ConfigError(f"{path}={numbers!r}: {metadata['help']}; a share of the whole is 1 at most, or 100 percent")
    if pair and not pair[0] <= value <= pair[1]:
        raise ConfigError(f"{path}.range={span!r}: two numbers with the value between them; write [low, high]")
    return value, (pair[0], pair[1]) if pair else None, source
