"""Verdicts on environment variables: the specification's (section 5.1), and others that decide whether rows overlap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from ds_moe_ep.doctor.facts import Facts
from ds_moe_ep.doctor.verdicts import Verdict
from ds_moe_ep.records.quantity import counted

_verdict = partial(Verdict, "environment")

SPECIFIED = {
    "CUDA_VISIBLE_DEVICES": "0,1,2,...,15",
    "NCCL_IB_HCA": "mlx5_0,mlx5_1",
    "NCCL_SOCKET_IFNAME": "ib0",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "NCCL_NTHREADS": "512",
}
NCCL_THREADS = ("64", "128", "256", "512")
# Variables that work against overlap or links where they are set, and what they do.
HARMFUL = {
    "CUDA_LAUNCH_BLOCKING": "the host waits for every kernel: nothing overlaps",
    "TORCH_NCCL_BLOCKING_WAIT": "the host waits in every transfer: nothing overlaps",
    "NCCL_P2P_DISABLE": "GPUs of one node meet in the host's memory instead of NVLink",
    "NCCL_SHM_DISABLE": "ranks of one node without peer access meet over the network",
    "NCCL_IB_DISABLE": "nodes meet over sockets instead of InfiniBand",
}
OFF = (None, "", "0")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The part of a run that decides which variables matter."""

    num_ranks: int = 1  # on this machine
    num_nodes: int = 1
    depth: int | None = None  # the config's; None without one


def judge_variables(facts: Facts, run: Run) -> list[Verdict]:
    """One verdict per variable: the specification's five, this package's three, and harmful ones that are set."""
    return [
        *judge_specified(facts, run),
        judge_accelerator(facts),
        judge_threads(facts, run),
        judge_gloo_interface(facts, run),
        *judge_harmful(facts),
    ]


def judge_specified(facts: Facts, run: Run) -> Iterator[Verdict]:
    """The variables that the specification sets; without a GPU none of them matters."""
    if facts.device == "cpu":
        for name, specified in SPECIFIED.items():
            found = f"{_shown(facts, name)}; the specification sets {specified}: matters on GPUs alone, not here"
            yield _verdict(name, "ok", found, applies=False)
        return
    yield _judge_visible(facts)
    yield _judge_adapters(facts, run)
    yield _judge_interface(facts, run)
    yield _judge_connections(facts, run.depth)
    yield _judge_nccl_threads(facts)


def _judge_visible(facts: Facts) -> Verdict:
    name, seen = "CUDA_VISIBLE_DEVICES", len(facts.torch.devices)
    value = facts.environment.get(name)
    if value is None:
        return _verdict(name, "ok", f"not set: torch sees all {seen} GPUs")
    listed = len([part for part in value.split(",") if part.strip()])
    if listed != seen:
        found = f"{value}: names {listed} devices, torch sees {seen}: it stops at the first that does not exist"
        return _verdict(name, "warning", found, "name devices that nvidia-smi -L lists, or unset it")
    return _verdict(name, "ok", f"{value}: torch sees {seen} GPUs")


def _judge_adapters(facts: Facts, run: Run) -> Verdict:
    name, adapters = "NCCL_IB_HCA", facts.host.adapters
    value, there = facts.environment.get(name), ", ".join(facts.host.adapters) or "none"
    if run.num_nodes == 1:
        return _verdict(
            name, "ok", f"{_shown(facts, name)}; matters between nodes alone, and this run has one", applies=False
        )
    if value is None:
        found = f"not set: NCCL chooses among {there}"
        if len(adapters) > 1:
            return _verdict(name, "note", found, "name the adapters of the compute network, so that no other is taken")
        return _verdict(name, "ok", found, applies=bool(adapters))
    names = [part.split(":")[0] for part in value.lstrip("^=").split(",") if part]
    unknown = [part for part in names if not any(_matches(adapter, part, value) for adapter in adapters)]
    if unknown and not value.startswith("^"):
        found = f"{value}: this machine has no adapter {', '.join(unknown)} (it has {there})"
        return _verdict(name, "warning", found, "name adapters of /sys/class/infiniband; ibv_devices lists them")
    return _verdict(name, "ok", f"{value}; adapters here: {there}")


def _judge_interface(facts: Facts, run: Run) -> Verdict:
    name = "NCCL_SOCKET_IFNAME"
    value = facts.environment.get(name)
    if value is None:
        if run.num_nodes > 1:
            fix = "name the interface that reaches the other nodes (the specification: ib0)"
            return _verdict(name, "note", "not set: NCCL takes the first interface that is up", fix)
        return _verdict(name, "ok", "not set; matters between nodes alone", applies=False)
    wanted = [part for part in value.lstrip("^=").split(",") if part]
    if value.startswith("^") or any(_matches(each, part, value) for each in facts.host.interfaces for part in wanted):
        return _verdict(name, "ok", value)
    found = f"{value}: no such interface here (there are {', '.join(facts.host.interfaces)}): NCCL cannot start"
    return _verdict(name, "problem", found, "name one of these, or unset it")


def _matches(name: str, part: str, value: str) -> bool:
    """NCCL's rule: a prefix, or the whole name after a "="."""
    return name == part if "=" in value[:2] else name.startswith(part)


def _judge_connections(facts: Facts, depth: int | None) -> Verdict:
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    value = facts.environment.get(name)
    if value == "1" and depth is not None and depth > 1:
        found = f"1, with moe_ep.depth={depth}: one hardware queue runs in issue order, and a depth of 1 suits it"
        return _verdict(name, "note", found, "set moe_ep.depth to 1, or unset the variable")
    if value == "1":
        return _verdict(name, "ok", "1: one hardware queue, in issue order, which every schedule here keeps to")
    if value is None:
        found = "not set (8 hardware queues): works; the specification sets 1, so that kernels start in issue order"
        return _verdict(name, "note", found, "export CUDA_DEVICE_MAX_CONNECTIONS=1 and moe_ep.depth 1, as ep16.json")
    if not value.isdigit() or not 1 <= int(value) <= 32:
        return _verdict(name, "warning", f"{value}: CUDA takes 1 to 32", "set it to 1, or unset it")
    return _verdict(name, "ok", f"{value} hardware queues (the specification: 1)")


def _judge_nccl_threads(facts: Facts) -> Verdict:
    name = "NCCL_NTHREADS"
    value = facts.environment.get(name)
    if value is None:
        return _verdict(name, "ok", "not set: NCCL takes 512 on GPUs of today, as the specification does")
    if value not in NCCL_THREADS:
        return _verdict(name, "warning", f"{value}: NCCL takes {', '.join(NCCL_THREADS)}", "set it to 512")
    return _verdict(name, "ok", f"{value} (the specification: 512)")


def judge_accelerator(facts: Facts) -> Verdict:
    """DS_ACCELERATOR, which decides what DeepSpeed trains on."""
    name, value = "DS_ACCELERATOR", facts.environment.get("DS_ACCELERATOR")
    devices = len(facts.torch.devices)
    if value == "cuda" and not devices:
        return _verdict(name, "problem", "cuda, and torch sees no GPU", "unset it, or set it to cpu")
    if value == "cpu" and devices:
        return _verdict(name, "warning", f"cpu: {devices} GPUs stay idle", "unset it to train on them")
    if value not in (None, "", "cpu", "cuda"):
        found = f"{value}: the package was tested on cpu, and written for cuda"
        return _verdict(name, "warning", found, "set it to cuda or cpu")
    if value is None and not devices:
        found = "not set: DeepSpeed finds no GPU and takes the CPU"
        return _verdict(name, "note", found, "export DS_ACCELERATOR=cpu, so that nothing depends on what it finds")
    return _verdict(name, "ok", _shown(facts, name))


def judge_threads(facts: Facts, run: Run) -> Verdict:
    """OMP_NUM_THREADS: threads of all ranks against this machine's cores."""
    name, cores = "OMP_NUM_THREADS", facts.host.cores
    value = facts.environment.get(name)
    wanted = max(1, cores // max(1, run.num_ranks))
    on = f"{counted(run.num_ranks, 'rank')} on {cores} cores"
    if value is not None and not value.isdigit():
        return _verdict(name, "warning", f"{value} is no number of threads", f"export OMP_NUM_THREADS={wanted}")
    threads = int(value) if value else cores
    if run.num_ranks > 1 and threads > wanted and facts.device == "cpu":
        found = f"{_shown(facts, name)}: {on} would start {threads} threads each and wait for each other"
        return _verdict(name, "warning", found, f"export OMP_NUM_THREADS={wanted}")
    return _verdict(name, "ok", f"{_shown(facts, name)}, {on}")


def judge_gloo_interface(facts: Facts, run: Run) -> Verdict:
    """GLOO_SOCKET_IFNAME: where gloo listens."""
    name, value = "GLOO_SOCKET_IFNAME", facts.environment.get("GLOO_SOCKET_IFNAME")
    if value is None:
        return _verdict(name, "ok", "not set: gloo listens where this machine's name resolves to", applies=False)
    unknown = [part for part in value.split(",") if part not in facts.host.interfaces]
    if unknown:
        found = f"{value}: no such interface here (there are {', '.join(facts.host.interfaces)}): gloo cannot start"
        return _verdict(name, "problem", found, "name one of these, or unset it")
    if run.num_nodes > 1 and value == "lo":
        found = f"lo: no other node reaches it, and this run has {run.num_nodes} nodes"
        return _verdict(name, "warning", found, "name the interface that reaches the other nodes")
    return _verdict(name, "ok", value)


def judge_harmful(facts: Facts) -> Iterator[Verdict]:
    """Variables that are set and slow a run on this kind of device."""
    if facts.device == "cuda":
        for name, effect in HARMFUL.items():
            if facts.environment.get(name) not in OFF:
                yield _verdict(name, "warning", f"{facts.environment[name]}: {effect}", f"unset {name}")
    if facts.environment.get("TORCH_DISTRIBUTED_DEBUG", "").upper() == "DETAIL":
        found = "DETAIL: every transfer is checked by another one first; times mean little"
        yield _verdict("TORCH_DISTRIBUTED_DEBUG", "warning", found, "unset TORCH_DISTRIBUTED_DEBUG")


def _shown(facts: Facts, name: str) -> str:
    value = facts.environment.get(name)
    return "not set" if value is None else value or "set to nothing"
