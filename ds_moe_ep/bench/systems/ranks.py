"""What each rank of the systems benchmark does: builds every system, then lets them take turns, bed after bed.

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
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from multiprocessing.queues import Queue
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ds_moe_ep.bench.harness.method import rotation
from ds_moe_ep.bench.harness.processes import Finding, live_as_rank
from ds_moe_ep.bench.meters.memory import return_freed_memory
from ds_moe_ep.bench.meters.memory_kinds import kinds_of_step
from ds_moe_ep.bench.rivals.emulated import EmulatedDevice
from ds_moe_ep.bench.systems.plan import Bed, SystemsPlan
from ds_moe_ep.bench.testbed import take_place
from ds_moe_ep.records.names import BASELINE
from ds_moe_ep.schedule.spans import line_of

if TYPE_CHECKING:  # it imports deepspeed, which reads DS_ACCELERATOR
    from ds_moe_ep.bench.systems.turn import Turn

START_TIMEOUT_S = 600.0
SHOWN_LAYER = "layers.1.feed_forward"  # of which a timeline is kept
SHOWN_RANKS = (0, 5)
LOAD_STEPS = 24  # steps of which loads are kept, evenly spread over a run

Tell = Callable[[Finding], object]


def run_systems_rank(rank: int, plan: SystemsPlan, findings: Queue[Finding]) -> None:
    """The whole life of one rank."""
    take_place(plan.testbed, rank, plan.num_ranks, plan.ranks_per_node, plan.port)
    os.environ |= {"DS_ACCELERATOR": "cuda" if plan.device == "cuda" else "cpu", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    torch.set_num_threads(1)
    if plan.measure == "memory":
        return_freed_memory()
    live_as_rank(rank, findings, partial(_run, rank, plan))


def _run(rank: int, plan: SystemsPlan, tell: Tell) -> None:
    from ds_moe_ep.bench.rivals import native
    from ds_moe_ep.bench.systems.build import build_system, make_data
    from ds_moe_ep.bench.systems.turn import Turn

    if plan.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    native.start_ranks("nccl" if plan.device == "cuda" else "gloo", START_TIMEOUT_S)
    device, data, turns = EmulatedDevice(), make_data(plan), {}
    for name in sorted(plan.systems, key=lambda name: name == BASELINE):
        tell(Finding("", "", "phase", text=f"building {name}"))
        turns[name] = Turn(build_system(name, plan, data, device), device, plan)
    if plan.measure == "memory":
        measure_memory(turns, tell)
    else:
        for bed in plan.beds:
            measure_bed(bed, turns, plan, tell)
    dist.barrier()
    dist.destroy_process_group()


def measure_bed(bed: Bed, turns: Mapping[str, Turn], plan: SystemsPlan, tell: Tell) -> None:
    """All rounds on one bed. Collective."""
    dist.barrier()
    if dist.get_rank() == 0 and plan.testbed is not None:
        plan.testbed.shape(bed.rate_mbit)
    if plan.schedule == "auto" and "ep16" in turns:
        for layer in turns["ep16"].system.engine.moe_ep_layers.values():
            layer.dispatcher.forget_choice()  # chosen again for these links
    gc.collect()
    gc.freeze()
    for index in range(plan.warm_ups + plan.rounds):
        is_measured = index >= plan.warm_ups
        for mode in plan.modes:
            for name in rotation(plan.systems, index):
                turns[name].run(mode)
                tell_pass(bed.slug, mode, turns[name], tell, is_measured)
                if mode == "training":
                    tell_training(bed.slug, turns[name], tell, index, plan)
        tell(Finding(bed.slug, "", "phase", text=f"round {index + 1 - plan.warm_ups} of {plan.rounds}"))
    gc.unfreeze()
    for turn in turns.values():
        if turn.recorder is not None and "training" in plan.modes:
            turn.run("training")
            tell_spans(bed.slug, turn, tell)


def tell_pass(bed: str, mode: str, turn: Turn, tell: Tell, is_measured: bool) -> None:
    """Seconds of the slowest rank, and the rest of the mean rank. Collective."""
    names = list(turn.seconds)
    mean = torch.tensor([turn.seconds[name] for name in names], dtype=torch.float64, device=turn.device)
    longest = mean[:1].clone()
    dist.all_reduce(mean)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    if not is_measured:
        return
    case = f"{bed}.{mode}"
    tell(Finding(case, turn.system.name, "time", (float(longest),)))
    for name, value in zip(names, mean / dist.get_world_size(), strict=True):
        tell(Finding(case, turn.system.name, name, (float(value),)))


def tell_training(bed: str, turn: Turn, tell: Tell, index: int, plan: SystemsPlan) -> None:
    """Loss of the step and, now and then, the experts' load. Collective."""
    case, name, step = f"{bed}.training", turn.system.name, turn.step
    tell(Finding(case, name, f"loss.step{step:04d}", (float(turn.system.cross_entropy()),)))
    rows_LE = turn.system.loads()
    every = -(-(plan.warm_ups + plan.rounds) // LOAD_STEPS)
    if index % every == 0:
        for layer, rows_E in enumerate(rows_LE.tolist()):
            for expert, rows in enumerate(rows_E):
                tell(Finding(case, name, f"load.step{step:04d}.layer{layer}.expert{expert:02d}", (float(rows),)))


def tell_spans(bed: str, turn: Turn, tell: Tell) -> None:
    """The spans of one layer on a few ranks, as lines of JSON. Collective."""
    layer = f"{turn.system.name}/{SHOWN_LAYER}"
    shown = [span for span in turn.spans if SHOWN_LAYER in span.tags.layer]
    here = [line_of(replace(span, tags=replace(span.tags, layer=layer))) for span in shown]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, here)
    for rank in SHOWN_RANKS:
        for line in gathered[rank % len(gathered)]:
            tell(Finding(bed, turn.system.name, "span", text=line))


def measure_memory(turns: Mapping[str, Turn], tell: Tell) -> None:
    """Bytes by kind of one training step of each system, of the fullest rank. Collective."""
    from ds_moe_ep.bench.systems.turn import world_of

    for name, turn in turns.items():
        tell(Finding("", "", "phase", text=f"memory of {name}"))
        turn.run("training")
        with world_of(turn.system.engine):
            kinds = kinds_of_step(turn.system.engine, partial(turn.system.train, 1), turn.device)
        most = torch.tensor(list(kinds.values()), dtype=torch.float64, device=turn.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        for kind, value in zip(kinds, most, strict=True):
            tell(Finding("memory.training", name, f"memory.{kind}", (float(value),)))
