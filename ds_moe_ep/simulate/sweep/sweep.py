"""Scaling of a job: the same model on more and more devices of a cluster's kind, simulated size by size.

nodes      as many as the ranks fill; one that they do not fill has fewer, and a shared link no more than those
experts    those of the ds_config while EP is at most their number, one per rank beyond; the tokens' k stays
tokens     twice: of a rank held constant, and of all ranks, where the batch of the ds_config is shared out until a
           rank has one sequence
copies     `dp` groups of experts side by side: they share the batch, the dense gradients, and their experts' ones
schedule   where it is "auto", the one that the tuner would take at this size
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from ds_moe_ep.config.training import WHOLE, Training
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.names import LAWS, TOTALS
from ds_moe_ep.records.quantity import Quantity
from ds_moe_ep.simulate.cluster.cluster import Cluster
from ds_moe_ep.simulate.job.choose import as_auto
from ds_moe_ep.simulate.job.replicas import with_load
from ds_moe_ep.simulate.step.predict import Prediction, predict
from ds_moe_ep.simulate.step.setup import Setup
from ds_moe_ep.simulate.step.source import COUNTED, NOTE
from ds_moe_ep.sizing.footprint import Memory, count_memory
from ds_moe_ep.specification.laws import LawFit, fit

FIX = "write ep=1..1024 (doubling), ep=1,4,16, or ep=16 dp=1..64"
UNITS = {"tps": "tokens/s", "tpot": "us", "busy": "ratio", "memory_per_expert": "bytes"}  # of the laws' values
MAX_RANKS = 65_536  # beyond them a typing error is likelier than a cluster


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Ranks that share experts, and copies of such groups; every pair is a point."""

    ep: tuple[int, ...]
    dp: tuple[int, ...] = (1,)


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One size, simulated on the cluster and at both ends of its ranges."""

    total: str  # held constant, a key of records.names.TOTALS
    ep: int
    dp: int
    prediction: Prediction
    memory: Memory

    @property
    def setup(self) -> Setup:
        """The job at this size."""
        return self.prediction.step.setup

    @property
    def fits(self) -> bool:
        """True where a device has the memory; times are simulated where it has not, too."""
        device = self.setup.cluster.device
        return self.memory.peak <= device.memory_bytes - device.reserve_bytes

    @cached_property
    def quantities(self) -> Mapping[str, Quantity]:
        """All numbers of the point by name: the laws' values first, then shares of a step and bytes of a device."""
        cluster, step = self.setup.cluster, self.prediction
        schedule = f"; schedule {self.schedule}" if self.ep > 1 else ""
        where = f"{NOTE}; {cluster.num_nodes} nodes of {cluster.node_size}{schedule}"
        fits = "fits" if self.fits else "does not fit, and times are of devices with enough"
        held = self.memory.persistent / self.setup.moe.num_experts
        found = [
            step.tps.named("tps"),
            step.estimate(lambda its: its.tpot_us).named("tpot", unit=UNITS["tpot"]),
            step.estimate(lambda its: its.busy).named("busy", unit=UNITS["busy"]),
            Quantity.of(held, unit=UNITS["memory_per_expert"], name="memory_per_expert", note=COUNTED),
            step.estimate(lambda its: its.mfu).named("mfu", unit="ratio"),
            *([step.hidden.named("hidden")] if step.hidden is not None else []),
            Quantity.of(float(self.memory.peak), unit="bytes", name="memory", note=f"{COUNTED}; {fits}"),
        ]
        return {quantity.name: replace(quantity, note=quantity.note or where) for quantity in found}

    @property
    def schedule(self) -> str:
        """The schedule in few words: `serial`, `4 chunks`, `peers` of a node, `peers of 64`, `peers x 2`."""
        moe = self.setup.moe
        if moe.is_serial or moe.schedule == "chunks":
            return "serial" if moe.is_serial else f"{moe.chunks} chunks"
        size = f" of {moe.peer_group_size}" if moe.peer_group_size else ""
        return f"peers{size}" + (f" x {moe.row_cuts}" if moe.row_cuts > 1 else "")

    def value(self, law: str) -> Quantity:
        """The number that a law of the specification speaks of."""
        return self.quantities[law]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All points of a sweep. Notes say which sizes it leaves out, and why."""

    points: tuple[SweepPoint, ...]
    notes: tuple[str, ...] = ()

    def of(self, total: str) -> tuple[SweepPoint, ...]:
        """The points with this held constant."""
        return tuple(point for point in self.points if point.total == total)

    def law_fits(self, total: str) -> tuple[LawFit, ...]:
        """The specification's laws fitted to the points of the fewest copies; none where EP does not vary."""
        points = self.of(total)
        least = min((point.dp for point in points), default=1)
        values = {law: {p.ep: p.value(law).value for p in points if p.dp == least} for law in LAWS}
        return tuple(fit(law, its) for law, its in values.items() if len(its) > 1)


def read_sizes(text: str) -> Sizes:
    """Sizes from `ep=1..1024`, `ep=1,4,16` or `ep=16 dp=1..64`; a range doubles. Raises ConfigError."""
    found: dict[str, tuple[int, ...]] = {}
    for word in re.findall(r"\S+", text):
        name, _, values = word.partition("=")
        if name not in ("ep", "dp") or name in found:
            raise ConfigError(f"sweep={text!r}: {word!r} is no size of its own; {FIX}")
        found[name] = _numbers(values, text)
    if "ep" not in found:
        raise ConfigError(f"sweep={text!r}: names no ep; {FIX}")
    sizes = Sizes(**found)
    if max(sizes.ep) * max(sizes.dp) > MAX_RANKS:
        raise ConfigError(f"sweep={text!r}: more than {MAX_RANKS:,} ranks; end the range earlier")
    return sizes


def _numbers(values: str, text: str) -> tuple[int, ...]:
    first, dots, last = values.partition("..")
    numbers = [first, last] if dots else values.split(",")
    if not all(number.isdecimal() and int(number) >= 1 for number in numbers):
        raise ConfigError(f"sweep={text!r}: sizes are whole numbers of at least 1; {FIX}")
    if not dots:
        return tuple(sorted({int(number) for number in numbers}))
    size, doubled = int(first), []
    while size <= int(last):
        doubled.append(size)
        size *= 2
    if not doubled:
        raise ConfigError(f"sweep={text!r}: the range {values} is empty; {FIX}")
    return tuple(doubled)


def sweep(
    setup: Setup, sizes: Sizes, *, load: str = "even", see: Callable[[str, int, int], None] | None = None
) -> Sweep:
    """Every size under both totals. `load` is read anew for each; `see` hears of a point before it is simulated.

    Raises ConfigError for a job under a layout or whose ranks share sequences, and for sizes that its experts cannot be
    shared by.
    """
    if setup.training.layout != WHOLE:
        raise ConfigError(
            "sweep: scales expert parallelism, and the ds_config has a layout (moe_ep.layout); give one without it"
        )
    if (sharing := setup.training.sharing_ranks) > 1:
        raise ConfigError(
            f"sweep: scales expert parallelism, and {sharing} ranks share each copy's sequences (AutoTP, an mpu, "
            "sequence_parallel_size); give a ds_config without them"
        )
    points: list[SweepPoint] = []
    notes: list[str] = []
    for total in TOTALS:
        for ep, dp in ((ep, dp) for ep in sizes.ep for dp in sizes.dp):
            at = setup_at(setup, total, ep, dp, load)
            if at is None:
                notes.append(f"{TOTALS[total]}: no EP={ep} x {dp}, for {setup.training.batch} sequences are too few")
                continue
            if see is not None:
                see(total, ep, dp)
            points.append(simulate_point(at, total))
    return Sweep(points=tuple(points), notes=tuple(notes))


def simulate_point(setup: Setup, total: str) -> SweepPoint:
    """One point, under the schedule that the job has or `auto` would take."""
    chosen = as_auto(setup)
    return SweepPoint(
        total=total,
        ep=setup.moe.ep_size,
        dp=setup.training.num_replicas,
        prediction=predict(chosen),
        memory=count_memory(setup.model, setup.moe, setup.training, max(setup.loads, default=1.0)),
    )


def setup_at(setup: Setup, total: str, ep: int, dp: int, load: str = "even") -> Setup | None:
    """The job with `dp` groups of `ep` ranks; None where the batch has no sequence for each of them."""
    num_experts = setup.moe.num_experts
    if ep < num_experts and num_experts % ep:
        raise ConfigError(
            f"sweep.ep={ep}: cannot share {num_experts} experts evenly; take a size that divides {num_experts}, or "
            "one beyond it, which has one expert per rank"
        )
    moe = replace(setup.moe, num_experts=max(num_experts, ep), ep_size=ep, node_size=0)
    training = _training_at(setup.training, total, ep, dp)
    if training is None:
        return None
    cluster = cluster_at(setup.cluster, ep * dp)
    bare = replace(setup, moe=moe, training=training, cluster=cluster, loads=(), placement=None)
    return with_load(bare, load)


def _training_at(training: Training, total: str, ep: int, dp: int) -> Training | None:
    of_rank = training.micro_batch * training.accumulation
    if total == "constant_total":
        of_rank, left_over = divmod(training.batch, ep * dp)
        if not of_rank or left_over:
            return None
    micro_batch = math.gcd(of_rank, training.micro_batch)
    accumulation = of_rank // micro_batch
    return replace(training, world_size=ep * dp, ep_size=ep, micro_batch=micro_batch, accumulation=accumulation)


def cluster_at(cluster: Cluster, num_ranks: int) -> Cluster:
    """Nodes of this kind for so many ranks. Raises ConfigError where they would not share the nodes evenly."""
    num_nodes = -(-num_ranks // cluster.node_size)
    if num_ranks % num_nodes:
        raise ConfigError(
            f"sweep.ranks={num_ranks}: nodes of {cluster.node_size} cannot hold as many each; take a multiple of "
            f"{cluster.node_size}, or at most that"
        )
    node_size = num_ranks // num_nodes
    near, far = (replace(link, shared_by=min(link.shared_by, node_size)) for link in (cluster.near, cluster.far))
    ranges = {
        path: (min(low, node_size), min(high, node_size)) if path.endswith(".shared_by") else (low, high)
        for path, (low, high) in cluster.ranges.items()
    }
    return replace(cluster, num_nodes=num_nodes, node_size=node_size, near=near, far=far, ranges=ranges)
