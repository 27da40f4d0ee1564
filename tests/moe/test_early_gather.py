"""Tokens that tensor ranks gather while others come back: the bits of a gather behind the pass, and it is in time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.comm.transport import InFront, Message, Transfer, Transport
from ds_moe_ep.moe import executor
from ds_moe_ep.moe.tensor_parallel import early
from ds_moe_ep.moe.tensor_parallel.ranks import TensorRanks
from ds_moe_ep.schedule.spans import NO_TAGS, Tags
from tests.moe.layer_cases import CaseData, LayerCase, case_data
from tests.moe.layer_runs import Links, build_layer, config, torus_for
from tests.ranks import RankPool

WORLD, NUM_EXPERTS, NUM_PIECES = 4, 8, 3  # on two nodes: a half of the near rows, the far ones, the other half


def case(name: str, tokens: int = 23, dtype: torch.dtype = torch.float32, **knobs: object) -> LayerCase:
    known = {"num_experts": NUM_EXPERTS, "ep_size": WORLD, "node_size": 2, "schedule": "peers", **knobs}
    return LayerCase(name=name, config=config(**known), rows=(tokens,) * WORLD, dtype=dtype)


CASES = [
    case("one choice"),
    case("two, one copy per node, bf16", dtype=torch.bfloat16, top_k=2, two_level="copies"),
    case("four, by chunks", top_k=4, schedule="chunks", chunks=3, num_experts=8),
    case("a capacity, row cuts", top_k=2, capacity_factor=0.5, min_capacity=1, row_cuts=2, depth=3),
    case("fewer tokens than ranks", tokens=3, top_k=2),
    case("sums at nodes, not early", top_k=2, two_level="sums"),
]


def results(each: LayerCase, links: Links, is_early: bool) -> list[Tensor]:
    """Output and gradients of all ranks' common tokens."""
    layer, data = build_layer(each, case_data(each)), case_data(each)
    layer.connect(links.of(each), torus_for(each))
    layer.share_tokens(TensorRanks(dist.group.WORLD, dist.get_rank(), WORLD))
    x = data.inputs[0].clone().requires_grad_()
    with nullcontext() if is_early else without():
        output, loss, _ = layer(x)
    ((output * data.output_grads[0]).sum() + loss).backward()
    return [output.detach(), *(leaf.grad for leaf in (x, *layer.parameters()) if leaf.grad is not None)]


def without() -> AbstractContextManager[object]:
    return patch.object(TensorRanks, "early_gather", lambda *_: None)


class HeldBack(InFront):
    """The last combine of a forward pass ends once all tokens before it have come from the other ranks."""

    def __init__(self, inner: Transport, have_come: threading.Event, patience_s: float) -> None:
        super().__init__(inner)
        self._left, self._have_come, self._patience_s = NUM_PIECES, have_come, patience_s
        self.was_in_time: bool | None = None

    def start(self, lane: str, sends: Sequence[Message], receives: Sequence[Message], tags: Tags = NO_TAGS) -> Transfer:
        transfer = super().start(lane, sends, receives, tags)
        if (lane, tags.phase) != ("combine", "forward"):
            return transfer
        self._left -= 1
        return transfer if self._left else _Held(transfer, self)

    def hold(self) -> None:
        self.was_in_time = self._have_come.wait(self._patience_s)


class _Held:
    def __init__(self, inner: Transfer, transport: HeldBack) -> None:
        self._inner, self._transport = inner, transport

    def wait(self) -> None:
        self._transport.hold()
        self._inner.wait()


def in_time(links: Links, is_early: bool) -> tuple[bool | None, list[list[int]]]:
    """True where the tokens of all pieces but the last were gathered before its combine; tokens by piece and rank."""
    each, have_come, counted = CASES[0], threading.Event(), list[list[int]]()
    wait, begin = early._Arriving.wait, early.begin_rows

    def counting(group: dist.ProcessGroup, counts: Sequence[int], own: Tensor) -> object:
        counted.append(list(counts))
        return begin(group, counts, own)

    def arrives(arriving: early._Arriving) -> None:
        wait(arriving)
        if len(counted) == NUM_PIECES - 1:
            have_come.set()

    layer, data = build_layer(each, case_data(each)), case_data(each)
    held = HeldBack(links.of(each), have_come, 30.0 if is_early else 0.5)
    layer.connect(held, torus_for(each))
    layer.share_tokens(TensorRanks(dist.group.WORLD, dist.get_rank(), WORLD))
    patched = patch.object(early._Arriving, "wait", arrives), patch.object(early, "begin_rows", counting)
    with patched[0], patched[1], nullcontext() if is_early else without():
        layer(data.inputs[0])
    return held.was_in_time, counted


def gradients_in_time(links: Links, is_early: bool) -> tuple[bool, int]:
    """True where the gradients of all tokens were gathered before the weights' were computed; gathers by then."""
    each, have_come, steps, found = CASES[0], threading.Event(), executor.Steps, list[bool]()
    wait, begin, begun, arrived = early._Arriving.wait, early.begin_rows, list[int](), list[object]()

    def counting(group: dist.ProcessGroup, counts: Sequence[int], own: Tensor) -> object:
        begun.append(len(own))
        return begin(group, counts, own)

    def arrives(arriving: early._Arriving) -> None:
        wait(arriving)
        arrived.append(arriving)
        if len(arrived) == NUM_PIECES:
            have_come.set()

    def holding(phase: str, compute: object, weights: object, relay: object, gathered: object) -> executor.Steps:
        def held(block: int) -> None:
            found.append(have_come.wait(30.0 if is_early else 0.5))
            weights(block)

        return steps(phase, compute, held, relay, gathered)

    layer, data = build_layer(each, case_data(each)), case_data(each)
    layer.connect(links.of(each), torus_for(each))
    layer.share_tokens(TensorRanks(dist.group.WORLD, dist.get_rank(), WORLD))
    with nullcontext() if is_early else without():
        output, _, _ = layer(data.inputs[0].clone().requires_grad_())
        patched = patch.object(early._Arriving, "wait", arrives), patch.object(early, "begin_rows", counting)
        with patched[0], patched[1], patch.object(executor, "Steps", holding):
            output.backward(data.output_grads[0])
    assert len(found) == 1, "weights' gradients in one block"
    return found[0], len(begun)


def everything() -> tuple[list[bool], list[bool | None], list[list[int]], list[tuple[bool, int]]]:
    links = Links()
    equal = [
        all(map(torch.equal, results(each, links, is_early=True), results(each, links, is_early=False)))
        for each in CASES
    ]
    (early_one, counted), (late_one, _) = in_time(links, is_early=True), in_time(links, is_early=False)
    return equal, [early_one, late_one], counted, [gradients_in_time(links, is_early) for is_early in (True, False)]


def far_tokens(data: CaseData) -> list[int]:
    """Of each rank's span of the tokens, how many visit an expert on the other node."""
    experts_T = (data.inputs[0] @ data.gate_ED.t()).argmax(1)
    spans = torch.arange(len(experts_T)).tensor_split(WORLD)  # the first ones have a token more
    return [int((experts_T[span] // (NUM_EXPERTS // 2) != rank // 2).sum()) for rank, span in enumerate(spans)]


def test_results_are_gathered_while_others_come_back_with_the_bits_of_a_gather_behind_them(pool: RankPool) -> None:
    """The control gathers behind the pass: no token before the last combine, and on the way back behind the weights."""
    by_rank, data = pool.run(WORLD, everything), case_data(CASES[0])
    for equal, (early_one, late_one), counted, gradients in by_rank:
        assert all(equal), [each.name for each, is_equal in zip(CASES, equal, strict=True) if not is_equal]
        assert early_one is True and late_one is False
        assert gradients == [(True, NUM_PIECES), (False, 0)], "on the way back the last combine's too"
        assert len(counted) == NUM_PIECES and counted == by_rank[0][2]
        assert [sum(of_rank) for of_rank in zip(*counted, strict=True)] == [6, 6, 6, 5]
        assert counted[1] == far_tokens(data), "with one choice, the far combine completes the tokens of far experts"
