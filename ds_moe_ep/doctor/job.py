"""Verdicts on a ds_config: could its run work on this machine, or in the job that the doctor was started in?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from ds_moe_ep.check.config import Budget, Check, check_config
from ds_moe_ep.config.knobs import Layout
from ds_moe_ep.doctor.facts import Facts
from ds_moe_ep.doctor.verdicts import Verdict
from ds_moe_ep.errors import ConfigError, TopologyError
from ds_moe_ep.records.quantity import gigabytes

_verdict = partial(Verdict, "job")

RESERVE_GB = 4.0
NO_LIMIT_GB = 1e9  # the host's memory is judged apart


@dataclass(frozen=True, kw_only=True)
class JobFacts:
    """The ranks of a run, as far as the doctor needs them."""

    world_size: int
    ep_size: int
    node_size: int  # 0: counted by host name
    depth: int | None
    ranks_here: int  # on this machine
    num_nodes: int


def job_without_config(world_size: int, ranks_here: int) -> JobFacts:
    """The job that is assumed where no ds_config is given: one expert group."""
    nodes = -(-world_size // max(1, ranks_here))
    return JobFacts(
        world_size=world_size, ep_size=world_size, node_size=0, depth=None, ranks_here=ranks_here, num_nodes=nodes
    )


def judge_job(
    path: str, facts: Facts, world_size: int | None, ranks_here: int | None
) -> tuple[list[Verdict], JobFacts | None]:
    """Verdicts on the ds_config, and its job; no job where the configuration cannot work.

    `world_size` is None where nobody said it; `ranks_here` is the launcher's number, None outside of a job.
    """
    try:
        check = check_config(path, world_size, budget_of(facts))
    except (ConfigError, TopologyError) as error:
        text = str(error)
        rule, _, fix = text.rpartition("; " if "; " in text else ": ")
        return [_verdict("ds_config", "problem", rule or text, fix)], None
    job = job_of(check, facts, ranks_here)
    found = (
        f"{path}: {check.training.world_size} ranks, {check.moe.num_experts} experts per layer, ep_size {job.ep_size}"
    )
    verdicts = [_verdict("ds_config", "ok", found)]
    verdicts += [_verdict("ds_config", "note", note) for note in check.notes if not note.startswith("fp16 ")]
    verdicts += [judge_precision(check.training.precision, facts), judge_ranks(job, facts)]
    verdicts += judge_host_memory(check, job, facts)
    return verdicts, job


def budget_of(facts: Facts) -> Budget:
    """The memory that a rank has here: that of the smallest GPU; on a CPU the check sets no limit."""
    if facts.device == "cpu":
        return Budget(gpu_gb=NO_LIMIT_GB)
    smallest = min(device.memory_bytes for device in facts.torch.devices) / 1e9
    return Budget(gpu_gb=smallest, reserve_gb=min(RESERVE_GB, smallest / 10))


def job_of(check: Check, facts: Facts, ranks_here: int | None) -> JobFacts:
    """The job of a configuration that works."""
    world_size, node_size = check.training.world_size, check.moe.node_size
    if ranks_here is None:  # on a CPU a node_size may be nominal, and all ranks here
        per_host = node_size or len(facts.torch.devices)
        ranks_here = min(world_size, per_host) if facts.device == "cuda" else world_size
    is_cut = check.training.layout != Layout()
    return JobFacts(
        world_size=world_size,
        ep_size=world_size if is_cut else check.moe.ep_size,
        node_size=node_size,
        depth=check.moe.depth,
        ranks_here=ranks_here,
        num_nodes=-(-world_size // ranks_here),
    )


def judge_precision(precision: str, facts: Facts) -> Verdict:
    """The configured precision against this machine's devices."""
    if precision == "fp16" and facts.device == "cpu":
        found = "fp16: DeepSpeed's CPU accelerator refuses it"
        return _verdict("precision", "problem", found, 'train on GPUs, or write "bf16": {"enabled": true} instead')
    if precision == "bf16" and any(device.capability < (8, 0) for device in facts.torch.devices):
        return _verdict("precision", "warning", "bf16: these GPUs emulate it", "use fp16 with a loss scale")
    return _verdict("precision", "ok", precision)


def judge_ranks(job: JobFacts, facts: Facts) -> Verdict:
    """Ranks against devices: a rank needs a GPU of its own; on a CPU they share the cores."""
    here = f"{job.ranks_here} of {job.world_size} ranks on this machine"
    if facts.device == "cuda":
        devices = len(facts.torch.devices)
        if job.ranks_here > devices:
            fix = f"start {devices} ranks per machine (--num_gpus {devices}), set moe_ep.node_size to {devices}"
            return _verdict("ranks", "problem", f"{here}, which has {devices} GPUs: each needs its own", fix)
        return _verdict("ranks", "ok", f"{here}, {devices} GPUs; {job.num_nodes} such machines in all")
    if job.ranks_here > facts.host.cores:
        return _verdict("ranks", "note", f"{here}, {facts.host.cores} cores: works, but ranks take turns")
    return _verdict("ranks", "ok", f"{here}, {facts.host.cores} cores")


def judge_host_memory(check: Check, job: JobFacts, facts: Facts) -> Iterator[Verdict]:
    """On a CPU, what the model needs of the host's memory."""
    if facts.device == "cuda" or check.details is None:
        return
    needed, free = check.details.memory.peak * job.ranks_here, facts.host.free_bytes
    found = f"the model needs {gigabytes(needed, 1)} on {job.ranks_here} ranks, {gigabytes(free, 1)} are free"
    if needed > free:
        yield _verdict("model's memory", "problem", found, 'choose a smaller model ("model": "small") or more machines')
    else:
        yield _verdict("model's memory", "ok", found)
