"""Runs a schedule: rows out, experts, results back, forward and backward, in one autograd function.

The interpreter reads ops in issue order. An op waits for the marks of the ops before it and leaves one behind; on CUDA
a mark is an event and nothing blocks the host, on the CPU it is a transfer's handle. Serial is the schedule of one
piece and depth 0: there is no second code path.

Parameters are inputs of the function and their gradients are its outputs, summed over all pieces: an engine's gradient
hooks fire once a backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.comm.lanes import Lanes, Mark
from ds_moe_ep.comm.transport import Message, Transport
from ds_moe_ep.moe.experts import Experts
from ds_moe_ep.moe.layout import PieceRows, RowLayout
from ds_moe_ep.recorder import Recorder
from ds_moe_ep.schedule import Kind, Schedule


@dataclass(frozen=True)
class Route:
    """What a pass needs besides rows and weights: layout, schedules, links."""

    layout: RowLayout
    forward: Schedule
    backward: Schedule
    transport: Transport
    lanes: Lanes
    recorder: Recorder


def run_experts(rows_ND: Tensor, experts: Experts, route: Route) -> Tensor:
    """The experts' outputs [N, D] for rows in send order, in the same order. Collective; differentiable.

    No host sync. Collective again in the backward pass, in the order in which autograd visits the layers.
    """
    may_differentiate = torch.is_grad_enabled()
    results_ND: Tensor = _RunExperts.apply(rows_ND, experts, route, may_differentiate, *experts.expert_parameters())  # type: ignore[no-untyped-call]
    return results_ND


class _RunExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, experts: Experts, route: Route, may_differentiate: bool, *parameters: Tensor
    ) -> Tensor:
        expert_pass = experts.start(route.layout.num_received, may_differentiate)
        buffers = Buffers.of(rows_ND.contiguous(), route)

        def compute(rows: PieceRows) -> None:
            for expert, (start, stop) in rows.runs:
                expert_pass.compute(expert, slice(start, stop), buffers.inputs_RD, buffers.outputs_RD)

        run(route.forward, route, buffers, compute)
        ctx.route, ctx.expert_pass = route, expert_pass
        ctx.save_for_backward(buffers.inputs_RD, *expert_pass.saved, *parameters)
        ctx.num_saved = len(expert_pass.saved)
        expert_pass.saved = []
        return buffers.results_ND

    @staticmethod
    def backward(ctx: Any, d_results_ND: Tensor) -> tuple[Tensor | None, ...]:
        inputs_RD, *saved = ctx.saved_tensors
        route, expert_pass = ctx.route, ctx.expert_pass
        expert_pass.saved = saved[: ctx.num_saved]
        buffers = Buffers.of(d_results_ND.contiguous(), route)
        grads: list[Tensor | None] = []

        def compute(rows: PieceRows) -> None:
            for expert, (start, stop) in rows.runs:
                expert_pass.input_grads(expert, slice(start, stop), buffers.inputs_RD, buffers.outputs_RD)

        def weights() -> None:
            for expert, (start, stop) in enumerate(route.layout.expert_spans):
                grads.extend(expert_pass.weight_grads(expert, slice(start, stop), inputs_RD, buffers.inputs_RD))

        run(route.backward, route, buffers, compute, weights)
        expert_pass.saved = []
        return buffers.results_ND, None, None, None, *grads


@dataclass(frozen=True)
class Buffers:
    """The rows of one pass. N sent and returned, R received.

    `wire_in` and `wire_out` are what the transport writes and reads on the experts' side: the stacked rows
    themselves, or, where received rows lie in another order, one staging buffer for both (a piece's results take the
    places of its inputs, which are stacked by then).
    """

    sent_ND: Tensor
    wire_in_RD: Tensor
    inputs_RD: Tensor
    outputs_RD: Tensor
    wire_out_RD: Tensor
    results_ND: Tensor

    @classmethod
    def of(cls, sent_ND: Tensor, route: Route) -> Buffers:
        if route.transport.size == 1:  # every row stays, in its place
            outputs_RD = torch.empty_like(sent_ND)
            return cls(sent_ND, sent_ND, sent_ND, outputs_RD, outputs_RD, outputs_RD)
        inputs_RD, outputs_RD = (sent_ND.new_empty(route.layout.num_received, sent_ND.shape[1]) for _ in range(2))
        results_ND = torch.empty_like(sent_ND)
        if route.layout.is_stacked_on_arrival:
            return cls(sent_ND, inputs_RD, inputs_RD, outputs_RD, outputs_RD, results_ND)
        wire_RD = torch.empty_like(inputs_RD)
        return cls(sent_ND, wire_RD, inputs_RD, outputs_RD, wire_RD, results_ND)

    def everything(self) -> tuple[Tensor, ...]:
        return self.sent_ND, self.wire_in_RD, self.inputs_RD, self.outputs_RD, self.wire_out_RD, self.results_ND


def run(
    schedule: Schedule,
    route: Route,
    buffers: Buffers,
    compute: Callable[[PieceRows], None],
    weights: Callable[[], None] | None = None,
) -> None:
    """Issues every op of the schedule and returns once the caller's lane is behind all of them."""
    lanes, touched = route.lanes, buffers.everything()
    entry = lanes.mark("compute")
    marks: list[Mark] = []
    for op in schedule.ops:
        rows = route.layout.pieces[op.piece] if op.piece >= 0 else None
        after = [marks[index] for index in op.after] or [entry]
        name = f"{op.kind.value} {op.piece}" if op.piece >= 0 else op.kind.value
        with lanes.on(op.kind.lane, after, touched), route.recorder.scope(op.kind.lane, name) as record:
            work: Mark | None = None
            if op.kind is Kind.WEIGHTS:
                assert weights is not None, "this pass has no weight gradients"
                weights()
            elif rows is None:
                raise AssertionError(f"{op} names no piece")
            elif op.kind is Kind.DISPATCH:
                work = record.follow(_dispatch(rows, route.transport, buffers))
            elif op.kind is Kind.COMBINE:
                work = record.follow(_combine(rows, route.transport, buffers))
            else:
                _move(rows.moves, buffers.wire_in_RD, buffers.inputs_RD)
                compute(rows)
                _move([(b, a, n) for a, b, n in rows.moves], buffers.outputs_RD, buffers.wire_out_RD)
        marks.append(lanes.mark(op.kind.lane, work))
    with lanes.on("compute", marks, touched):
        pass


def _dispatch(rows: PieceRows, transport: Transport, buffers: Buffers) -> Mark:
    if transport.size > 1:
        _copy_own([(out, into) for out, into in rows.own], buffers.sent_ND, buffers.wire_in_RD)
    return transport.start(
        "dispatch", _messages(buffers.sent_ND, rows.sent), _messages(buffers.wire_in_RD, rows.received)
    )


def _combine(rows: PieceRows, transport: Transport, buffers: Buffers) -> Mark:
    if transport.size > 1:
        _copy_own([(into, out) for out, into in rows.own], buffers.wire_out_RD, buffers.results_ND)
    return transport.start(
        "combine", _messages(buffers.wire_out_RD, rows.received), _messages(buffers.results_ND, rows.sent)
    )


def _messages(rows_RD: Tensor, spans: Sequence[tuple[int, tuple[int, int]]]) -> list[Message]:
    return [Message(peer, rows_RD[start:stop]) for peer, (start, stop) in spans]


def _copy_own(spans: Sequence[tuple[tuple[int, int], tuple[int, int]]], from_RD: Tensor, to_RD: Tensor) -> None:
    for (start, stop), (to_start, to_stop) in spans:
        to_RD[to_start:to_stop] = from_RD[start:stop]


def _move(moves: Sequence[tuple[int, int, int]], from_RD: Tensor, to_RD: Tensor) -> None:
    """Copies rows between wire order and stacked order: (from, to, number of rows) each."""
    for start, to_start, num_rows in moves:
        to_RD[to_start : to_start + num_rows] = from_RD[start : start + num_rows]
