"""Runs a schedule: rows out, experts, results back, forward and backward, in one autograd function.

The interpreter reads ops in issue order. An op waits for the marks of the ops before it and leaves one behind; on CUDA
a mark is an event and nothing blocks the host, on the CPU it is a transfer's handle. Serial is the schedule of one
piece and depth 0: there is no second code path.

Parameters are inputs of the function and their gradients are its outputs, summed over all pieces: an engine's gradient
hooks fire once a backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.comm.lanes import Lanes, Mark
from ds_moe_ep.comm.transport import Message, Transport
from ds_moe_ep.moe.experts import Experts
from ds_moe_ep.moe.layout import Move, PieceRows, RowLayout
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

    No host sync. Collective again in the backward pass, in the order in which autograd visits the layers; the
    gradient of the results is used up there, so whoever consumes the results must give it away.
    """
    may_differentiate = torch.is_grad_enabled()
    results_ND: Tensor = _RunExperts.apply(rows_ND, experts, route, may_differentiate, *experts.expert_parameters())  # type: ignore[no-untyped-call]
    return results_ND


class _RunExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, experts: Experts, route: Route, may_differentiate: bool, *parameters: Tensor
    ) -> Tensor:
        expert_pass = experts.start(route.layout.expert_spans, may_differentiate)
        buffers = Buffers.of(rows_ND.contiguous(), route)

        def compute(rows: PieceRows) -> None:
            for (expert, (start, stop)), moves in zip(rows.runs, rows.run_moves, strict=True):
                here = slice(start, stop)
                with buffers.outputs_of(here, moves) as out_nD:
                    expert_pass.compute(expert, here, buffers.inputs_RD[here], out_nD)

        run(route.forward, route, buffers, compute)
        ctx.route, ctx.expert_pass = route, expert_pass
        ctx.save_for_backward(buffers.inputs_RD, *expert_pass.saved, *parameters)
        ctx.num_saved = len(expert_pass.saved)
        expert_pass.saved = []
        return buffers.results_ND

    @staticmethod
    def backward(ctx: Any, d_results_ND: Tensor) -> tuple[Tensor | None, ...]:
        route, expert_pass = ctx.route, ctx.expert_pass
        (inputs_RD, *expert_pass.saved), expert_pass.may_overwrite = _take_saved(ctx, 1 + ctx.num_saved)
        buffers = Buffers.of(d_results_ND.contiguous(), route, returns_in_place=True)
        grads: list[Tensor | None] = []

        def compute(rows: PieceRows) -> None:
            for (expert, (start, stop)), moves in zip(rows.runs, rows.run_moves, strict=True):
                here = slice(start, stop)
                with buffers.outputs_of(here, moves) as out_nD:
                    expert_pass.input_grads(expert, here, buffers.inputs_RD[here], out_nD)

        def weights() -> None:
            for expert, (start, stop) in enumerate(route.layout.expert_spans):
                grads.extend(expert_pass.weight_grads(expert, inputs_RD[start:stop], buffers.inputs_RD[start:stop]))

        run(route.backward, route, buffers, compute, weights)
        expert_pass.saved = []
        return buffers.results_ND, None, None, None, *grads


def _take_saved(ctx: Any, num_tensors: int) -> tuple[list[Tensor], bool]:
    """The first saved tensors, and whether they are ours alone now: yes, unless the caller retains the graph."""
    tensors = list(ctx.saved_tensors[:num_tensors])
    is_retained = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
    if is_retained():
        return tensors, False
    ctx.maybe_clear_saved_tensors()
    return tensors, True


@dataclass(frozen=True)
class Buffers:
    """The rows of one pass. N sent and returned, R received.

    `wire_in` and `wire_out` are what the transport writes and reads on the experts' side: the stacked rows
    themselves, or, where received rows lie in another order, one staging buffer for both (a piece's results take the
    places of its inputs, which are stacked by then; there is no buffer of stacked results, each run spreads its own).
    With `returns_in_place` results come back over the sent rows: a piece's rows are gone when its results arrive.
    """

    sent_ND: Tensor
    wire_in_RD: Tensor
    inputs_RD: Tensor
    outputs_RD: Tensor
    wire_out_RD: Tensor
    results_ND: Tensor

    @classmethod
    def of(cls, sent_ND: Tensor, route: Route, returns_in_place: bool = False) -> Buffers:
        if route.transport.size == 1:  # every row stays, in its place
            outputs_RD = torch.empty_like(sent_ND)
            return cls(sent_ND, sent_ND, sent_ND, outputs_RD, outputs_RD, outputs_RD)
        inputs_RD = sent_ND.new_empty(route.layout.num_received, sent_ND.shape[1])
        results_ND = sent_ND if returns_in_place else torch.empty_like(sent_ND)
        if route.layout.is_stacked_on_arrival:
            outputs_RD = torch.empty_like(inputs_RD)
            return cls(sent_ND, inputs_RD, inputs_RD, outputs_RD, outputs_RD, results_ND)
        wire_RD = torch.empty_like(inputs_RD)
        return cls(sent_ND, wire_RD, inputs_RD, wire_RD[:0], wire_RD, results_ND)

    @contextmanager
    def outputs_of(self, rows: slice, moves: Sequence[Move]) -> Iterator[Tensor]:
        """A place to write the results of a run of stacked rows to; after the scope they lie on the wire."""
        if not moves:
            yield self.outputs_RD[rows]
        elif len(moves) == 1:  # one peer's rows lie side by side on the wire too
            yield self.wire_out_RD[moves[0][0] : moves[0][0] + moves[0][2]]
        else:
            scratch_nD = self.wire_out_RD.new_empty(rows.stop - rows.start, self.wire_out_RD.shape[1])
            yield scratch_nD
            _move([(place - rows.start, wire, n) for wire, place, n in moves], scratch_nD, self.wire_out_RD)

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


def _move(moves: Sequence[Move], from_RD: Tensor, to_RD: Tensor) -> None:
    """Copies rows between wire order and stacked order: (from, to, number of rows) each."""
    for start, to_start, num_rows in moves:
        to_RD[to_start : to_start + num_rows] = from_RD[start : start + num_rows]
