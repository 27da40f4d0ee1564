"""The mathematics of experts, forward and backward, on stacked rows.

A pass holds the stacked intermediate rows of all local experts. It computes any run of rows of one expert, forward or
backward, in any order. A weight gradient is one product over all rows of its expert, or a sum over the schedule's
blocks of them, in their order: deterministic either way, and with the blocks of `bit_equal` the same in every schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from ds_moe_ep.kernels.activation import Clamp, gelu, gelu_backward, swiglu, swiglu_backward
from ds_moe_ep.kernels.linear import add_linear_grad_rows, linear_grad_rows, linear_rows
from ds_moe_ep.kernels.weight_sums import GradSums as GradSums
from ds_moe_ep.kernels.weight_sums import Weights as Weights
from ds_moe_ep.kernels.weight_sums import in_type_of, sum_of
from ds_moe_ep.moe.graphs.opaque import hooks_around, hooks_off, keep, refuse_foreign, refuse_lost

Span = tuple[int, int]  # start, stop
Linear = tuple[Tensor, Tensor | None]  # matrix [I, O], bias [O]

BLOCK_ROWS = 1024  # on the CPU: fewer cost more in small products than they save, more need more memory in between


class ExpertPass(Protocol):
    """One pass through the local experts. `rows` is a slice of the stacked rows, all of one expert."""

    saved: list[Tensor]  # for the backward pass; the autograd function stores it in between
    may_overwrite: bool  # the backward pass may use `saved` up: nobody else will read it
    use_triton: bool | None  # as the kernels take it

    def compute(self, expert: int, rows: slice, x_nD: Tensor, y_nD: Tensor) -> None:
        """Writes the outputs of these rows of the expert."""

    def input_grads(self, expert: int, rows: slice, dy_nD: Tensor, dx_nD: Tensor) -> None:
        """Writes the gradient of the inputs of these rows of the expert."""

    def add_weight_grads(self, expert: int, rows: slice, x_nD: Tensor, dy_nD: Tensor) -> None:
        """Adds the part of these rows to the gradients of the expert's parameters; after the rows' own gradients."""

    def release_weights(self) -> None:
        """Forgets the weights between forward and backward: only what the autograd function saves can be freed then."""

    def restore_weights(self, weights: Sequence[Tensor]) -> None:
        """Takes the weights back, in the order of the experts' parameters."""

    def weight_grads(self, expert: int) -> list[Tensor | None]:
        """The sums, in the order of the expert's parameters; once, after the parts of all its rows, each added once."""


class SavedActivations:
    """The rows that each expert saves from the forward to the backward pass: `num_hidden` tensors [rows, F] per expert.

    A tensor per expert and not one for all: blocks stay small enough for the allocator to keep, and each expert's
    rows are given back with the last product that reads them. On a GPU active rows are not saved: the backward pass
    makes them again from the hidden ones, over their own gradient, in the pass over memory that this gradient takes
    anyway. A recomputation saves them too (`ActiveRows`): their time is short, and making them again is not free.
    """

    def __init__(self, weights: Sequence[Weights], spans: Sequence[Span], num_hidden: int) -> None:
        self._weights = weights
        self._linears: dict[tuple[int, str], Linear] = {}  # by expert and part
        self._sums: list[GradSums] = [GradSums(named) for named in weights]
        width_like_FD = _weight(weights[0], "up")
        self._spans = spans
        self._active = ActiveRows.of_this_pass(width_like_FD.is_cpu)
        self._num_hidden, self._num_saved = num_hidden, num_hidden + (self._active is not ActiveRows.MADE_AGAIN)
        self._num_added = [0] * len(spans)  # rows whose part of the weight gradients was added
        width = len(width_like_FD)
        self.saved = []
        for num_rows in (stop - start for start, stop in spans):
            self.saved += [width_like_FD.new_empty(num_rows, width) for _ in range(num_hidden)]
            if self._active is ActiveRows.SAVED:
                self.saved.append(width_like_FD.new_empty(num_rows, width))
            elif self._active is ActiveRows.SAVED_LATER:  # in their shape, without their memory
                self.saved.append(width_like_FD.new_empty(()).expand(num_rows, width))
        self._nothing: Tensor | None = None
        self.may_overwrite = False
        self.use_triton: bool | None = None
        self._gradients: dict[int, list[Tensor]] = {}
        self._names = [[name for name, weight in named.items() if weight is not None] for named in weights]

    def release_weights(self) -> None:
        """Forgets the weights; ZeRO-3 frees them, and recomputation makes them anew."""
        self.restore_weights([])

    def restore_weights(self, weights: Sequence[Tensor]) -> None:
        """Takes the weights back, in the order of `expert_parameters`."""
        rest = iter(weights)
        self._linears = {}
        self._weights = [dict(zip(names, rest, strict=False)) for names in self._names] if weights else []
        for sums, named in zip(self._sums, self._weights or [{} for _ in self._sums], strict=True):
            sums.weights = named

    def linear(self, expert: int, part: str) -> Linear:
        """The matrix of a Linear of the expert as products read it, and its bias; made once per pass."""
        known = self._linears.get((expert, part))
        if known is None:
            weights = self._weights[expert]
            known = self._linears[expert, part] = _weight(weights, part).t(), weights.get(f"{part}.bias")
        return known

    def of(self, expert: int) -> list[Tensor]:
        """All rows that the expert saved."""
        return self.saved[expert * self._num_saved : (expert + 1) * self._num_saved]

    def at(self, expert: int, rows: slice) -> slice:
        """The place of stacked rows among those of their expert."""
        start, _ = self._spans[expert]
        return slice(rows.start - start, rows.stop - start)

    def gradients(self, expert: int) -> list[Tensor]:
        """The places of the gradients of the expert's saved rows, over them where that is allowed, then of its active
        rows; a pass may use the place of one for the other."""
        if expert not in self._gradients:
            saved = self.of(expert)
            hidden, active = saved[: self._num_hidden], saved[self._num_hidden :] or [torch.empty_like(saved[0])]
            over = hidden if self.may_overwrite else [torch.empty_like(rows) for rows in hidden]
            self._gradients[expert] = [*over, *active]
        return self._gradients[expert]

    def active_rows(self, expert: int, here: slice, like_nF: Tensor) -> Tensor:
        """A place for active rows in the forward pass."""
        return self.of(expert)[-1][here] if self._active is ActiveRows.SAVED else torch.empty_like(like_nF)

    def over(self, active_nF: Tensor) -> tuple[Tensor, Tensor | None]:
        """The place of the active rows' gradient, and that of the rows where they are made again: the same one."""
        if self._active is ActiveRows.MADE_AGAIN:
            return active_nF, active_nF
        return torch.empty_like(active_nF), None

    def is_whole(self, expert: int, rows: slice) -> bool:
        """True for all rows of an expert at once: no other product adds to its weight gradients."""
        return self._spans[expert] == (rows.start, rows.stop)

    def count_added(self, expert: int, rows: slice) -> int:
        """Notes that the part of these rows is being added to the weight gradients; returns how many rows remain."""
        self._num_added[expert] += rows.stop - rows.start
        start, stop = self._spans[expert]
        return stop - start - self._num_added[expert]

    def release(self, expert: int, index: int) -> None:
        """Gives one of the expert's saved tensors back, and its gradient; the last index is that of the active rows."""
        nothing = self._nothing = self.saved[0].new_empty(0) if self._nothing is None else self._nothing
        if index < self._num_saved:
            self.saved[expert * self._num_saved + index] = nothing
        if index < len(gradients := self._gradients.get(expert, [])):
            gradients[index] = nothing

    def weight_grads(self, expert: int) -> list[Tensor | None]:
        """The sums of the expert's weight gradients; its rows are not kept any longer."""
        for index in range(self._num_saved):
            self.release(expert, index)
        self._gradients.pop(expert, None)
        self._num_added[expert] = 0  # a graph that the caller retains is gone through again
        return self._sums[expert].take()


class ActiveRows(Enum):
    """The active rows of a forward pass: made again by its backward pass, or saved for it.

    On the CPU they are saved: there the activation costs more than its place in memory. A recomputation inside of a
    backward pass saves them everywhere, since that uses them up at once. torch's checkpoint puts what the recomputation
    saves in the places of what the first pass saved: that one keeps a place.
    """

    MADE_AGAIN = 0
    SAVED = 1
    SAVED_LATER = 2

    @classmethod
    def of_this_pass(cls, is_on_cpu: bool) -> ActiveRows:
        hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda tracing: None)(False)
        packs = getattr(hooks[0], "__qualname__", "others'") if hooks else ""
        if packs.startswith("_checkpoint_hook."):
            return cls.SAVED_LATER
        is_inside_backward = getattr(torch._C, "_current_graph_task_id", lambda: -1)() != -1
        is_recomputed = is_inside_backward and (not packs or packs.startswith("_recomputation_hook."))
        return cls.SAVED if is_on_cpu or is_recomputed else cls.MADE_AGAIN


def blocks(*rows: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The tensors cut alike, on the CPU, by at most BLOCK_ROWS rows: what lies between products stays small."""
    num_blocks = -(-rows[0].shape[0] // BLOCK_ROWS) if rows[0].is_cpu else 1
    return [rows] if num_blocks <= 1 else zip(*(tensor.tensor_split(num_blocks) for tensor in rows), strict=True)


class GeluPass(SavedActivations):
    """down(gelu(up(x))): saves the rows before the activation.

    Active rows that are made again take the place of the hidden ones, and the hidden rows' gradient that of the active
    ones' gradient: each is written over what no other needs any more, without a copy.
    """

    def __init__(self, weights: Sequence[Weights], spans: Sequence[Span], approximate: str) -> None:
        super().__init__(weights, spans, 1)  # hidden rows
        self._approximate = approximate

    def compute(self, expert: int, rows: slice, x_nD: Tensor, y_nD: Tensor) -> None:
        here, up, down = self.at(expert, rows), self.linear(expert, "up"), self.linear(expert, "down")
        hidden_nF = self.saved[expert * self._num_saved][here]
        for x, hidden, active, y in blocks(x_nD, hidden_nF, self.active_rows(expert, here, hidden_nF), y_nD):
            linear_rows(x, *up, hidden)
            gelu(hidden, active, self._approximate)
            linear_rows(active, *down, y)

    def input_grads(self, expert: int, rows: slice, dy_nD: Tensor, dx_nD: Tensor) -> None:
        weights, here = self._weights[expert], self.at(expert, rows)
        up, down = _weight(weights, "up"), _weight(weights, "down")
        hidden_nF, (d_hidden_RF, active_RF) = self.of(expert)[0][here], self._places(expert)
        is_made_again = self._active is ActiveRows.MADE_AGAIN
        for dy, hidden, d_hidden, active, dx in blocks(dy_nD, hidden_nF, d_hidden_RF[here], active_RF[here], dx_nD):
            d_active = d_hidden if is_made_again else torch.empty_like(d_hidden)
            linear_grad_rows(dy, down, d_active)
            made_again = active if is_made_again else None
            gelu_backward(d_active, hidden, d_hidden, made_again, self._approximate, self.use_triton)
            linear_grad_rows(d_hidden, up, dx)

    def add_weight_grads(self, expert: int, rows: slice, x_nD: Tensor, dy_nD: Tensor) -> None:
        here, sums, is_only = self.at(expert, rows), self._sums[expert], self.is_whole(expert, rows)
        is_last = not self.count_added(expert, rows)
        sums.add("down", self._places(expert)[1][here], dy_nD, is_only)
        if is_last:  # active rows go before the next product needs memory of its own
            self.release(expert, 0 if self._active is ActiveRows.MADE_AGAIN else 1)
        sums.add("up", x_nD, self._places(expert)[0][here], is_only)

    def _places(self, expert: int) -> list[Tensor]:
        """The places of the hidden rows' gradient and of the active rows."""
        over_hidden, active = self.gradients(expert)
        return [active, over_hidden] if self._active is ActiveRows.MADE_AGAIN else [over_hidden, active]


class SwiGLUPass(SavedActivations):
    """down(silu(gate(x)) * up(x)), or its clamped form: saves gate rows and up rows."""

    def __init__(self, weights: Sequence[Weights], spans: Sequence[Span], clamp: Clamp | None = None) -> None:
        super().__init__(weights, spans, 2)  # gate rows, up rows
        self._clamp = clamp

    def compute(self, expert: int, rows: slice, x_nD: Tensor, y_nD: Tensor) -> None:
        here = self.at(expert, rows)
        gate_nF, up_nF = [rows_RF[here] for rows_RF in self.of(expert)[:2]]
        active_nF = self.active_rows(expert, here, gate_nF)
        for x, gate, up, active, y in blocks(x_nD, gate_nF, up_nF, active_nF, y_nD):
            linear_rows(x, *self.linear(expert, "gate"), gate)
            linear_rows(x, *self.linear(expert, "up"), up)
            swiglu(gate, up, active, self.use_triton, self._clamp)
            linear_rows(active, *self.linear(expert, "down"), y)

    def input_grads(self, expert: int, rows: slice, dy_nD: Tensor, dx_nD: Tensor) -> None:
        weights, here = self._weights[expert], self.at(expert, rows)
        (gate_RF, up_RF), (d_gate_RF, d_up_RF, active_RF) = self.of(expert)[:2], self.gradients(expert)
        saved, made = (gate_RF[here], up_RF[here]), (d_gate_RF[here], d_up_RF[here], active_RF[here])
        for dy, gate, up, d_gate, d_up, active, dx in blocks(dy_nD, *saved, *made, dx_nD):
            d_active, made_again = self.over(active)
            linear_grad_rows(dy, _weight(weights, "down"), d_active)
            swiglu_backward(d_active, gate, up, d_gate, d_up, made_again, self.use_triton, self._clamp)
            linear_grad_rows(d_gate, _weight(weights, "gate"), dx)
            # The second product sums into the first one's rows: no third pass over memory.
            add_linear_grad_rows(d_up, _weight(weights, "up"), dx)

    def add_weight_grads(self, expert: int, rows: slice, x_nD: Tensor, dy_nD: Tensor) -> None:
        here, sums, is_only = self.at(expert, rows), self._sums[expert], self.is_whole(expert, rows)
        is_last = not self.count_added(expert, rows)
        sums.add("down", self.gradients(expert)[2][here], dy_nD, is_only)
        if is_last:  # active rows go before the next product needs memory of its own, and so on
            self.release(expert, 2)
        sums.add("up", x_nD, self.gradients(expert)[1][here], is_only)
        if is_last:
            self.release(expert, 1)
        sums.add("gate", x_nD, self.gradients(expert)[0][here], is_only)


@dataclass(frozen=True)
class Opaque:
    """An expert of unknown mathematics: its function of rows [n, D], and the parameters that the function reads."""

    call: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor]


class OpaquePass:
    """Any function: each run keeps its own graph until the backward pass.

    Its products see one run of rows at a time, and autograd gives input and weight gradients together, so that weight
    gradients are summed run by run: between schedules all results agree up to rounding, not bit for bit. Recomputation
    around the layer does not free these graphs: it gives the same results, and saves no memory inside such experts.
    """

    def __init__(self, experts: Sequence[Opaque], keep_graph: bool) -> None:
        self.saved: list[Tensor] = []
        self.may_overwrite = False
        self.use_triton: bool | None = None
        self._experts = experts
        self._keep_graph = keep_graph
        self._graphs: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        self._grads: dict[int, list[Tensor | None]] = {}
        self._is_packed = False  # somebody's hooks around the pass change what is saved

    def compute(self, expert: int, rows: slice, x_nD: Tensor, y_nD: Tensor) -> None:
        if not self._keep_graph:
            y_nD.copy_(self._experts[expert].call(x_nD))
            return
        leaf_ND, around = x_nD.detach().clone().requires_grad_(), hooks_around()
        self._is_packed |= around is not None and around is not keep
        # Saved as they are: a surrounding recomputation must not unpack this graph's tensors.
        with (
            torch.enable_grad(),
            nullcontext() if around is None else torch.autograd.graph.saved_tensors_hooks(keep, keep),
        ):
            out_ND = self._experts[expert].call(leaf_ND)
        refuse_foreign(out_ND, [leaf_ND, *self._experts[expert].parameters])
        y_nD.copy_(out_ND.detach())
        self._graphs[expert, rows.start, rows.stop] = (leaf_ND, out_ND)

    def input_grads(self, expert: int, rows: slice, dy_nD: Tensor, dx_nD: Tensor) -> None:
        run, retain = (expert, rows.start, rows.stop), not self.may_overwrite
        leaf_ND, out_ND = self._graphs[run] if retain else self._graphs.pop(run)
        trained = [p for p in self._experts[expert].parameters if p.requires_grad]
        with hooks_off(trained):
            dx_ND, *grads = torch.autograd.grad(
                out_ND, [leaf_ND, *trained], dy_nD, retain_graph=retain, allow_unused=True
            )
        if self._is_packed:
            refuse_lost(out_ND, [p for p, grad in zip(trained, grads, strict=True) if grad is None])
        # None where the output does not depend on the rows: their sender waits for a gradient all the same.
        dx_nD.copy_(torch.zeros_like(dx_nD) if dx_ND is None else dx_ND)
        known = self._grads.get(expert, [None] * len(grads))
        self._grads[expert] = [sum_of(old, new) for old, new in zip(known, grads, strict=True)]

    def add_weight_grads(self, expert: int, rows: slice, x_nD: Tensor, dy_nD: Tensor) -> None:
        """Nothing: they came with the rows' own gradients."""

    def weight_grads(self, expert: int) -> list[Tensor | None]:
        parameters = self._experts[expert].parameters
        trained = [p for p in parameters if p.requires_grad]
        grads = dict(zip(map(id, trained), self._grads.pop(expert, [None] * len(trained)), strict=True))
        return [in_type_of(p, grads.get(id(p)), p.requires_grad) for p in parameters]

    def release_weights(self) -> None:
        """Nothing: the graphs hold the parameters."""

    def restore_weights(self, weights: Sequence[Tensor]) -> None:
        """Nothing."""


def _weight(weights: Weights, part: str) -> Tensor:
    weight = weights[f"{part}.weight"]
    assert weight is not None
    return weight
