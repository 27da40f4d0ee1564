"""DeepSpeed's own MoE layer as its user would build it.

It imports deepspeed, as `autoep.py` does: DeepSpeed cannot be measured without it.
"""

from __future__ import annotations

import logging
from datetime import timedelta

import deepspeed
import deepspeed.comm
from deepspeed.moe.layer import MoE as NativeMoE
from torch import nn

from ds_moe_ep.bench.candidates.cases import LayerCase
from ds_moe_ep.engine import seams


def start_ranks(backend: str, timeout_s: float) -> None:
    """Joins this process to the world that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

    DeepSpeed's shared-memory operation is kept off, so that the backend carries the traffic of every candidate.
    """
    deepspeed.utils.logger.setLevel(logging.ERROR)
    seams.keep_shm_build_away()
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timedelta(seconds=timeout_s)
    )


def native_layer(case: LayerCase, ep_size: int, expert: nn.Module | None = None) -> nn.Module:
    """The native layer with its groups made, dropping no tokens. `expert` stands in for the case's own.

    Top-2's random second choice and random token selection are off: the first would route differently, and
    the second only costs time where nothing is dropped.
    """
    if expert is None:
        up, down = nn.Linear(case.hidden_size, case.width), nn.Linear(case.width, case.hidden_size)
        expert = nn.Sequential(up, nn.GELU(), down)
    layer = dropless(case.hidden_size, expert, case.num_experts, ep_size, case.top_k)
    layer.set_deepspeed_parallelism()  # type: ignore[operator]
    return layer


def dropless(hidden_size: int, expert: nn.Module, num_experts: int, ep_size: int, top_k: int) -> nn.Module:
    """DeepSpeed's MoE as it is compared: see `native_layer`; its groups are not made yet."""
    layer: nn.Module = NativeMoE(
        hidden_size,
        expert,
        num_experts=num_experts,
        ep_size=ep_size,
        k=top_k,
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    return layer
