"""AutoEP's layers folded over AutoTP's tensor ranks, hooked: they train as on half of the ranks without them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.engine.hooks.autoep_models import AutoEPJob, batches, make_engine, named_weights
from tests.engine.layouts.tensor_runs import forget_groups
from tests.engine.small_model import distance
from tests.ranks import run_ranks

WEIGHTS, LOSS = 1e-5, 2e-6  # fp32 after 3 Adam steps
TENSOR_SIZE = 2
ATTENTION = {
    "use_default_specs": False,
    "layer_specs": [
        {"patterns": [r".*self_attn\.[qkv]_proj\.weight$"], "partition_type": "column"},
        {"patterns": [r".*self_attn\.o_proj\.weight$"], "partition_type": "row"},
    ],
}
Outcome = tuple[list[float], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class FoldedJob(AutoEPJob):
    """A job of two data-parallel ranks, on as many tensor ranks each."""

    world_size: int = 2  # whose batches are drawn
    tensor_size: int = TENSOR_SIZE
    steps: int = 2
    hooked: bool = True
    without_cut: bool = False  # planted: each tensor rank sends all tokens

    @property
    def ds_config(self) -> dict[str, Any]:
        cut = {"tensor_parallel": {"autotp_size": self.tensor_size, "partition_config": ATTENTION}}
        return super().ds_config | (cut if self.tensor_size > 1 else {})


def train(job: FoldedJob) -> Outcome:
    """Losses and last weights of this rank."""
    import ds_moe_ep
    from ds_moe_ep.moe.tensor_parallel.ranks import TensorRanks

    engine, copy = make_engine(job), dist.get_rank() // job.tensor_size
    handle = ds_moe_ep.attach_overlap(engine, {"schedule": "peers"}) if job.hooked else nullcontext()
    whole = TensorRanks.cut, TensorRanks.gather
    if job.without_cut:
        TensorRanks.cut = lambda ranks, tokens, routes: (tokens, routes)  # type: ignore[method-assign]
        TensorRanks.gather = lambda ranks, results, number: results  # type: ignore[method-assign]
    losses = []
    with handle:
        for micro_batches in batches(job):
            for ids in micro_batches:
                loss = engine(input_ids=ids[copy], labels=ids[copy]).loss
                engine.backward(loss)
                engine.step()
            total = loss.detach().clone()
            dist.all_reduce(total)
            losses.append(float(total) / dist.get_world_size())
        weights = named_weights(engine, job)
    TensorRanks.cut, TensorRanks.gather = whole  # type: ignore[method-assign]
    forget_groups()
    return losses, weights


def train_all(jobs: Sequence[FoldedJob]) -> list[Outcome]:
    return [train(job) for job in jobs]


def whole_weights(by_rank: Sequence[Outcome], names: Sequence[str]) -> dict[str, Tensor]:
    """Weights that no tensor rank has a part of; those that several ranks have must be equal."""
    found: dict[str, Tensor] = {}
    for _, weights in by_rank:
        for name in (name for name in names if name in weights):
            torch.testing.assert_close(weights[name], found.setdefault(name, weights[name]), rtol=0, atol=1e-7)
    return found


JOBS = (FoldedJob(ep_size=2), FoldedJob(ep_size=4, stage=1), FoldedJob(ep_size=2, stage=2, clipping=0.1))
PLAIN = (FoldedJob(ep_size=2, hooked=False), FoldedJob(ep_size=2, without_cut=True, clipping=0.1))
ALONE = (FoldedJob(ep_size=2, tensor_size=1, hooked=False), FoldedJob(ep_size=2, tensor_size=1, stage=2, clipping=0.1))


@pytest.mark.slow
def test_folded_layers_train_as_those_without_tensor_ranks() -> None:
    folded = list(zip(*run_ranks(4, train_all, [*JOBS, *PLAIN], timeout_s=200), strict=True))
    alone, clipped = zip(*run_ranks(2, train_all, ALONE, timeout_s=100), strict=True)
    names = [name for _, weights in alone for name in weights if "experts" in name or ".gate." in name]
    expected = [alone, alone, clipped, alone, clipped]
    for index, (by_rank, theirs) in enumerate(zip(folded, expected, strict=True)):
        mine, plain = whole_weights(by_rank, names), whole_weights(theirs, names)
        is_right = distance(mine, plain) <= WEIGHTS and by_rank[0][0] == pytest.approx(theirs[0][0], rel=LOSS)
        assert is_right == (index < 4), (index, distance(mine, plain), by_rank[0][0], theirs[0][0])
