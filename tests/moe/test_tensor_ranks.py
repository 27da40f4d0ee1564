"""Ranks that share a layer's tokens: outputs, losses and gradients are those of a rank that is alone with them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.comm.transport import Loopback
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.errors import EngineError
from ds_moe_ep.moe.experts import GeluMLP
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.moe.tensor_parallel.ranks import TensorRanks
from tests.ranks import RankPool

WIDTH, BOUND = 16, 1e-12
CASES: dict[str, dict[str, Any]] = {
    "rsample": {"noise": "rsample"},
    "jitter, a capacity": {"noise": "jitter", "top_k": 2, "capacity_factor": 1.0},
    "a second expert that is drawn": {"top_k": 2, "sample_second": True},
    "places that are drawn": {"capacity_factor": 0.5, "drop_policy": "random", "min_capacity": 1},
    "four choices": {"top_k": 4, "z_loss_weight": 0.1, "score": "sigmoid"},
}


def layer_of(config: MoEConfig) -> ExpertParallel:
    torch.manual_seed(5)
    layer = ExpertParallel(WIDTH, GeluMLP(WIDTH, 8), config, GeluMLP(WIDTH, 8)).double()
    layer.connect(Loopback())
    return layer


def results(layer: ExpertParallel, x: Tensor, used: Tensor | None, seed: int) -> list[Tensor]:
    """Output, loss, counts and the gradients of the input, the gate, the shared expert and the experts."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    output, loss, counts = layer(x, used)
    (output.sin().sum() + loss).backward()
    dense = [p.grad for module in (layer.gate, layer.shared) for p in module.parameters()]  # type: ignore[union-attr]
    return [output, loss, counts.double(), x.grad, *dense, *(p.grad for p in layer.experts.parameters())]  # type: ignore[list-item]


def distances(knobs: dict[str, Any], draws_alike: bool) -> list[float]:
    """How far the shared tokens' results are from those of a layer alone, for 0 to 9 tokens."""
    config, ranks = MoEConfig(num_experts=4, **knobs), group_of_all()
    alone, shared = layer_of(config), layer_of(config)
    shared.share_tokens(ranks)
    found = []
    for num_tokens in (9, 1, 0, 8):
        x = torch.randn(num_tokens, WIDTH, generator=torch.Generator().manual_seed(num_tokens), dtype=torch.float64)
        used = torch.arange(num_tokens) % 3 != 1 if num_tokens == 9 else None
        off = nullcontext() if draws_alike else patch.object(TensorRanks, "drawing_alike", lambda *_: nullcontext())
        with off:
            mine = results(shared, x, used, seed=7 + 10 * ranks.rank)
        theirs = results(alone, x, used, seed=7)
        for gradient in mine[-len(list(alone.experts.parameters())) :]:
            dist.all_reduce(gradient)
        pairs = zip(mine, theirs, strict=True)
        found.append(max(float((a - b).abs().max()) if a.numel() else 0.0 for a, b in pairs))
    return found


def group_of_all(has_own_tokens: bool = False) -> TensorRanks:
    return TensorRanks(dist.group.WORLD, dist.get_rank(), dist.get_world_size(), has_own_tokens)


def distance_of_own_tokens(knobs: dict[str, Any]) -> float:
    """The same where each rank has a part of the tokens, one after another."""
    config, ranks = MoEConfig(num_experts=4, **knobs), group_of_all(has_own_tokens=True)
    alone, shared = layer_of(config), layer_of(config)
    shared.share_tokens(ranks)
    x = torch.randn(4 * ranks.size, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    used = torch.arange(len(x)) % 3 != 1
    part = slice(4 * ranks.rank, 4 * ranks.rank + 4)
    mine, theirs = results(shared, x[part], used[part], seed=7 + ranks.rank), results(alone, x, used, seed=7)
    for gradient in mine[-len(list(alone.experts.parameters())) :]:
        dist.all_reduce(gradient)
    theirs[0], theirs[3] = theirs[0][part], theirs[3][part]
    return max(float((a - b).abs().max()) for a, b in zip(mine, theirs, strict=True))


def refusal(tokens: Callable[[int], Tensor], has_own_tokens: bool = False) -> str:
    layer = layer_of(MoEConfig(num_experts=4))
    layer.share_tokens(group_of_all(has_own_tokens))
    try:
        layer(tokens(dist.get_rank()))
    except EngineError as error:
        return str(error)
    return "nothing"


def others(rank: int) -> Tensor:
    return torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def more(rank: int) -> Tensor:
    return torch.ones(6 + rank, WIDTH, dtype=torch.float64)


def copies() -> tuple[bool, int]:
    """True where a deep copy shares the group; the ranks of a pickled layer."""
    layer = layer_of(MoEConfig(num_experts=4))
    layer.share_tokens(group_of_all())
    return copy.deepcopy(layer).tensor_ranks.group is dist.group.WORLD, pickle.loads(
        pickle.dumps(layer)
    ).tensor_ranks.size


def everything() -> dict[str, Any]:
    found: dict[str, Any] = {name: distances(knobs, draws_alike=True) for name, knobs in CASES.items()}
    found["drawn apart"] = distances(CASES["rsample"], draws_alike=False)
    found["own tokens"] = [distance_of_own_tokens(knobs) for knobs in CASES.values()]
    found["other tokens"], found["more tokens"] = refusal(others), refusal(more)
    found["own tokens may differ"], found["more own tokens"] = refusal(others, True), refusal(more, True)
    found["copies"] = copies()
    return found


@pytest.fixture(scope="module")
def found(pool: RankPool) -> list[dict[str, Any]]:
    return pool.run(2, everything)


@pytest.mark.parametrize("name", CASES)
def test_shared_tokens_give_the_results_of_one_rank(found: list[dict[str, Any]], name: str) -> None:
    assert all(max(theirs[name]) < BOUND for theirs in found), [theirs[name] for theirs in found]


def test_tokens_that_come_cut_give_the_results_of_one_rank(found: list[dict[str, Any]]) -> None:
    assert all(max(theirs["own tokens"]) < BOUND for theirs in found), [theirs["own tokens"] for theirs in found]


def test_noise_that_is_drawn_apart_is_seen(found: list[dict[str, Any]]) -> None:
    assert max(found[0]["drawn apart"]) > 1e6 * BOUND


def test_ranks_with_other_tokens_are_told_on_every_rank(found: list[dict[str, Any]]) -> None:
    for theirs in found:
        assert "the ranks of a tensor-parallel group have different tokens" in theirs["other tokens"]
        assert "have [6, 7] tokens" in theirs["more tokens"] and "have [6, 7] tokens" in theirs["more own tokens"]
        assert theirs["own tokens may differ"] == "nothing"


def test_copies_share_the_group_and_pickles_forget_it(found: list[dict[str, Any]]) -> None:
    assert [theirs["copies"] for theirs in found] == [(True, 1)] * 2
