"""Ranks in different passes: each is told at once where all of them are, and the process that tells lives on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.comm.lane_groups import open_lanes
from ds_moe_ep.comm.open import open_transport, transport_over
from ds_moe_ep.comm.transport import Transport
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.moe import agreement
from ds_moe_ep.moe.agreement import AgreedCounts
from ds_moe_ep.moe.experts import GeluMLP
from ds_moe_ep.moe.layer import ExpertParallel
from tests.comm.disturbed import caught
from tests.load_clock import Stopwatch, Took, without_load
from tests.ranks import RankPool

D, SIZE = 8, 3
ODD = 1  # the rank that does something else


class Two:
    """Two layers on one group's lanes, and their tokens; all tokens of a rank may go to any expert."""

    def __init__(self, lanes: Transport, schedule: str = "serial", capacity: float | None = None) -> None:
        config = MoEConfig(num_experts=6, ep_size=SIZE, top_k=2, schedule=schedule, capacity_factor=capacity)
        torch.manual_seed(dist.get_rank())
        self.layers = [ExpertParallel(D, GeluMLP(D, 16), config) for _ in range(2)]
        for index, layer in enumerate(self.layers):
            layer.dispatcher.rename(f"layers.{index}")
            layer.connect(lanes, Torus(1, SIZE))

    def __call__(self, index: int) -> Tensor:
        return self.layers[index](torch.randn(20, D, requires_grad=True))[0].sum()


def step(two: Two) -> None:
    (two(0) + two(1)).backward()


def skips_the_last(two: Two, is_odd: bool) -> None:
    (two(0) if is_odd else two(0) + two(1)).backward()


def skips_the_first(two: Two, is_odd: bool) -> None:
    (two(1) if is_odd else two(0) + two(1)).backward()


def skips_a_loss(two: Two, is_odd: bool) -> None:
    loss = two(0)
    if not is_odd:
        loss.backward()
    step(two)


def leaves_a_layer_out_of_its_loss(two: Two, is_odd: bool) -> None:
    first, second = two(0), two(1)
    (first if is_odd else first + second).backward()


def turns_the_layers_round(two: Two, is_odd: bool) -> None:
    losses = [two(0), two(1)]
    for loss in losses[::-1] if is_odd else losses:
        loss.backward()


def turns_two_calls_round(two: Two, is_odd: bool) -> None:
    losses = [two(0), two(0)]
    for loss in losses[::-1] if is_odd else losses:
        loss.backward()


def goes_backward_twice(two: Two, is_odd: bool) -> None:
    loss = two(0)
    loss.backward(retain_graph=True)
    if is_odd:
        loss.backward()
    step(two)


def evaluates(two: Two, is_odd: bool) -> None:
    two.layers[0].train(not is_odd)
    two(0)


def forgets_gradients(two: Two, is_odd: bool) -> None:
    with torch.set_grad_enabled(not is_odd):
        two(0)


CASES: list[tuple[Callable[[Two, bool], None], str, str]] = [  # where the odd rank is, and the others
    (skips_the_last, "the backward pass of call 1 of layers.0", "the training pass of call 1 of layers.1"),
    (skips_the_first, "the training pass of call 1 of layers.1", "the training pass of call 1 of layers.0"),
    (skips_a_loss, "the training pass of call 2 of layers.0", "the backward pass of call 1 of layers.0"),
    (
        leaves_a_layer_out_of_its_loss,
        "the backward pass of call 1 of layers.0",
        "the backward pass of call 1 of layers.1",
    ),
    (turns_the_layers_round, "the backward pass of call 1 of layers.1", "the backward pass of call 1 of layers.0"),
    (turns_two_calls_round, "the backward pass of call 2 of layers.0", "the backward pass of call 1 of layers.0"),
    (goes_backward_twice, "the backward pass of call 1 of layers.0", "the training pass of call 2 of layers.0"),
    (evaluates, "the evaluation pass with gradient of call 1 of layers.0", "the training pass of call 1 of layers.0"),
    (forgets_gradients, "the training pass without gradient of call 1", "the training pass of call 1 of layers.0"),
]


WAYS = [
    ("collective", "serial", None),
    ("collective", "peers", 2.0),
    ("pairwise", "peers", None),
    ("auto", "serial", 2.0),
]


def all_cases(odd: int) -> list[str]:
    """Each rank's error of each case over each exchange, with and without a capacity; lanes stay in use between."""
    is_odd, lanes = dist.get_rank() == odd, open_lanes([list(range(SIZE))], 20.0)
    errors = []
    for kind, schedule, capacity in WAYS:
        transport = transport_over(lanes, MoEConfig(num_experts=6, ep_size=SIZE, transport=kind, timeout_s=20.0))
        for case, _, _ in CASES:
            two = Two(transport, schedule, capacity)
            step(two)
            errors.append(caught(case, two, is_odd))
    return errors


def test_ranks_in_different_passes_are_told_at_once_where_all_of_them_are(pool: RankPool) -> None:
    by_rank = pool.run(SIZE, all_cases, ODD, timeout_s=120)
    for number, errors in enumerate(zip(*by_rank, strict=True)):
        _, odd, others = CASES[number % len(CASES)]
        for error in errors:
            assert re.match(r"EngineError: layers\.\d: ranks are in different passes: ", error), (number, error)
            assert re.search(rf"ranks 0, 2 in {others}", error) and f"rank {ODD} in {odd}" in error, (number, error)


def test_ranks_that_all_do_the_same_are_told_nothing(pool: RankPool) -> None:
    """The control of the test above: nobody is odd."""
    assert pool.run(SIZE, all_cases, -1, timeout_s=120) == [[""] * (len(WAYS) * len(CASES))] * SIZE


def wait_in_a_barrier() -> tuple[str, Took]:
    dist.barrier()
    return "", Took(0.0, 0.0)


def meets_nobody() -> list[tuple[str, Took]]:
    """The odd rank waits in a barrier of the program's own, while the others are in a pass."""
    config, seen = MoEConfig(num_experts=6, ep_size=SIZE, timeout_s=1.0), []
    for is_backward in (False, True):
        two = Two(open_transport([list(range(SIZE))], config))
        loss, watch = two(0), Stopwatch()
        if dist.get_rank() == ODD:
            seen.append(wait_in_a_barrier())
        else:
            error = caught(loss.backward if is_backward else two, *(() if is_backward else (1,)))
            seen.append((error, watch.read()))
            dist.barrier()
    return seen


def test_a_rank_that_waits_elsewhere_is_named_with_its_call_within_the_limit(pool: RankPool) -> None:
    by_rank = pool.run(SIZE, meets_nobody, timeout_s=60)
    for rank in (0, 2):
        for (error, took), where in zip(by_rank[rank], ("layers.1: forward", "layers.0: backward"), strict=True):
            assert error.startswith(f"PeerError: {where} exchange of counts: "), error
            assert f"rank {ODD} is in barrier, called from wait_in_a_barrier (test_out_of_step.py:" in error, error
            assert without_load([took]) < 8


class Frozen(torch.nn.Module):
    """Two layers in a row of which some experts train, and perhaps a gate."""

    def __init__(self, trained: list[set[int]], expert: torch.nn.Module, ep_size: int) -> None:
        super().__init__()
        config = MoEConfig(num_experts=4, ep_size=ep_size, top_k=2, schedule="peers")
        self.layers = torch.nn.ModuleList(ExpertParallel(D, expert, config) for _ in trained)
        first = dist.get_rank() * config.num_local_experts if ep_size > 1 else 0
        for index, (layer, which) in enumerate(zip(self.layers, trained, strict=True)):
            self._fill(layer, index, first, which)

    def _fill(self, layer: ExpertParallel, index: int, first: int, which: set[int]) -> None:
        parts = [(-1, layer.gate), *enumerate(layer.experts.deepspeed_experts, start=first)]
        for number, part in parts:
            generator = torch.Generator().manual_seed(100 * index + number + 1)
            for parameter in part.parameters():
                parameter.requires_grad_(number in which)
                parameter.data.copy_(0.5 * torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y, loss, _ = layer(x)
            x = x + y
        return x.square().mean() + loss

    def gradients(self) -> dict[str, Tensor]:
        """Of this rank's trained experts, by their global names."""
        found = {}
        for index, layer in enumerate(self.layers):
            experts = list(layer.experts.deepspeed_experts)
            first = dist.get_rank() * len(experts) if len(experts) < 4 else 0
            for number, expert in enumerate(experts, start=first):
                for name, parameter in expert.named_parameters():
                    if parameter.requires_grad:
                        assert parameter.grad is not None, (index, number, name)
                        found[f"{index}.{number}.{name}"] = parameter.grad
        return found


class Odd(torch.nn.Module):
    """An expert of no known form."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()


TRAINED = [  # the experts that train, of each layer; -1 is the gate
    [{0, 1}],
    [{0, 1, -1}],
    [{3}],
    [{0}, {2, 3}],
    [{0, 1, -1}, {0, 1, -1}],
    [set(), {1}],
]


def differences() -> list[tuple[bool, float, int]]:
    """Of each case: whether the loss can go backward here, how far gradients are from one device's, how many."""
    found, transport = [], open_transport([[0, 1]], MoEConfig(num_experts=4, ep_size=2, timeout_s=20.0))
    inputs = [torch.randn(12, D, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
    for expert in (GeluMLP(D, 16, bias=True), Odd()):
        for trained in TRAINED:
            model, alone = Frozen(trained, expert, ep_size=2), Frozen(trained, expert, ep_size=1)
            for layer in model.layers:
                layer.connect(transport, Torus(1, 2))
            loss = model(inputs[dist.get_rank()])
            if loss.requires_grad:
                loss.backward()
            sum(alone(x) for x in inputs).backward()
            expected, mine = alone.gradients(), model.gradients()
            far = max((float((mine[k] - expected[k]).abs().max() / expected[k].abs().max()) for k in mine), default=0.0)
            found.append((loss.requires_grad, far, len(mine)))
    return found


def test_where_some_ranks_experts_train_all_go_backward_with_one_devices_gradients(pool: RankPool) -> None:
    by_rank = pool.run(2, differences, timeout_s=60)
    for rank, cases in enumerate(by_rank):
        for number, (requires_grad, far, _) in enumerate(cases):
            assert requires_grad, (rank, number)
            assert far < 2e-6, (rank, number, far)
    assert all(first[2] + second[2] > 0 for first, second in zip(*by_rank, strict=True))


def nobody_trains() -> list[bool]:
    """True where the loss can go backward although nothing trains on any rank; and what is not agreed on."""
    transport = open_transport([[0, 1]], MoEConfig(num_experts=4, ep_size=2, timeout_s=20.0))
    seen = []
    for trained in ([set()], [{0}]):
        model = Frozen(trained, GeluMLP(D, 16), ep_size=2)
        model.layers[0].connect(transport, Torus(1, 2))
        with alone_with_its_needs() if trained[0] else torch.enable_grad():
            seen.append(model(torch.ones(3, D)).requires_grad)
    return seen


@contextmanager
def alone_with_its_needs() -> Iterator[None]:
    """The peers' needs are not read: what the agreement is there for."""

    def unread(*counts: Any) -> agreement.AgreedCounts:
        return AgreedCounts(*counts)._replace(goes_backward=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "AgreedCounts", unread)
        yield


def test_where_nothing_trains_no_rank_goes_backward_and_without_the_agreement_a_peer_does_not(pool: RankPool) -> None:
    """The control of the test above."""
    assert pool.run(2, nobody_trains, timeout_s=60) == [[False, True], [False, False]]


def rows_of_many_experts(num_experts: int) -> Any:
    config = MoEConfig(num_experts=num_experts, ep_size=2, top_k=2, schedule="serial", timeout_s=20.0)
    transport = open_transport([[0, 1]], config)
    layer = ExpertParallel(D, GeluMLP(D, 16), config)
    layer.connect(transport, Torus(1, 2))
    y = layer(torch.randn(50, D))[0]
    y.sum().backward()
    bad = caught(layer, torch.ones(3, D + 1) if transport.rank else torch.ones(3, D))
    return y.shape, bad, caught(layer, torch.ones(3, D))


def test_counts_of_more_experts_than_one_exchange_holds_follow_in_another(pool: RankPool) -> None:
    first, second = pool.run(2, rows_of_many_experts, 300)
    assert first[0] == second[0] == (50, D)
    assert "rank 1 refused its input" in first[1] and second[1].startswith("ConfigError")
    assert first[2] == second[2] == ""
