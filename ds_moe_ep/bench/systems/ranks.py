"""The life of a rank of the systems benchmark: builds every system, then lets them alternate on each environment.

1. All systems live in the same processes, so that one run compares them: a round runs each once, in rotating order.
2. Ranks meet at a barrier before a pass; its time is that of the slowest rank, with the device idle at both ends.
3. A training pass is one optimizer step with everything in it, on the same sequences for every system. Its wall time is
   cut into parts: what the thread was blocked in, by kind of communication, and what the recorder saw exposed.
4. Losses and loads are looked at between the passes, untimed.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from multiprocessing.queues import Queue
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ds_moe_ep.bench.candidates.emulated import EmulatedDevice
from ds_moe_ep.bench.harness.collective import mean, slowest
from ds_moe_ep.bench.harness.method import rotation
from ds_moe_ep.bench.harness.processes import Finding, Tell, live_as_rank
from ds_moe_ep.bench.meters.memory import return_freed_memory
from ds_moe_ep.bench.meters.memory_breakdown import memory_breakdown
from ds_moe_ep.bench.systems.plan import OVERLAPPED, SystemsPlan
from ds_moe_ep.bench.testbed import Environment, take_place
from ds_moe_ep.schedule.spans import line_of

if TYPE_CHECKING:  # it imports deepspeed, which reads DS_ACCELERATOR
    from ds_moe_ep.bench.systems.candidate import SystemCandidate

START_TIMEOUT_S = 600.0
SHOWN_LAYER = "layers.1.feed_forward"  # of which a timeline is kept
SHOWN_RANKS = (0, 5)
LOAD_STEPS = 24  # steps of which loads are kept, evenly spread over a run

Samples = dict[str, tuple[float, ...]]


def run_systems_rank(rank: int, plan: SystemsPlan, findings: Queue[Finding]) -> None:
    """The whole life of one rank."""
    take_place(plan.testbed, rank, plan.num_ranks, plan.ranks_per_node, plan.port)
    os.environ |= {"DS_ACCELERATOR": "cuda" if plan.device == "cuda" else "cpu", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    torch.set_num_threads(1)
    if plan.measure == "memory":
        return_freed_memory()
    live_as_rank(rank, findings, partial(_run, plan))


def _run(plan: SystemsPlan, tell: Tell) -> None:
    from ds_moe_ep.bench.candidates import native
    from ds_moe_ep.bench.systems.build import build
    from ds_moe_ep.bench.systems.data import make_data

    if plan.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    native.start_ranks("nccl" if plan.device == "cuda" else "gloo", START_TIMEOUT_S)
    device, data, systems = EmulatedDevice(), make_data(plan), dict[str, "SystemCandidate"]()
    for name in sorted(plan.systems, key=lambda name: name in plan.cuts):
        tell(Finding("phase", f"building {name}"))
        systems[name] = build(name, plan, data, device)
    if plan.measure == "memory":
        measure_memory(systems, plan, tell)
    else:
        for environment in plan.environments:
            measure_on(environment, systems, plan, tell)
    dist.barrier()
    dist.destroy_process_group()


def measure_on(environment: Environment, systems: Mapping[str, SystemCandidate], plan: SystemsPlan, tell: Tell) -> None:
    """All rounds on the links of an environment. Collective."""
    dist.barrier()
    if dist.get_rank() == 0 and plan.testbed is not None:
        plan.testbed.shape(environment.rate_mbit)
    for name in OVERLAPPED if plan.schedule == "auto" else ():
        for layer in systems[name].engine.moe_ep_layers.values() if name in systems else ():
            layer.dispatcher.forget_choice()  # chosen again for these links
    gc.collect()
    gc.freeze()
    for index in range(plan.warm_ups + plan.rounds):
        samples: Samples = {}
        for mode in plan.modes:
            for name in rotation(plan.systems, index):
                systems[name].run(mode)
                passed = dict(of_pass(environment.name, mode, systems[name], plan))
                if index >= plan.warm_ups:
                    samples |= passed
                if mode == "training":
                    samples |= of_training(environment.name, systems[name], index, plan)
        tell(Finding(samples=samples))
        text = f"{environment.name}: round {index + 1 - plan.warm_ups} of {plan.rounds}"
        tell(Finding("phase", text, advance=1))
    gc.unfreeze()
    if environment is plan.environments[0] and "training" in plan.modes:  # spans do not say where they are from
        for system in systems.values():
            if system.recorder is not None:
                system.run("training")
                tell_spans(system, tell)


def of_pass(
    environment: str, mode: str, system: SystemCandidate, plan: SystemsPlan
) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Samples of a pass: time of the slowest rank, and the rest of the mean rank. Collective."""
    of, tokens = plan.prefix(environment, mode, system.name), plan.tokens_of_step
    (longest_s,) = slowest([system.seconds["step"]], system.device)
    here_s = dict(zip(system.seconds, mean(list(system.seconds.values()), system.device), strict=True))
    yield f"{of}.step", (1e3 * longest_s,)
    yield f"{of}.tps", (tokens / longest_s,)
    yield f"{of}.tpot", (1e6 * longest_s / tokens,)
    yield f"{of}.mean_step", (1e3 * here_s["step"],)  # what the parts of the breakdown sum to
    yield f"{of}.busy", (100 * here_s["busy"] / here_s["step"],)
    for name, part_s in here_s.items():
        if (
            name.startswith("breakdown.") and plan.device != "cuda"
        ):  # its waits are not the host's: nothing is told apart
            yield f"{of}.{name}", (1e3 * part_s,)
    if total_s := here_s.get("traffic.total"):
        yield f"{of}.hidden", (100 * (1 - here_s["traffic.exposed"] / total_s),)
        if plan.is_emulated and (mode, system.name) == ("training", "ep16_serial"):
            yield f"system.{environment}.traffic.ratio", (total_s / plan.step_compute_s,)


def of_training(environment: str, system: SystemCandidate, index: int, plan: SystemsPlan) -> Samples:
    """Loss of the step and, now and then, the experts' load; nothing of emulated devices. Collective."""
    of, step = plan.prefix(environment, "training", system.name), system.step
    loss, rows_LE = float(system.cross_entropy()), system.loads()
    if plan.is_emulated:
        return {}
    samples: Samples = {f"{of}.loss.step{step:04d}": (loss,)}
    every = -(-(plan.warm_ups + plan.rounds) // LOAD_STEPS)
    for layer, rows_E in enumerate(rows_LE.tolist() if index % every == 0 else ()):
        for expert, rows in enumerate(rows_E):
            samples[f"{of}.load.step{step:04d}.layer{layer}.expert{expert:02d}"] = (float(rows),)
    return samples


def tell_spans(system: SystemCandidate, tell: Tell) -> None:
    """The spans of one layer on a few ranks, as lines of JSON. Collective."""
    layer = f"{system.name}/{SHOWN_LAYER}"
    shown = [span for span in system.spans if SHOWN_LAYER in span.tags.layer]
    here = [line_of(replace(span, tags=replace(span.tags, layer=layer))) for span in shown]
    gathered: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, here)
    for rank in SHOWN_RANKS:
        for line in gathered[rank % len(gathered)]:
            tell(Finding("span", line))


def measure_memory(systems: Mapping[str, SystemCandidate], plan: SystemsPlan, tell: Tell) -> None:
    """The memory breakdown of one training step of each system, on the fullest rank. Collective."""
    for name, system in systems.items():
        tell(Finding("phase", f"memory of {name}"))
        system.run("training")
        parts = memory_breakdown(system.engine, partial(system.train, 1), system.device)
        most = slowest([float(num_bytes) for num_bytes in parts.values()], system.device)
        of = plan.prefix("loopback", "training", name)
        tell(Finding(samples={f"{of}.memory.{part}": (size,) for part, size in zip(parts, most, strict=True)}))
        tell(Finding("phase", f"memory of {name}", advance=1))
