"""Faults, put into one rank of a job from outside of the package, each at one place of one step.

`kill.dispatch@3:1` kills rank 1 in step 3, in the forward dispatch of the second layer. Places are `dispatch` and
`combine` (forward), `backward` (its dispatch), `weights` (of replicas, to their slots), `sums` (of the replicas'
gradients, on their way home), `reduce` (behind the layers' backward pass, in DeepSpeed's reduction of gradients) and
`save` (between two files of a checkpoint).
"""

from __future__ import annotations

import pathlib
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.engine.small_model import Job
from tests.ranks import signal_itself

LANES = {"dispatch": ("dispatch", "forward"), "combine": ("combine", "forward"), "backward": ("dispatch", "backward")}
OF_REPLICAS = {"weights": "forward", "sums": "backward"}  # phases of the lane "replicas"
LAYER = "layers.1"  # where faults are


@dataclass(frozen=True)
class Fault:
    """Fault: what happens where, in which step (as the engine counts them) and on which rank."""

    kind: str
    place: str
    step: int
    rank: int

    @classmethod
    def parse(cls, text: str) -> Fault:
        match = re.fullmatch(r"(\w+)(?:\.(\w+))?@(\d+):(\d+)", text)
        if match is None:
            raise ValueError(f"fault={text}: write kind.place@step:rank")
        return cls(match[1], match[2] or "", int(match[3]), int(match[4]))


class Brittle(nn.Module):
    """An expert that can be made to raise. No known form, so it runs as a module."""

    def __init__(self, expert: nn.Module) -> None:
        super().__init__()
        self.expert = expert
        self.is_broken: Callable[[], bool] = bool

    def forward(self, x: Tensor) -> Tensor:
        if self.is_broken():
            raise ValueError("this expert cannot go on")
        output: Tensor = self.expert(x) + 0.0
        return output


def inject_before_start(fault: Fault, job: Job, folder: pathlib.Path) -> Job:
    """The job of a rank whose configuration is another."""
    if fault.kind != "config":
        return job
    note(folder)
    return replace(job, top_k=3)


def inject(fault: Fault, engine: Any, folder: pathlib.Path) -> None:
    """Puts the fault into this rank."""

    def is_time() -> bool:
        return bool(engine.global_steps == fault.step)

    def act() -> None:
        note(folder)
        ACTIONS[fault.kind]()

    layer = engine.module.get_submodule(LAYER)
    if fault.place in LANES:
        at_transfer(layer.deepspeed_moe.dispatcher.connection.transport, *LANES[fault.place], is_time, act)
    elif fault.place in OF_REPLICAS:
        link = layer.deepspeed_moe.dispatcher.replicas.link
        at_transfer(link, "replicas", OF_REPLICAS[fault.place], is_time, act, number=1)
    elif fault.place == "reduce":
        engine.module.enter.bias.register_hook(lambda grad: act() if is_time() else None)
    elif fault.place == "save":
        before_second_file(engine, lambda: engine.global_steps > fault.step, act)
    elif fault.kind == "raise":
        for expert in layer.deepspeed_moe.experts.deepspeed_experts:
            expert.is_broken = lambda: is_time() and note(folder)
    elif fault.kind == "leave":
        engine.module.register_forward_pre_hook(lambda module, inputs: act() if is_time() else None)
    elif fault.kind == "nan":
        weight = (
            layer.deepspeed_moe.experts.deepspeed_experts[0].fc1.weight if fault.rank else engine.module.enter.weight
        )
        weight.register_hook(lambda grad: torch.full_like(grad, float("nan")) if is_time() and note(folder) else None)
    elif fault.kind == "count":
        engine.module.register_forward_pre_hook(
            lambda module, inputs: (
                tuple(torch.cat([each, each]) for each in inputs) if is_time() and note(folder) else None
            )
        )
    elif fault.kind in CHANGES:
        change = CHANGES[fault.kind]
        layer.register_forward_pre_hook(
            lambda module, inputs: (change(module, inputs[0]),) if is_time() and note(folder) else None
        )


def note(folder: pathlib.Path) -> bool:
    """Writes down when the fault happened; true."""
    with (folder / "fault").open("w") as file:
        file.write(str(time.time()))
    return True


def at_transfer(
    transport: Any, lane: str, phase: str, is_time: Callable[[], bool], act: Callable[[], None], number: int = 2
) -> None:
    """Acts before the second transfer, or another one, of a pass on a lane is started: in the middle of it."""
    start, seen = transport.start, []

    def start_or_act(lane_now: str, sends: Any, receives: Any, *tags: Any) -> Any:
        if lane_now == lane and tags[0].phase == phase and is_time():
            seen.append(lane_now)
            if len(seen) == number:
                act()
        return start(lane_now, sends, receives, *tags)

    transport.start = start_or_act


def before_second_file(engine: Any, is_time: Callable[[], bool], act: Callable[[], None]) -> None:
    """Acts before a rank writes the second file of a checkpoint."""
    write, seen = engine.checkpoint_engine.save, []

    def write_or_act(state_dict: Any, path: str) -> Any:
        if is_time():
            seen.append(path)
            if len(seen) == 2:
                pathlib.Path(path).write_bytes(b"half a file")
                act()
        return write(state_dict, path)

    engine.checkpoint_engine.save = write_or_act


def _fill_the_disk() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.RLIM_INFINITY))


def _in_bf16(layer: nn.Module, x: Tensor) -> Tensor:
    """The rank's whole layer and its tokens in another type: it finds nothing wrong itself."""
    layer.bfloat16()
    return x.bfloat16()


def _with_a_weight_off(layer: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        layer.deepspeed_moe.experts.deepspeed_experts[0].fc1.weight[0, 0] += 0.01
    return x


def _with_narrower_tokens(layer: nn.Module, x: Tensor) -> Tensor:
    return x[:, :-1].contiguous()


ACTIONS: dict[str, Callable[[], Any]] = {
    "kill": partial(signal_itself, signal.SIGKILL),
    "stop": partial(signal_itself, signal.SIGSTOP),
    "disk": _fill_the_disk,
    "leave": lambda: sys.exit(0),
}
CHANGES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "dtype": _in_bf16,
    "nudge": _with_a_weight_off,
    "width": _with_narrower_tokens,
}
