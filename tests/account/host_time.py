"""Prints the host time of a pass of the reference job's layer: python -m tests.account.host_time [passes]

The rank's own code runs as on a GPU, on tensors so small that their kernels take nothing: what is left is what the host
does to issue the pass. 16 experts on 4 nodes of 4, one per rank, fp16. Messages go to torch's process group without
peers, counts arrive as even routing gives them. Operations are plain torch, each a call where Triton would have one for
several; lanes are not CUDA's, whose 12 events and 12 waits per pass come on top. Processor time of the calling thread.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from ds_moe_ep.comm.lane_groups import LaneGroups
from ds_moe_ep.comm.lanes import Inline
from ds_moe_ep.comm.pairwise import Pairwise
from ds_moe_ep.comm.transport import CONTROL, LANES
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.health.abort import AbortGuard
from ds_moe_ep.health.watch import Unwatched
from ds_moe_ep.kernels import activation, gate, sort
from ds_moe_ep.kernels import permute as permute_ops
from ds_moe_ep.moe import agreement, executor, router
from ds_moe_ep.moe.experts import GeluMLP
from ds_moe_ep.moe.layer import ExpertParallel
from tests.account.layer import Sizes, _all_alike, _EvenCounts

SIZES = Sizes(num_tokens=160, width=8, expert_width=16)
WARM_UPS = 10
PASSES = 400


def host_ms(schedule: str, passes: int = PASSES) -> tuple[list[float], list[float]]:
    """Quartiles of the milliseconds of forward and of backward passes."""
    with _as_on_a_gpu():
        layer = _layer(schedule)
        x_TD = torch.randn(SIZES.num_tokens, SIZES.width).to(SIZES.dtype).requires_grad_()
        forward, backward = list[float](), list[float]()
        for index in range(WARM_UPS + passes):
            layer.zero_grad()
            x_TD.grad = None
            if index == WARM_UPS:
                gc.collect()
                gc.freeze()
            start_s = time.thread_time()
            y_TD, loss, _ = layer(x_TD)
            middle_s = time.thread_time()
            grads = [torch.ones_like(y_TD), torch.ones_like(loss)]
            again_s = time.thread_time()
            torch.autograd.backward([y_TD, loss], grads)
            stop_s = time.thread_time()
            if index >= WARM_UPS:
                forward.append(1e3 * (middle_s - start_s))
                backward.append(1e3 * (stop_s - again_s))
        gc.unfreeze()
    return statistics.quantiles(forward, n=4), statistics.quantiles(backward, n=4)


def _layer(schedule: str) -> ExpertParallel:
    ranks = tuple(range(SIZES.torus.size))
    groups = {name: dist.new_group(list(ranks), backend="fake") for name in (*LANES, CONTROL)}
    lanes = LaneGroups(0, ranks, groups, AbortGuard(0, ranks, groups.values()), Unwatched())
    config = MoEConfig(
        num_experts=len(ranks), ep_size=len(ranks), schedule=schedule, aux_loss_weight=0.02, z_loss_weight=0.001
    )
    layer = ExpertParallel(SIZES.width, GeluMLP(SIZES.width, SIZES.expert_width), config).to(SIZES.dtype)
    layer.connect(Pairwise(lanes, 600.0), SIZES.torus)
    layer.dispatcher._lanes, layer.dispatcher._device = Inline(), torch.device("cpu")
    even_T1 = (torch.arange(SIZES.num_tokens) % len(ranks)).view(-1, 1)
    layer.gate._choose = lambda *logits: even_T1  # type: ignore[method-assign]
    return layer


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """The branches that tensors on CUDA take, without Triton."""
    changes = [
        (torch.Tensor, "is_cuda", property(lambda tensor: True)),
        (torch.Tensor, "is_cpu", property(lambda tensor: False)),
        (agreement, "is_on_host", lambda device: False),
        (agreement, "CopyToHost", _EvenCounts.of(SIZES)),
        (agreement.Agreement, "_check", _all_alike),
        (executor, "moves_by_index", lambda device: True),
        *((module, "runs_triton", lambda *args: False) for module in (permute_ops, activation, gate, sort, router)),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def main() -> None:
    """The host time of each schedule."""
    torch.set_num_threads(1)
    passes = int(sys.argv[1]) if len(sys.argv) > 1 else PASSES
    dist.init_process_group("fake", rank=0, world_size=SIZES.torus.size, store=FakeStore())
    for schedule in ("serial", "peers", "chunks"):
        for name, (low, median, high) in zip(("forward", "backward"), host_ms(schedule, passes), strict=True):
            print(f"{schedule:8} {name:8} {median:6.2f} ms ({low:.2f}-{high:.2f})")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
