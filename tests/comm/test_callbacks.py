"""Callbacks around messages: what they put on the wire arrives, what they see adds up, what they change shows."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_moe_ep.comm.callbacks import TransferCallback, TransferMessage, WithCallbacks, with_callbacks
from ds_moe_ep.comm.open import open_transport
from ds_moe_ep.comm.transport import Loopback, Message, Transport
from ds_moe_ep.config.knobs import MoEConfig
from tests.comm.disturbed import D, caught, make_layer
from tests.moe.faulty_transports import Counting
from tests.ranks import RankPool

SIZE = 3
KNOBS: dict[str, dict[str, Any]] = {
    "pairwise": {"transport": "pairwise", "schedule": "peers", "row_cuts": 2},
    "collective": {"transport": "collective", "schedule": "serial"},
}


class HalfTheBytes(TransferCallback):
    """bf16 on the wire."""

    def before_send(self, message: TransferMessage) -> Tensor:
        return message.rows.to(torch.bfloat16)

    def before_receive(self, message: TransferMessage) -> Tensor:
        return torch.empty_like(message.rows, dtype=torch.bfloat16)

    def after_receive(self, message: TransferMessage, wire: Tensor) -> None:
        message.rows.copy_(wire)


class Trace(TransferCallback):
    """Counts the rows of what passes, at each of its four places."""

    def __init__(self) -> None:
        self.rows: Counter[tuple[str, str, str, int]] = Counter()
        self.layers: set[str] = set()
        self._lock = threading.Lock()

    def _see(self, place: str, message: TransferMessage) -> None:
        with self._lock:
            self.rows[place, message.phase, message.lane, message.peer] += len(message.rows)
            self.layers.add(message.layer)

    def before_send(self, message: TransferMessage) -> None:
        self._see("before_send", message)

    def after_send(self, message: TransferMessage) -> None:
        self._see("after_send", message)

    def before_receive(self, message: TransferMessage) -> None:
        self._see("before_receive", message)

    def after_receive(self, message: TransferMessage, wire: Tensor) -> None:
        assert wire.data_ptr() == message.rows.data_ptr(), "the rows themselves were on the wire"
        self._see("after_receive", message)


class Spoil(TransferCallback):
    """Adds to one number of the first message that comes from rank 0."""

    def __init__(self) -> None:
        self._is_done = False

    def after_receive(self, message: TransferMessage, wire: Tensor) -> None:
        if message.peer == 0 and not self._is_done:
            self._is_done = True
            message.rows[0, 0] += 1.0


def passes(kind: str) -> dict[str, Any]:
    """Outputs and input gradients of one layer without callbacks and with some; the trace; bytes on the wire."""
    config = MoEConfig(num_experts=2 * SIZE, ep_size=SIZE, top_k=2, **KNOBS[kind])
    inner, trace, found = open_transport([list(range(SIZE))], config), Trace(), {}
    for name, callbacks in {
        "none": [],
        "trace": [trace],
        "bf16": [HalfTheBytes()],
        "traced bf16": [HalfTheBytes(), Trace()],
        "spoiled": [Spoil()],
    }.items():
        counting = Counting(inner)
        found[name] = one_pass(with_callbacks(counting, callbacks), config), counting.num_bytes
    return {"results": found, "rows": dict(trace.rows), "layers": trace.layers}


def one_pass(transport: Transport, config: MoEConfig) -> Tensor:
    torch.manual_seed(1)
    layer = make_layer(transport, config)
    torch.manual_seed(2 + transport.rank)
    x_TD = torch.randn(40, D, requires_grad=True)
    y_TD = layer(x_TD)[0]
    y_TD.square().sum().backward()
    assert x_TD.grad is not None
    return torch.cat([y_TD.detach(), x_TD.grad])


@pytest.fixture(scope="module", params=list(KNOBS))
def ranks(pool: RankPool, request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pool.run(SIZE, passes, request.param)
    return found


def test_a_trace_changes_nothing_and_sees_every_row_of_other_ranks_at_both_ends(ranks: list[dict[str, Any]]) -> None:
    for rank, seen in enumerate(ranks):
        assert torch.equal(seen["results"]["trace"][0], seen["results"]["none"][0])
        assert seen["layers"] == {"layers.2.moe"}
        assert {peer for *_, peer in seen["rows"]} == set(range(SIZE)) - {rank}
        assert {(phase, lane) for _, phase, lane, _ in seen["rows"]} == {
            (phase, lane) for phase in ("forward", "backward") for lane in ("dispatch", "combine")
        }
        for (place, phase, lane, peer), rows in seen["rows"].items():
            there = {"before_send": "after_receive", "after_send": "before_receive"}
            other = there.get(place) or {there: here for here, there in there.items()}[place]
            assert ranks[peer]["rows"][other, phase, lane, rank] == rows > 0


def test_bf16_on_the_wire_halves_the_bytes_and_keeps_the_results_up_to_its_rounding(
    ranks: list[dict[str, Any]],
) -> None:
    for seen in ranks:
        (exact, num_bytes), (rounded, num_fewer) = seen["results"]["none"], seen["results"]["bf16"]
        assert num_fewer == num_bytes / 2 > 0
        assert not torch.equal(rounded, exact), "nothing was rounded: did the callbacks run?"
        scale = exact.abs().max().item()
        assert (rounded - exact).abs().max().item() < 0.03 * scale, "bf16 keeps 8 bits, at four passages of the wire"


def test_callbacks_run_one_behind_the_other(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert torch.equal(seen["results"]["traced bf16"][0], seen["results"]["bf16"][0])


def test_one_changed_number_changes_the_results(ranks: list[dict[str, Any]]) -> None:
    """The control: equality above is not for want of looking."""
    changed = [not torch.equal(seen["results"]["spoiled"][0], seen["results"]["none"][0]) for seen in ranks]
    assert any(changed)


class Breaks(TransferCallback):
    def before_send(self, message: TransferMessage) -> Tensor:
        raise ValueError(f"cannot compress for {message.peer}")


def broken(kind: str) -> str:
    config = MoEConfig(num_experts=2 * SIZE, ep_size=SIZE, top_k=2, timeout_s=20, **KNOBS[kind])
    transport = open_transport([list(range(SIZE))], config)
    callbacks = [Breaks()] if transport.rank == 1 else [Trace()]
    return caught(one_pass, with_callbacks(transport, callbacks), config)


@pytest.mark.parametrize("kind", list(KNOBS))
def test_an_exception_in_a_callback_is_one_of_the_pass_on_every_rank(pool: RankPool, kind: str) -> None:
    for rank, error in enumerate(pool.run(SIZE, broken, kind)):
        assert ("ValueError: cannot compress for " in error) and (error.startswith("PeerError") or rank == 1), error


def test_a_group_of_one_rank_and_no_callbacks_leave_the_transport_as_it_is() -> None:
    alone = Loopback()
    assert with_callbacks(alone, [Trace()]) is alone
    assert with_callbacks(alone, []) is alone


def test_a_buffer_that_is_not_contiguous_is_refused_by_name() -> None:
    class Strided(TransferCallback):
        def before_receive(self, message: TransferMessage) -> Tensor:
            return torch.empty(2, 4).t()

    class Two(Loopback):
        size, ranks = 2, (0, 1)

    transport = WithCallbacks(Two(), [Strided()])
    error = caught(transport.start, "dispatch", [], [Message(1, torch.zeros(4, 2), 0, 4)])
    assert error.startswith("ConfigError: Strided.before_receive=(4, 2): the buffer must be contiguous; ")
