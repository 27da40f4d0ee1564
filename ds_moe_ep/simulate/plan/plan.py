"""`plan`: a ds_config foretold on a cluster, before anybody rents it. Nothing is started and nothing measured.

A plan has these parts:

    fit         bytes of a device by kind, what is to spare, the largest micro-batch
    prediction  a step with its bar: tokens per second, parts, what is hidden, utilization
    choices     what the schedule "auto" would choose among, with what each makes of a layer
    bounds      which resource bounds the step
    replicas    what copies of hot experts bring, where there are slots and the load is not even
    others      what else fits, and how much faster it is
    stated      the specification's throughput beside it, with the utilization that it needs
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ds_moe_ep.check.pipeline import has_specified_shapes
from ds_moe_ep.config.training import WHOLE
from ds_moe_ep.kernels.attention_path import AttentionPath, attention_path
from ds_moe_ep.records.names import KINDS, title_of
from ds_moe_ep.records.quantity import Quantity, Row
from ds_moe_ep.simulate.cluster.cluster import Cluster
from ds_moe_ep.simulate.job.choose import choose_schedule, with_knobs
from ds_moe_ep.simulate.job.fit import MemoryFit, fit_memory, refuse_what_does_not_fit
from ds_moe_ep.simulate.job.job import Job, Mode, read_job
from ds_moe_ep.simulate.job.replicas import ReplicaGain, gain_of
from ds_moe_ep.simulate.plan.alternatives import alternatives
from ds_moe_ep.simulate.plan.bounds import bounds
from ds_moe_ep.simulate.step.predict import Prediction, on, predict
from ds_moe_ep.simulate.step.quantities import breakdown, headline
from ds_moe_ep.simulate.step.setup import Setup
from ds_moe_ep.simulate.step.source import COUNTED
from ds_moe_ep.sizing.footprint import forward_flops, training_flops
from ds_moe_ep.specification.stated import STATED

SERIAL: Mapping[str, Any] = {"schedule": "serial"}


@dataclass(frozen=True, kw_only=True)
class StatedThroughput:
    """The throughput that the specification states, and the share of the devices' peak that it takes here."""

    tps: float
    training: float
    repeated: float  # training, with the forward passes that recomputation repeats
    forward: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is predicted of one job."""

    job: Job
    fit: MemoryFit
    prediction: Prediction
    serial: Prediction | None  # the same where nothing is hidden; None where that is the job, or there are no peers
    choices: tuple[Row, ...]  # `layer_ms` under the knobs of each schedule
    at_ends: tuple[Mapping[str, Any], ...]  # the best at the slower and at the faster end
    bounds: tuple[Row, ...]
    others: tuple[Row, ...]
    stated: StatedThroughput | None
    replicas: ReplicaGain | None = None
    name: str = ""  # for a reader, where the system's own would not tell it apart

    @property
    def system(self) -> str:
        """The job's name in Records."""
        return self.job.system

    @property
    def title(self) -> str:
        """The job's name for a reader."""
        return self.name or title_of(self.system)

    @property
    def attention(self) -> AttentionPath:
        """Way that attention runs on the cluster."""
        setup = self.job.setup
        return attention_path(setup.model.head_size, "cpu" if setup.cluster.computes_on == "host" else "cuda")

    @cached_property
    def quantities(self) -> tuple[Quantity, ...]:
        """All numbers of the job's step and memory: tables, JSON and Records are readings of this one list."""
        return *of_step(self.prediction), *memory_of_kinds(self.fit)

    @cached_property
    def serial_quantities(self) -> tuple[Quantity, ...]:
        """The step's numbers where nothing is hidden."""
        return () if self.serial is None else of_step(self.serial)

    @property
    def gain(self) -> Quantity | None:
        """Throughput over that of the same job where nothing is hidden."""
        return None if self.serial is None else self.prediction.over(self.serial)


PARTS, MEMORY = "breakdown.", "memory."  # begin the names of groups; those of the headline have no dot


def of_step(prediction: Prediction) -> tuple[Quantity, ...]:
    """Headline and breakdown of a step."""
    parts = (part.named(PARTS + part.name, part.title) for part in breakdown(prediction))
    return *headline(prediction), *parts


def memory_of_kinds(fit: MemoryFit) -> tuple[Quantity, ...]:
    """Bytes of a device by kind."""
    memory = fit.memory
    return tuple(
        Quantity.of(float(getattr(memory, kind)), unit="bytes", name=MEMORY + kind, title=title, note=COUNTED)
        for kind, title in KINDS.items()
    )


def group_of(quantities: Iterable[Quantity], start: str = "") -> list[Quantity]:
    """The quantities of a group under their short names: those that begin with `start`, or have no dot."""
    if not start:
        return [quantity for quantity in quantities if "." not in quantity.name]
    return [q.named(q.name.removeprefix(start), q.title) for q in quantities if q.name.startswith(start)]


def make_plan(
    source: str | os.PathLike[str] | Mapping[str, Any],
    cluster: Cluster,
    *,
    micro_batch: int | Literal["largest"] | None = None,
    load: str = "even",
    mode: Mode = "training",
    replicas: int | Literal["auto"] | None = None,
) -> Plan:
    """The plan of a ds_config on the cluster.

    Raises ConfigError or TopologyError for what cannot work, and for what does not fit with the fix.
    """
    return plan_of(read_job(source, cluster, micro_batch=micro_batch, load=load, mode=mode, replicas=replicas), load)


def plan_of(job: Job, load: str = "even") -> Plan:
    """The plan of a job that was read with this load. Raises ConfigError, with the fix, for what does not fit."""
    fit = fit_memory(job.setup)
    refuse_what_does_not_fit(job.path, job.setup, fit)
    choices = _choices(job.setup)
    at_ends = tuple(_choices(on(job.setup, end))[0].labels for end in job.setup.cluster.ends() if choices)
    job = _chosen(job, choices)
    prediction = predict(job.setup)
    return Plan(
        job=job,
        fit=fit,
        prediction=prediction,
        serial=_serial(job),
        choices=choices,
        at_ends=at_ends,
        bounds=bounds(prediction),
        others=alternatives(prediction, fit),
        stated=stated_for(job),
        replicas=gain_of(prediction, load),
    )


def _choices(setup: Setup) -> tuple[Row, ...]:
    """The schedules worth a look, the best first; none where a rank has no peers."""
    if setup.moe.ep_size == 1:
        return ()
    priced = ((Quantity.of(us / 1e3, unit="ms", name="layer"), knobs) for us, knobs in choose_schedule(setup))
    return tuple(Row(knobs, (layer,)) for layer, knobs in priced)


def _chosen(job: Job, choices: tuple[Row, ...]) -> Job:
    """The job with the schedule that "auto" takes; others keep theirs."""
    if job.setup.moe.schedule != "auto":
        return job
    return replace(job, setup=with_knobs(job.setup, choices[0].labels if choices else SERIAL))


def _serial(job: Job) -> Prediction | None:
    setup = job.setup
    if (setup.training.layout != WHOLE and setup.moe.ep_size == 1) or setup.moe.is_serial:
        return None
    return predict(with_knobs(setup, SERIAL))


def stated_for(job: Job) -> StatedThroughput | None:
    """The specification's throughput, where this is its model and system on as many devices."""
    setup = job.setup
    index = {"tp8_pp2": 0, "ep16": 1, "ep16_serial": 1}.get(job.system)
    is_its = has_specified_shapes(setup.model) and (setup.moe.num_experts, setup.moe.top_k) == (16, 1)
    if index is None or not is_its or setup.training.world_size != 16:
        return None
    peak_per_s = 1e6 * setup.training.world_size * setup.cluster.device.peak(setup.training.precision)
    tps = STATED.tps[index]
    training = tps * training_flops(setup.model, setup.moe) / peak_per_s
    forward = tps * forward_flops(setup.model, setup.moe) / peak_per_s
    repeated = training + forward * setup.model.recompute
    return StatedThroughput(tps=tps, training=training, repeated=repeated, forward=forward)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two plans side by side. Ratios are of tokens per second, both at the same end of the cluster's ranges."""

    ours: Plan
    theirs: Plan
    ratio: Quantity
    same_batch: Quantity | None  # the ratio where the other takes our batch; None where it does or cannot


def compare(ours: Plan, theirs: Plan) -> Comparison:
    """The first plan over the second. Two jobs of one system are called by their files, too."""
    if ours.system == theirs.system:
        ours, theirs = (
            replace(plan, name=f"{title_of(plan.system)} ({Path(plan.job.path).name})") for plan in (ours, theirs)
        )
    return Comparison(
        ours=ours,
        theirs=theirs,
        ratio=ours.prediction.over(theirs.prediction),
        same_batch=_same_batch(ours, theirs),
    )


def _same_batch(ours: Plan, theirs: Plan) -> Quantity | None:
    """The ratio where the other accumulates until its batch is ours: costs per step and the bubble count alike then."""
    wanted, training = ours.job.setup.training.batch, theirs.job.setup.training
    each = training.micro_batch * training.num_copies
    if wanted == training.batch or wanted % each:
        return None
    setup = replace(theirs.job.setup, training=replace(training, accumulation=wanted // each))
    return ours.prediction.over(predict(setup))
