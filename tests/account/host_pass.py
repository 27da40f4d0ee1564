"""One side of `host_time`: prints, as JSON, the host time of passes by the ds_moe_ep that stands first on the path.

It runs the package as it is, and as it was at the account's revision, whose modules had other names. The rank's own
code runs as on a GPU, on tensors so small that their kernels take next to nothing: what is left is what the host does
to issue the pass. Rows per expert differ from pass to pass, as in training, so that no pass finds its layout made.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

NODES, NODE_SIZE, NUM_TOKENS, WIDTH, EXPERT_WIDTH = 4, 4, 96, 4, 8
WARM_UPS = 10
IS_NOW = importlib.util.find_spec("ds_moe_ep.moe.executor") is not None
MODULES = {  # of names that have moved since
    "MoEConfig": ("ds_moe_ep.config.knobs", "ds_moe_ep.config"),
    "Torus": ("ds_moe_ep.config.topology", "ds_moe_ep.topology"),
    "Unwatched": ("ds_moe_ep.health.watch", "ds_moe_ep.comm.watch"),
}


def found(name: str, module: str = "") -> Any:
    return getattr(importlib.import_module(module or MODULES[name][0 if IS_NOW else 1]), name)


def layer_of(schedule: str) -> Any:
    """The layer of rank 0; messages go to torch's process group without peers."""
    size = NODES * NODE_SIZE
    ranks = tuple(range(size))
    groups = {name: dist.new_group(list(ranks), backend="fake") for name in ("dispatch", "combine", "control")}
    guard = found("AbortGuard", "ds_moe_ep.health.abort") if IS_NOW else found("Standing", "ds_moe_ep.comm.standing")
    watched = guard(0, ranks, groups.values()), found("Unwatched")()
    lanes = found("LaneGroups", "ds_moe_ep.comm.lane_groups")(0, ranks, groups, *watched)
    losses = {"aux_loss_weight": 0.02, "z_loss_weight": 0.001}
    kernels = {"kernels": "torch"} if IS_NOW else {}
    config = found("MoEConfig")(num_experts=size, ep_size=size, schedule=schedule, **losses, **kernels)
    expert = found("GeluMLP", "ds_moe_ep.moe.experts")(WIDTH, EXPERT_WIDTH)
    layer = found("ExpertParallel", "ds_moe_ep.moe.layer")(WIDTH, expert, config).half()
    layer.connect(found("Pairwise", "ds_moe_ep.comm.pairwise")(lanes, 600.0), found("Torus")(NODES, NODE_SIZE))
    dispatcher, inline = layer.dispatcher, found("Inline", "ds_moe_ep.comm.lanes")()
    setattr(dispatcher, "_lanes" if IS_NOW else "lanes", inline)
    dispatcher._device = torch.device("cpu")
    routes = routes_in_turn(size)
    layer.gate._choose = lambda *logits: next(routes)
    return layer


def routes_in_turn(num_experts: int) -> Iterator[Tensor]:
    """Experts [T, 1] that tokens choose: nearly even, and otherwise in every pass."""
    even_T1 = (torch.arange(NUM_TOKENS) % num_experts).view(-1, 1)
    drawn = [even_T1.clone() for _ in range(1, num_experts)]
    for moved, ids_T1 in enumerate(drawn, start=1):
        ids_T1[0] = moved  # one token of the first expert's
    return cycle(drawn)


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """The branches that tensors on CUDA take, without Triton; every rank sends what this one sends."""
    groups = importlib.import_module("ds_moe_ep.comm.lane_groups").LaneGroups
    real: Callable[[Any, Tensor], Tensor] = groups.exchange_counts
    changes: list[tuple[Any, str, Any]] = [
        (torch.Tensor, "is_cuda", property(lambda tensor: True)),
        (torch.Tensor, "is_cpu", property(lambda tensor: False)),
        (groups, "exchange_counts", lambda self, counts_PC: real(self, counts_PC).copy_(counts_PC)),
    ]
    if IS_NOW:
        changes.append((importlib.import_module("ds_moe_ep.moe.agreement"), "is_on_host", lambda device: False))
        changes.append((importlib.import_module("ds_moe_ep.moe.rows.buffers"), "moves_by_index", lambda device: True))
    with contextlib.ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


class Operations(TorchDispatchMode):
    """Counts torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


class Passes:
    """Forward and backward passes of one layer."""

    def __init__(self, schedule: str) -> None:
        self.layer = layer_of(schedule)
        self.x_TD = torch.randn(NUM_TOKENS, WIDTH).half().requires_grad_()

    def times_ms(self) -> tuple[float, float]:
        """Milliseconds of processor time of one pass each way."""
        self.clear()
        start_s = time.thread_time()
        y = self.layer(self.x_TD)[:2]
        middle_s = time.thread_time()
        grads = [torch.ones_like(each) for each in y]
        again_s = time.thread_time()
        torch.autograd.backward(y, grads)
        stop_s = time.thread_time()
        return 1e3 * (middle_s - start_s), 1e3 * (stop_s - again_s)

    def counted(self) -> dict[str, list[int]]:
        """Calls of functions, Python's and C's, and operations of torch, of one pass each way."""
        calls, operations = [], []
        for _ in range(2):
            self.clear()
            with Operations() as forward:
                y = self.layer(self.x_TD)[:2]
            with Operations() as backward:
                torch.autograd.backward(y, [torch.ones_like(each) for each in y])
            operations = [forward.number, backward.number - len(y)]
            self.clear()
            with Calls() as forward_calls:
                y = self.layer(self.x_TD)[:2]
            grads = [torch.ones_like(each) for each in y]
            with Calls() as backward_calls:
                torch.autograd.backward(y, grads)
            calls = [forward_calls.number, backward_calls.number]
        return {"calls": calls, "operations": operations}

    def clear(self) -> None:
        self.layer.zero_grad()
        self.x_TD.grad = None


class Calls:
    """Counts the calls of functions in its scope."""

    number = 0

    def __enter__(self) -> Calls:
        sys.setprofile(self._count)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _count(self, frame: object, event: str, argument: object) -> None:
        self.number += event in ("call", "c_call")


def side(schedules: list[str], num_passes: int) -> dict[str, dict[str, list[float]]]:
    """Of each schedule: quartiles of the times of forward and backward passes, and what is counted."""
    told: dict[str, dict[str, list[float]]] = {}
    with as_on_a_gpu():
        for schedule in schedules:
            passes = Passes(schedule)
            for _ in range(WARM_UPS):
                passes.times_ms()
            gc.collect()
            gc.freeze()
            forward, backward = zip(*[passes.times_ms() for _ in range(num_passes)], strict=True)
            gc.unfreeze()
            told[schedule] = {
                "forward": statistics.quantiles(forward, n=4),
                "backward": statistics.quantiles(backward, n=4),
                **passes.counted(),
            }
    return told


def main() -> None:
    """The side's figures, on one line."""
    torch.set_num_threads(1)
    dist.init_process_group("fake", rank=0, world_size=NODES * NODE_SIZE, store=FakeStore())
    print(json.dumps(side(sys.argv[2:], int(sys.argv[1]))))
    dist.destroy_process_group()


if __name__ == "__main__":
    # The tree that is measured stands on the path in front of the one that this file is part of.
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [each for each in sys.path if each != here]
    main()
