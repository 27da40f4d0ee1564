"""Workloads route as they say, from their name, the seed and the step alone, whatever draws beside them."""

from __future__ import annotations

import pytest
import torch

from ds_moe_ep.bench.candidates.cases import LayerCase, gate_weight, tokens_for
from ds_moe_ep.bench.candidates.workloads import BURSTS_EVERY, MOVES_EVERY, TITLES, Workload, rows_of

EXPERTS, RANKS, TOKENS = 16, 4, 320
CASE = LayerCase(name="workload", top_k=1, load="even", hidden_size=64, num_tokens=TOKENS)


def loads(name: str, step: int, top_k: int = 1, seed: int = 0) -> list[float]:
    """Rows of each expert over the mean, of all ranks."""
    workload = Workload(name, EXPERTS, RANKS, seed)
    rows_E = torch.zeros(EXPERTS, dtype=torch.int64)
    for rank in range(RANKS):
        ids_TK = workload.expert_ids(rank, step, workload.num_tokens(rank, TOKENS), top_k)
        assert top_k == 1 or bool((ids_TK.sort(1).values.diff(dim=1) > 0).all()), "a token visits an expert once"
        rows_E += torch.bincount(ids_TK.flatten(), minlength=EXPERTS)
    assert int(rows_E.sum()) == RANKS * TOKENS * top_k
    return [float(rows) * EXPERTS / (RANKS * TOKENS * top_k) for rows in rows_E]


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(
    ("name", "fullest", "idle"),
    [("W0", 1.0, 0), ("W1", 4.0, 0), ("W3", 4.73, 0), ("W4", 1.0, 0), ("W5", 4 / 3, 4), ("W6", 4.0, 0), ("W7", 1.0, 0)],
)
def test_loads_are_what_the_workload_is_called(name: str, fullest: float, idle: int, top_k: int) -> None:
    found = loads(name, 0, top_k)
    assert max(found) == pytest.approx(fullest, abs=0.06)
    assert sum(share == 0 for share in found) == idle


def test_a_hot_rank_has_four_times_the_mean_on_all_of_its_experts_together() -> None:
    found = loads("W2", 0)
    of_ranks = [sum(found[first : first + 4]) / 4 for first in range(0, EXPERTS, 4)]
    assert max(of_ranks) == pytest.approx(4.0, abs=0.06) and sorted(of_ranks)[-2] < 0.1


def test_ragged_sources_have_a_quarter_to_seven_quarters_of_the_mean_and_the_same_sum() -> None:
    ragged = Workload("W4", EXPERTS, RANKS)
    found = [ragged.num_tokens(rank, TOKENS) for rank in range(RANKS)]
    assert sum(found) == RANKS * TOKENS and sorted(found) == [80, 240, 400, 560]
    assert {Workload("W0", EXPERTS, RANKS).num_tokens(rank, TOKENS) for rank in range(RANKS)} == {TOKENS}


def test_the_hot_expert_moves_and_bursts_come_and_go() -> None:
    def hot(name: str, step: int) -> int:
        found = loads(name, step)
        return found.index(max(found))

    assert hot("W6", 0) == hot("W6", MOVES_EVERY - 1) != hot("W6", MOVES_EVERY)
    assert hot("W1", 0) == hot("W1", MOVES_EVERY)
    bursts = [max(loads("W7", step)) > 2 for step in range(2 * BURSTS_EVERY)]
    assert bursts == ([False] * (BURSTS_EVERY - 1) + [True]) * 2


@pytest.mark.parametrize("name", TITLES)
def test_the_same_name_seed_and_step_give_the_same_rows_and_others_do_not(name: str) -> None:
    workload = Workload(name, EXPERTS, RANKS, seed=3)
    ids_TK = workload.expert_ids(1, 5, TOKENS)
    torch.manual_seed(99)
    assert torch.equal(Workload(name, EXPERTS, RANKS, seed=3).expert_ids(1, 5, TOKENS), ids_TK)
    for other in (
        Workload(name, EXPERTS, RANKS, seed=4).expert_ids(1, 5, TOKENS),
        workload.expert_ids(1, 6, TOKENS),
        workload.expert_ids(2, 5, TOKENS),
    ):
        assert not torch.equal(other, ids_TK)


def test_tokens_lead_the_gate_to_the_experts_of_the_workload() -> None:
    ids_TK = Workload("W3", EXPERTS, RANKS).expert_ids(2, 7, TOKENS)
    logits_TE = tokens_for(CASE, 2, ids_TK) @ gate_weight(CASE).t()
    assert torch.equal(logits_TE.argmax(1, keepdim=True), ids_TK)


def test_rows_that_an_expert_cannot_take_go_to_the_others() -> None:
    assert rows_of([0.7, 0.2, 0.1], 20, most=10) == [10, 7, 3]  # each of 10 tokens visits it once
    assert rows_of([0.5, 0.25, 0.25], 10, most=10) == [5, 3, 2]
    with pytest.raises(AssertionError, match="too few experts"):
        rows_of([1.0, 0.0], 20, most=10)
