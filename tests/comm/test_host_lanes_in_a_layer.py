"""The layer on the lanes of the host, without processes: errors, graphs and modes across their threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from ds_moe_ep.comm.transport import Answer, Loopback, Message, Transfer
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.errors import EngineError
from ds_moe_ep.moe.experts import GeluMLP, KnownExperts
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.schedule.spans import NO_TAGS, Tags
from tests.comm.test_host_lanes import FakeTransfer


class FailingTransport(Loopback):
    """Rank 0 of 4, whose peers send halves; the transfer with the number `fails` never arrives."""

    rank, size, ranks = 0, 4, range(4)

    def __init__(self) -> None:
        self.fails, self.num_started = -1, 0
        self.requires_grad: set[bool] = set()

    def exchange_counts(self, counts_PC: torch.Tensor, tags: Tags = NO_TAGS) -> torch.Tensor:
        return counts_PC.clone()

    def consult(
        self, told_C: torch.Tensor, num_answered: int, answer: Answer, tags: Tags = NO_TAGS
    ) -> Callable[[], torch.Tensor]:
        return lambda: answer(told_C.repeat(self.size, 1))[0]

    def sum(self, values: torch.Tensor, tags: Tags = NO_TAGS) -> torch.Tensor:
        return values.clone()

    def start(self, lane: str, sends: Sequence[Message], receives: Sequence[Message], tags: Tags = NO_TAGS) -> Transfer:
        number, self.num_started = self.num_started, self.num_started + 1
        if lane == "combine":
            self.requires_grad |= {message.rows.requires_grad for message in (*sends, *receives)}
        transfer = FakeTransfer(EngineError(f"transfer {number} failed") if number == self.fails else None)
        transfer.may_end.set()
        with torch.no_grad():
            for message in receives:
                message.rows.fill_(0.5)
        return transfer


class HeldTransport(FailingTransport):
    """Its transfers, but for the first, end when an expert has computed."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[FakeTransfer] = []
        self.has_computed = False
        self.num_open_at_compute: list[int] = []

    def start(self, lane: str, sends: Sequence[Message], receives: Sequence[Message], tags: Tags = NO_TAGS) -> Transfer:
        super().start(lane, sends, receives, tags)
        transfer = FakeTransfer()
        self.started.append(transfer)
        if self.has_computed or len(self.started) == 1:
            transfer.may_end.set()
        return transfer

    def computes(self, *args: object) -> None:
        self.has_computed = True
        for transfer in self.started:
            transfer.may_end.set()
        self.num_open_at_compute.append(sum(transfer.num_waits == 0 for transfer in self.started))


def make_layer(transport: FailingTransport, depth: int = 1) -> ExpertParallel:
    config = MoEConfig(num_experts=8, ep_size=4, top_k=2, schedule="peers", row_cuts=4, depth=depth)
    layer = ExpertParallel(8, GeluMLP(8, 16), config)
    layer.connect(transport, Torus(2, 2))
    return layer


@pytest.mark.parametrize("fails", [0, 1, 4, 11])
def test_a_pass_raises_the_error_of_its_transfer_and_the_next_pass_runs(fails: int) -> None:
    torch.manual_seed(0)
    transport = FailingTransport()
    layer, x_TD = make_layer(transport), torch.randn(20, 8)
    expected_TD = layer(x_TD)[0]
    assert transport.num_started == 12
    transport.num_started, transport.fails = 0, fails
    with pytest.raises(EngineError, match=f"transfer {fails} failed"):
        layer(x_TD)
    transport.fails = -1
    assert torch.equal(layer(x_TD)[0], expected_TD)


def test_an_error_in_the_experts_drops_the_transfers_that_have_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    transport = FailingTransport()
    layer = make_layer(transport)

    def break_down(*args: object) -> None:
        raise ValueError("no")

    broken = type("Broken", (), {"compute": break_down, "saved": []})
    monkeypatch.setattr(KnownExperts, "start", lambda *args: broken())
    with pytest.raises(ValueError, match="no"):
        layer(torch.randn(20, 8))
    assert transport.num_started <= 2, "what was issued before the first compute"


@pytest.mark.parametrize("depth", [0, 1])
def test_experts_compute_while_rows_are_on_the_wire_and_at_depth_0_never(depth: int) -> None:
    transport = HeldTransport()
    transport.has_computed = depth == 0
    layer = make_layer(transport, depth)
    for expert in layer.experts.deepspeed_experts:
        expert.register_forward_pre_hook(transport.computes)
    layer(torch.randn(20, 8))  # where compute waits for a transfer that it does not need, this never ends
    assert len(transport.started) == 12
    assert depth or set(transport.num_open_at_compute) == {0}


def test_rows_on_the_wire_carry_no_graph() -> None:
    transport = FailingTransport()
    x_TD = torch.randn(20, 8, requires_grad=True)
    make_layer(transport)(x_TD)[0].sum().backward()
    assert transport.requires_grad == {False}
    assert x_TD.grad is not None


def test_a_layer_runs_in_inference_mode() -> None:
    torch.manual_seed(0)
    layer, x_TD = make_layer(FailingTransport()), torch.randn(20, 8)
    expected_TD = layer(x_TD)[0]
    with torch.inference_mode():
        assert torch.equal(layer(x_TD)[0], expected_TD)
