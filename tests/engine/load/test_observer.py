"""What an observer keeps of a pass, and what it makes of passes whose columns are no experts' choices."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from ds_moe_ep.engine.load.observer import MAX_PASSES, LoadObserver
from ds_moe_ep.engine.load.report import own_guests
from ds_moe_ep.moe.dispatch_plan import Counts, DispatchPlan
from ds_moe_ep.moe.routes import Routes


def layer(**parts: Any) -> Any:
    return SimpleNamespace(config=SimpleNamespace(num_experts=4, num_local_experts=2), **parts)


def routes(num_tokens: int, capacity: int | None = None) -> Routes:
    ids_TK = torch.zeros(num_tokens, 1, dtype=torch.int64)
    return Routes(expert_ids_TK=ids_TK, weights_TK=torch.ones(num_tokens, 1), capacity=capacity)


def plan(send_rows_PL: Counts, recv_rows_PL: Counts) -> DispatchPlan:
    return DispatchPlan(None, send_rows_PL, recv_rows_PL)  # type: ignore[arg-type]


def test_an_observer_keeps_the_counts_that_the_host_has_and_forgets_them_when_they_are_taken() -> None:
    observer = LoadObserver(layer())
    sent: Counts = ((1, 2), (3, 4))
    observer(routes(10), plan(sent, ((5, 0), (0, 7))))
    observer.is_paused = True
    observer(routes(10), plan(sent, sent))
    assert observer._passes[0].send_rows_PL is sent, "no copy, and nothing computed"
    own = observer.take(torch.device("cpu"))
    assert own.rows_E.tolist() == [1, 2, 3, 4] and own.received == (12,) and own.num_tokens == 10
    empty = observer.take(torch.device("cpu"))
    assert empty.rows_E.tolist() == [0, 0, 0, 0] and empty.received == () and empty.num_tokens == 0


def test_a_plan_with_columns_for_replicas_is_not_read_as_choices_of_experts() -> None:
    observer = LoadObserver(layer(last_counts_E=torch.tensor([6, 1, 2, 3])))
    observer(routes(12), plan(((3, 1, 3), (2, 3, 0)), ((1, 1, 1), (1, 1, 1))))
    own = observer.take(torch.device("cpu"))
    assert own.rows_E.tolist() == [6, 1, 2, 3] and own.received == (6,) and own.dropped_E.sum() == 0


def test_only_the_last_passes_are_kept_and_all_tokens_are_counted() -> None:
    observer = LoadObserver(layer())
    for _ in range(MAX_PASSES + 5):
        observer(routes(3), plan(((1, 1), (1, 0)), ((2, 0), (0, 0))))
    own = observer.take(torch.device("cpu"))
    assert len(own.received) == MAX_PASSES and own.rows_E.tolist() == [MAX_PASSES] * 3 + [0]
    assert own.num_tokens == 3 * (MAX_PASSES + 5)


def test_guests_are_read_from_a_layer_that_has_slots() -> None:
    placement = SimpleNamespace(guests_RS=((3, None), (None, 0)))
    for rank, expected in ((0, (3, -1, -1, -1)), (1, (-1, 0, -1, -1))):
        replicas = SimpleNamespace(placement=placement, link=SimpleNamespace(rank=rank), num_slots=4)
        assert own_guests(layer(dispatcher=SimpleNamespace(replicas=replicas))) == expected
    for dispatcher in (SimpleNamespace(), SimpleNamespace(replicas=None)):
        assert own_guests(layer(dispatcher=dispatcher)) == ()
