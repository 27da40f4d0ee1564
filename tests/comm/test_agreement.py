"""Before rows move, ranks agree on where they are: another layer, call, schedule or row is an error on every rank."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from ds_moe_ep.comm.open import open_transport
from ds_moe_ep.comm.transport import Loopback, Message, Transport
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.moe.agreement import NUM_COLUMNS, NUM_HEAD, NUM_TOLD, Agreement, Call, Mode, num_columns
from ds_moe_ep.moe.dispatch_plan import make_plan
from ds_moe_ep.moe.routes import Routes
from ds_moe_ep.schedule.spans import Tags
from tests.comm.disturbed import caught, make_layer, run_pass
from tests.ranks import RankPool

FINE: dict[str, Any] = {
    "num_experts": 4,
    "row": (8, torch.float32),
    "call": Call("layers.1.moe", 3, "serial"),
    "capacity": None,
}
HERE = r"rank 0 in the training pass of call 3 of layers\.1\.moe; rank 1 in the "
ODD: list[tuple[dict[str, Any], str]] = [  # what rank 1 has, and what both ranks say
    ({"call": Call("layers.2.moe", 3, "serial")}, HERE + r"training pass of call 3 of layers\.2\.moe:"),
    (
        {"call": Call("layers.2.moe", 3, "serial"), "num_experts": 200},
        HERE + r"training pass of call 3 of layers\.2\.moe",
    ),
    ({"call": Call("layers.1.moe", 4, "serial")}, HERE + r"training pass of call 4 of layers\.1\.moe:"),
    ({"call": Call("layers.1.moe", 3, "serial", Mode.EVALUATION)}, HERE + "evaluation pass of call 3"),
    (
        {"call": Call("layers.1.moe", 3, "serial", Mode.EVALUATION_WITH_GRADIENT)},
        HERE + "evaluation pass with gradient",
    ),
    ({"call": Call("layers.1.moe", 3, "serial", Mode.TRAINING_WITHOUT_GRADIENT)}, HERE + "training pass without grad"),
    (
        {"call": Call("layers.1.moe", 3, "serial", history=7)},
        r"history=0000000[07] \(backward passes before\) on rank \d",
    ),
    ({"call": Call("layers.1.moe", 3, "peers")}, r"schedule=\w{8} on rank \d, schedule=\w{8} on rank \d"),
    ({"row": (8, torch.bfloat16)}, r"dtype=torch\.\w+ on rank \d, dtype=torch\.\w+ on rank"),
    ({"capacity": 5}, r"capacity=(none on rank 0, capacity=5|5 on rank 1, capacity=none) on rank \d"),
    ({"row": (16, torch.float32), "num_experts": 8}, r"width=\d+, num_experts=\d on rank \d, width"),
]


def plan(
    transport: Transport, num_experts: int, row: tuple[int, torch.dtype], call: Call, capacity: int | None
) -> list[int]:
    """The rows that a rank sends to each where all its tokens choose the first expert."""
    ids_TK = torch.zeros(5, 1, dtype=torch.int64)
    places = {"is_kept_TK": torch.ones_like(ids_TK, dtype=torch.bool), "place_TK": torch.arange(5).view(5, 1)}
    routes = Routes(expert_ids_TK=ids_TK, weights_TK=torch.ones(5, 1), capacity=capacity, **places)
    return [sum(rows) for rows in make_plan(routes, num_experts, transport, row, call=call).send_rows_PL]


def disagree() -> list[tuple[str, list[int]]]:
    """Each odd case on rank 1, and behind it a plan on which all agree."""
    transport = open_transport([[0, 1]], MoEConfig(num_experts=4, ep_size=2, timeout_s=20))
    seen = []
    for odd, _ in ODD:
        error = caught(plan, transport, *(FINE | (odd if transport.rank else {})).values())
        seen.append((error, plan(transport, *FINE.values())))
    return seen


def test_ranks_that_disagree_all_raise_and_may_go_on(pool: RankPool) -> None:
    for seen in pool.run(2, disagree, timeout_s=40):
        for (error, sent), (_, pattern) in zip(seen, ODD, strict=True):
            assert error.startswith("EngineError: layers."), error
            assert re.search(pattern, error), error
            assert sent == [5, 0]


def told_and_answered() -> list[list[list[int]]]:
    """The answers to two consultations of three ranks: each tells its rank, and the first adds the sum of all."""
    transport = open_transport([[0, 1, 2]], MoEConfig(num_experts=3, ep_size=3, timeout_s=20))

    def answer(told_PC: torch.Tensor) -> torch.Tensor:
        assert transport.rank == 0, "the first rank answers"
        return torch.cat([told_PC, told_PC.sum(0, keepdim=True).expand(3, -1)], 1)

    waits = [transport.consult(torch.tensor([transport.rank, number]), 4, answer) for number in range(2)]
    return [wait().tolist() for wait in waits]


def test_the_first_rank_answers_each_rank_from_what_all_of_them_told(pool: RankPool) -> None:
    for rank, answered in enumerate(pool.run(3, told_and_answered, timeout_s=40)):
        assert answered == [[rank, number, 0 + 1 + 2, 3 * number] for number in range(2)]


def counts_of(num_local: int) -> tuple[list[int], list[int], list[list[int]]]:
    """The rows that this rank receives for each of its experts, where rank r sends 10 r + e rows to its e-th expert.

    Beside them the totals of all experts, where they are told, and as many columns that all tell all others.
    """
    transport = open_transport([[0, 1]], MoEConfig(num_experts=4, ep_size=2, timeout_s=20))
    send_PL = (10 * transport.rank + torch.arange(num_local)).repeat(2, 1) * torch.tensor([[1], [2]])
    agreement = Agreement(transport, Call("layer"), 2 * num_local, (8, torch.float32))
    agreed = agreement.on_counts(send_PL)
    told = agreement.begin_telling(send_PL.flatten() << transport.rank * 40, 0)().recv_PL
    assert agreement.tell(send_PL.flatten() << transport.rank * 40) == told
    return [rows for rows_L in agreed.recv_PL for rows in rows_L], list(agreed.total_E), told


@pytest.mark.parametrize("num_local", [1, NUM_TOLD, NUM_TOLD + 1, 3 * NUM_COLUMNS])
def test_counts_come_to_their_ranks_whether_the_first_rank_hands_them_out_or_not(
    pool: RankPool, num_local: int
) -> None:
    """More local experts than fit into an answer have their counts in a second exchange."""
    sent_RE = [[times * (10 * source + e) for times in (1, 2) for e in range(num_local)] for source in range(2)]
    totals = [a + b for a, b in zip(*sent_RE, strict=True)] if num_local <= NUM_TOLD else []
    for rank, (received, total_E, told) in enumerate(pool.run(2, counts_of, num_local, timeout_s=40)):
        assert received == [(rank + 1) * (10 * source + e) for source in range(2) for e in range(num_local)]
        assert total_E == totals
        assert told == [[rows << source * 40 for rows in rows_E] for source, rows_E in enumerate(sent_RE)]


def test_a_rank_alone_agrees_with_itself() -> None:
    assert plan(Loopback(), *FINE.values()) == [5]


def test_an_exchange_has_whole_messages_for_the_head_and_any_number_of_counts() -> None:
    for num_experts in range(1, 3 * NUM_COLUMNS):
        spare = num_columns(num_experts) - NUM_HEAD - num_experts
        assert 0 <= spare < NUM_COLUMNS and num_columns(num_experts) % NUM_COLUMNS == 0, num_experts


def refuse() -> list[str]:
    """Rank 1 refuses an input; then all run a pass."""
    config = MoEConfig(num_experts=4, ep_size=2, timeout_s=20)
    transport = open_transport([[0, 1]], config)
    layer = make_layer(transport, config)
    first = caught(layer, torch.ones(20, 5)) if transport.rank == 1 else caught(run_pass, layer)
    return [first, caught(run_pass, layer)]


def test_a_refused_input_leaves_the_lanes_usable(pool: RankPool) -> None:
    first, second = pool.run(2, refuse, timeout_s=40)
    assert "rank 1 refused its input" in first[0] and second[0].startswith("ConfigError: input.shape=(20, 5)")
    assert first[1] == second[1] == ""


def be_late(kind: str, attempt: int) -> dict[str, str]:
    """Errors of rank 0 of two where rank 1 never comes: in a transfer, and in the exchange of counts."""
    config = MoEConfig(num_experts=4, ep_size=2, timeout_s=1.0, transport=kind)
    errors, store = {}, dist.PrefixStore(f"late {kind} {attempt}", _get_default_store())
    for op in ("transfer", "counts"):
        transport, rows_RD = open_transport([[0, 1]], config), torch.zeros(8, 3)
        tags = Tags("layers.7.moe", "backward", "far")
        if transport.rank == 1:
            wait_somewhere(store, op)
            continue
        store.wait([f"{op} waits"])
        if op == "counts":
            errors[op] = caught(transport.exchange_counts, torch.zeros(2, 4), tags)
        else:
            sends = [Message(0, rows_RD, 0, 1), Message(1, rows_RD, 1, 3)]
            receives = [Message(0, rows_RD, 4, 5), Message(1, rows_RD, 5, 8)]
            errors[op] = caught(lambda: transport.start("combine", sends, receives, tags).wait())  # noqa: B023
        store.set(f"{op} is over", "")
    dist.barrier()
    return errors


def wait_somewhere(store: dist.Store, op: str) -> None:
    """Waits until the other rank, which waits until this one is here, has given up."""
    store.set(f"{op} waits", "")
    while not store.check([f"{op} is over"]):
        time.sleep(0.02)


def check_late(pool: RankPool, kind: str, op: str, peer: str) -> None:
    for attempt in range(5):  # a busy machine may let the last sign of rank 1 be from before it was there
        errors = pool.run(2, be_late, kind, attempt, timeout_s=60)[0]
        if all("rank 1 is in wait_somewhere" in error for error in errors.values()):
            break
    assert errors["transfer"].startswith(
        f"PeerError: layers.7.moe: backward {op}: {peer} did not answer rank 0 within 1 s "
        "(36 bytes expected, 24 bytes to send); rank 1 is in wait_somewhere (test_agreement.py:"
    ), errors
    assert errors["transfer"].endswith("moe_ep.timeout_s=1 sets the limit")
    assert errors["counts"].startswith(
        "PeerError: layers.7.moe: backward exchange of counts: rank 1 did not answer rank 0 within 1 s"
    ), errors


def test_a_late_peer_is_named_with_layer_pass_bytes_and_whereabouts_over_messages(pool: RankPool) -> None:
    check_late(pool, "pairwise", "combine", "rank 1")


def test_a_late_peer_is_named_with_layer_pass_bytes_and_whereabouts_over_all_to_all(pool: RankPool) -> None:
    check_late(pool, "collective", "combine", "rank 1")
