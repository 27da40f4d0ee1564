"""Runs a schedule: rows out, experts, results back, forward and backward, in one autograd function.

The interpreter reads ops in issue order and hands each to its lane, with the events that it must wait for; it leaves
an event behind. On CUDA nothing blocks the host; on the CPU a lane's thread moves rows while the caller computes.
Serial is the schedule of one piece and depth 0: there is no second code path.

Parameters are inputs of the function and their gradients are its outputs, summed over all pieces: an engine's gradient
hooks fire once a backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_moe_ep.comm.lanes import Event, Lanes
from ds_moe_ep.comm.recorder import NOT_RECORDED, Off, Recorder
from ds_moe_ep.comm.transport import Transport
from ds_moe_ep.kernels.eager import not_compiled, without_autocast
from ds_moe_ep.moe.experts import LocalExperts, SharedExpert
from ds_moe_ep.moe.grouped.experts import GroupedPass
from ds_moe_ep.moe.layout import PieceRows, RowLayout
from ds_moe_ep.moe.rows.buffers import Buffers
from ds_moe_ep.moe.tensor_parallel.early import EarlyGather, TokenGather
from ds_moe_ep.moe.two_level.copies import NodeCopies
from ds_moe_ep.moe.two_level.relay import Relay, relay_of
from ds_moe_ep.schedule.build import Op, OpKind, Schedule
from ds_moe_ep.schedule.spans import Tags


@dataclass(frozen=True)
class PassContext:
    """The needs of a pass besides rows and weights: layout, schedules, transport, lanes."""

    layout: RowLayout
    forward: Schedule
    backward: Schedule
    transport: Transport
    lanes: Lanes
    recorder: Recorder
    use_triton: bool | None = None  # as the kernels take it
    layer: str = ""  # its name, for the record and for errors; the same on every rank
    begin_backward: Callable[[], None] = lambda: None  # raises where the group's ranks are not all there
    copies: NodeCopies | None = None  # of tokens for far nodes, where the forward schedule spreads them


def run_experts(
    rows_ND: Tensor,
    experts: LocalExperts,
    context: PassContext,
    shared: SharedExpert | None = None,
    weights_UK: Tensor | None = None,
    early: EarlyGather | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The experts' outputs [N, D] for rows in send order, in the same order, and the shared expert's [T, D].

    Collective; differentiable. No host sync. Collective again in the backward pass, in the order in which autograd
    visits the layers; the gradient of the results is used up there, so whoever consumes the results must give it away.
    Where far nodes sum results, `weights_UK` are those of the copies, which stand behind the near rows, and their sums
    behind the near results.
    """
    may_differentiate = torch.is_grad_enabled()
    x_TD = None if shared is None else shared.x_TD
    parameters = experts.expert_parameters() + ([] if shared is None else shared.experts.expert_parameters())
    outputs: tuple[Tensor, Tensor | None] = _RunExperts.apply(
        rows_ND, x_TD, weights_UK, experts, shared, context, early, may_differentiate, *parameters
    )  # type: ignore[no-untyped-call]
    return outputs


class _RunExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_ND: Tensor,
        x_TD: Tensor | None,
        weights_UK: Tensor | None,
        experts: LocalExperts,
        shared: SharedExpert | None,
        context: PassContext,
        early: EarlyGather | None,
        may_differentiate: bool,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        with telling(context, "forward"):
            layout, num_ranks = context.layout, context.transport.size
            expert_pass = experts.start(layout.expert_spans, may_differentiate, layout.groupings)
            shared_pass = None if shared is None else shared.start()
            for started in (expert_pass, shared_pass):
                if started is not None:
                    started.use_triton = context.use_triton
            buffers = Buffers.of(rows_ND.contiguous(), layout, num_ranks)
            shared_TD = None if x_TD is None else torch.empty_like(x_TD)
            legs = [rows.legs for rows in layout.pieces]
            links = context.forward, context.copies, legs, context.transport
            relay = relay_of(*links, rows_ND, weights_UK, context.use_triton)

        def compute(rows: PieceRows) -> None:
            if isinstance(expert_pass, GroupedPass):
                for group, here in buffers.groups_of(rows):
                    buffers.spread(rows, here, expert_pass.compute(group, here, buffers.inputs_RD[here]))
            else:
                for expert, here, in_nD, out_nD in buffers.runs_of(rows):
                    expert_pass.compute(expert, here, in_nD, out_nD)
            if shared_pass is not None and rows.has_tokens:
                assert x_TD is not None and shared_TD is not None
                here = slice(*rows.tokens)
                shared_pass.compute(0, here, x_TD[here], shared_TD[here])

        results = None if early is None else early.results
        run(context.forward, context, buffers, Steps("forward", compute, None, relay, results))
        ctx.early = early
        ctx.relay, relayed = relay, [] if relay is None else relay.saved
        ctx.context, ctx.passes = context, [p for p in (expert_pass, shared_pass) if p is not None]
        ctx.num_saved = [len(each.saved) for each in ctx.passes]
        saved = (t for each in ctx.passes for t in each.saved)
        ctx.save_for_backward(buffers.inputs_RD, x_TD, *saved, *parameters, *relayed)
        if relay is not None:
            relay.release()
        num_shared = 0 if shared is None else len(shared.experts.expert_parameters())
        ctx.num_weights = [len(parameters) - num_shared, num_shared]
        for each in ctx.passes:
            each.saved = []
            each.release_weights()
        return buffers.results_ND, shared_TD

    @staticmethod
    @once_differentiable
    @not_compiled
    def backward(ctx: Any, d_results_ND: Tensor, d_shared_TD: Tensor | None) -> tuple[Tensor | None, ...]:
        context, (expert_pass, *shared_passes) = ctx.context, ctx.passes
        context.begin_backward()
        with telling(context, "backward"):
            inputs_RD, x_TD, relayed = _take_saved(ctx)
            relay = None if ctx.relay is None else ctx.relay.backward(relayed, d_results_ND)
            buffers = Buffers.of(
                d_results_ND.contiguous(), context.layout, context.transport.size, returns_in_place=True
            )
            dx_TD = None if x_TD is None else torch.empty_like(x_TD)
            d_shared_TD = None if d_shared_TD is None else d_shared_TD.contiguous()
            gradients = None if ctx.early is None else ctx.early.begin_back(d_results_ND)
        grads: list[Tensor | None] = []
        shared_grads: list[Tensor | None] = []

        def compute(rows: PieceRows) -> None:
            if isinstance(expert_pass, GroupedPass):
                for group, here in buffers.groups_of(rows):
                    buffers.spread(rows, here, expert_pass.input_grads(group, here, buffers.inputs_RD[here]))
            else:
                for expert, here, in_nD, out_nD in buffers.runs_of(rows):
                    expert_pass.input_grads(expert, here, in_nD, out_nD)
            for shared_pass in shared_passes if rows.has_tokens else ():
                assert d_shared_TD is not None and dx_TD is not None
                here = slice(*rows.tokens)
                shared_pass.input_grads(0, here, d_shared_TD[here], dx_TD[here])

        def weights(block: int) -> None:
            is_last = block == len(context.layout.weight_runs) - 1
            for expert in range(len(context.layout.expert_spans)):
                for here in (slice(*span) for owner, span in context.layout.weight_runs[block] if owner == expert):
                    expert_pass.add_weight_grads(expert, here, inputs_RD[here], buffers.inputs_RD[here])
                if is_last:
                    grads.extend(expert_pass.weight_grads(expert))
            for shared_pass in shared_passes if block == 0 else ():  # the near rows' block
                assert x_TD is not None and d_shared_TD is not None
                shared_pass.add_weight_grads(0, slice(0, x_TD.shape[0]), x_TD, d_shared_TD)
                shared_grads.extend(shared_pass.weight_grads(0))

        with without_autocast(d_results_ND.device.type):  # whatever surrounds the caller's backward()
            run(context.backward, context, buffers, Steps("backward", compute, weights, relay, gradients))
        for each in ctx.passes:
            each.saved = []
            each.release_weights()
        d_weights_UK = None if relay is None else relay.dots_UK
        return buffers.results_ND, dx_TD, d_weights_UK, *[None] * 5, *grads, *shared_grads


def _take_saved(ctx: Any) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """The experts' inputs, the tokens, and what a relay saved; gives the passes what they saved.

    The passes may use their tensors up where nobody else will read them: unless the caller retains the graph.
    """
    inputs_RD, x_TD, *rest = ctx.saved_tensors
    is_retained = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)()
    for each, num_saved in zip(ctx.passes, ctx.num_saved, strict=True):
        each.saved, rest, each.may_overwrite = rest[:num_saved], rest[num_saved:], not is_retained
    for each, num_weights in zip(ctx.passes, ctx.num_weights, strict=False):
        each.restore_weights(rest[:num_weights])
        rest = rest[num_weights:]
    if not is_retained:
        ctx.maybe_clear_saved_tensors()
    return inputs_RD, x_TD, rest


@dataclass(frozen=True)
class Steps:
    """The computations of a pass: a piece's rows, and a block of weight gradients."""

    phase: str
    compute: Callable[[PieceRows], None]
    weights: Callable[[int], None] | None = None
    relay: Relay | None = None  # of a pass with two levels
    early: TokenGather | None = None  # of a pass whose tokens other ranks get too


def run(schedule: Schedule, context: PassContext, buffers: Buffers, steps: Steps) -> None:
    """Issues every op of the schedule and returns once the caller's lane is behind all of them."""
    lanes = context.lanes.blocking() if schedule.depth == 0 else context.lanes
    entry, early = lanes.entry(), steps.early
    events: list[Event] = []
    gathered: list[Event] = []
    recorder = None if isinstance(context.recorder, Off) else context.recorder
    try:
        for op, lane, label, is_awaited in schedule.issues:
            after = [events[before] for before in op.after] if op.after else [entry]
            tags = _tags(context.layer, steps.phase, label)
            leg = None if steps.relay is None else steps.relay.leg(op, schedule, buffers, tags)
            work = leg or _work(op, context, buffers, steps, tags)
            scope = NOT_RECORDED if recorder is None else recorder.scope(lane, str(op), tags)
            events.append(lanes.issue(lane, after, work, scope, is_awaited or early is not None))
            gathered += [] if early is None else early.behind(op, events[-1], lanes, buffers.results_ND)
        lanes.leave([*events, *gathered])
    except BaseException as error:
        others = [each.everything() for each in (steps.relay, early) if each is not None]
        lanes.abandon([*buffers.everything(), *(tensor for tensors in others for tensor in tensors)])
        context.transport.abandon(error, Tags(context.layer, steps.phase))
        raise


@contextmanager
def telling(context: PassContext, phase: str) -> Iterator[None]:
    """A scope behind the agreement of a pass: its error is told to the peers, which are about to send rows."""
    try:
        yield
    except BaseException as error:
        context.transport.abandon(error, Tags(context.layer, phase))
        raise


def _work(op: Op, context: PassContext, buffers: Buffers, steps: Steps, tags: Tags) -> Callable[[], Event | None]:
    """The work of an op, to be called on its lane."""
    if op.kind is OpKind.WEIGHTS:
        assert steps.weights is not None, "this pass has no weight gradients"
        return partial(steps.weights, op.piece)
    if op.kind is OpKind.DISPATCH:
        return partial(_dispatch, op.piece, context.layout, context.transport, buffers, tags)
    if op.kind is OpKind.COMBINE:
        return partial(_combine, op.piece, context.layout, context.transport, buffers, tags)
    rows = context.layout.pieces[op.piece]

    def compute() -> None:
        if rows.moves:
            buffers.stack(rows)
        steps.compute(rows)

    return compute


@functools.lru_cache(maxsize=4096)
def _tags(layer: str, phase: str, peers: str) -> Tags:
    return Tags(layer, phase, peers)


def _dispatch(piece: int, layout: RowLayout, transport: Transport, buffers: Buffers, tags: Tags) -> Event:
    sends = buffers.sent(buffers.sent_ND, layout, piece)
    return transport.start("dispatch", sends, buffers.received(buffers.wire_in_RD, layout, piece), tags)


def _combine(piece: int, layout: RowLayout, transport: Transport, buffers: Buffers, tags: Tags) -> Event:
    sends = buffers.received(buffers.wire_out_RD, layout, piece)
    return transport.start("combine", sends, buffers.sent(buffers.results_ND, layout, piece), tags)
