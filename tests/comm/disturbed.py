"""A layer's passes on ranks of which one is disturbed in the middle of a transfer; what each rank saw, on files."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_moe_ep.comm.open import open_transport
from ds_moe_ep.comm.transport import InFront, Message, Transfer, Transport
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.moe.experts import GeluMLP
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.schedule.spans import NO_TAGS, Tags
from tests.load_clock import Stopwatch
from tests.ranks import signal_itself

VICTIM = 1
D = 8


class Disturbed(InFront):
    """Does something once, before the first transfer of a lane in a pass that comes after `arm`."""

    def __init__(self, inner: Transport, lane: str, phase: str, disturb: Callable[[], None]) -> None:
        super().__init__(inner)
        self._where, self._disturb = (lane, phase), disturb
        self.is_armed = False

    def start(self, lane: str, sends: list[Message], receives: list[Message], tags: Tags = NO_TAGS) -> Transfer:
        if self.is_armed and (lane, tags.phase) == self._where:
            self.is_armed = False
            self._disturb()
        return super().start(lane, sends, receives, tags)


def disturbance(how: str) -> Callable[[], None]:
    """Disturbance of the victim."""

    def fail() -> None:
        raise ValueError("bad luck")

    signals = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
    return partial(signal_itself, signals[how]) if how in signals else fail


def make_layer(transport: Transport, config: MoEConfig) -> ExpertParallel:
    """A small layer that calls itself layers.2.moe in errors."""
    torch.manual_seed(0)
    layer = ExpertParallel(D, GeluMLP(D, 16), config)
    layer.dispatcher.rename("layers.2.moe")
    layer.connect(transport, Torus(1, transport.size))
    return layer


def run_pass(layer: ExpertParallel) -> None:
    """Forward and backward of rows that differ: every rank has some for each other one, and waits for their results."""
    rows_TD = torch.randn(20, D, generator=torch.Generator().manual_seed(1)).requires_grad_()
    layer(rows_TD)[0].sum().backward()


def two_passes(folder: str, knobs: dict[str, Any], how: str, lane: str, phase: str) -> None:
    """A pass without a disturbance, one with it, a retry; a file per rank says how the last two ended, and how soon.

    A rank that was stopped is killed in the end: the parent waits for each.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    config = MoEConfig(num_experts=2 * size, ep_size=size, top_k=2, **knobs)
    transport = Disturbed(open_transport([list(range(size))], config), lane, phase, disturbance(how))
    layer = make_layer(transport, config)
    pids: list[Any] = [None] * size
    dist.all_gather_object(pids, os.getpid())
    run_pass(layer)
    transport.is_armed = rank == VICTIM
    watch = Stopwatch()
    report = {"first": caught(run_pass, layer), "took": watch.read(), "pid": pids[VICTIM]}
    report["again"] = caught(run_pass, layer)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(report))
    if how == "stop":
        others = [Path(folder) / f"{other}.json" for other in range(size) if other != VICTIM]
        while not all(path.exists() for path in others):
            time.sleep(0.05)
        os.kill(pids[VICTIM], signal.SIGKILL)


def caught(function: Callable[..., object], *words: object) -> str:
    """The error that a call ends with, or an empty string."""
    try:
        function(*words)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def reports(folder: Path) -> dict[int, dict[str, Any]]:
    """Reports of the surviving ranks."""
    return {int(path.stem): json.loads(path.read_text()) for path in folder.glob("*.json")}
