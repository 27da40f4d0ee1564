"""The mathematics of experts, forward and backward, on stacked rows.

A pass holds the stacked intermediate rows of all local experts. It computes any run of rows of one expert, forward or
backward, in any order; weight gradients are summed over blocks of rows that no schedule changes, in one order, so that
they do not depend on how the rows arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_moe_ep.errors import EngineError
from ds_moe_ep.kernels.linear import linear_grad_rows, linear_rows

Weights = dict[str, Tensor | None]
Span = tuple[int, int]  # start, stop

BLOCK_ROWS = 512  # on the CPU: fewer cost more in small products than they save, more need more memory in between


class ExpertPass(Protocol):
    """One pass through the local experts. `rows` is a slice of the stacked rows, all of one expert."""

    saved: list[Tensor]  # what the backward pass reads; the autograd function stores it in between
    may_overwrite: bool  # whether the backward pass may use `saved` up: nobody else will read it

    def compute(self, expert: int, rows: slice, x_nD: Tensor, y_nD: Tensor) -> None:
        """Writes the outputs of these rows of the expert."""

    def input_grads(self, expert: int, rows: slice, dy_nD: Tensor, dx_nD: Tensor) -> None:
        """Writes the gradient of the inputs of these rows of the expert."""

    def add_weight_grads(self, expert: int, rows: slice, x_nD: Tensor, dy_nD: Tensor) -> None:
        """Adds the part of these rows to the gradients of the expert's parameters; after the rows' own gradients."""

    def let_go(self) -> None:
        """Forgets the weights between forward and backward: only what the autograd function saves can be freed then."""

    def take_weights(self, weights: Sequence[Tensor]) -> None:
        """Takes the weights back, in the order of the experts' parameters."""

    def weight_grads(self, expert: int) -> list[Tensor | None]:
        """The sums, in the order of the expert's parameters; once, after the parts of all its rows, each added once."""


class KeptRows:
    """The rows that each expert keeps from the forward to the backward pass: `num_kept` tensors [rows, F] an expert.

    A tensor an expert and not one for all: blocks stay small enough for the allocator to keep, and each expert's
    rows are given back with the last product that reads them.
    """

    def __init__(self, weights: Sequence[Weights], spans: Sequence[Span], num_kept: int) -> None:
        self._weights = weights
        self._sums: list[GradSums] = [GradSums(named) for named in weights]
        width_like_FD = _weight(weights[0], "up")
        self._spans = spans
        self._num_kept = num_kept
        self._num_added = [0] * len(spans)  # rows whose part of the weight gradients was added
        width = len(width_like_FD)
        self.saved = [width_like_FD.new_empty(stop - start, width) for start, stop in spans for _ in range(num_kept)]
        self.may_overwrite = False
        self._gradients: dict[int, list[Tensor]] = {}
        self._names = [[name for name, weight in named.items() if weight is not None] for named in weights]

    def let_go(self) -> None:
        """Forgets the weights; ZeRO-3 frees them, and recomputation makes them anew."""
        self.take_weights([])

    def take_weights(self, weights: Sequence[Tensor]) -> None:
        """Takes the weights back, in the order of `expert_parameters`."""
        rest = iter(weights)
        self._weights = [dict(zip(names, rest, strict=False)) for names in self._names] if weights else []
        for sums, named in zip(self._sums, self._weights or [{} for _ in self._sums], strict=True):
            sums.weights = named

    def of(self, expert: int) -> list[Tensor]:
        """All rows that the expert keeps."""
        return self.saved[expert * self._num_kept : (expert + 1) * self._num_kept]

    def at(self, expert: int, rows: slice) -> slice:
        """The place of stacked rows among those of their expert."""
        start, _ = self._spans[expert]
        return slice(rows.start - start, rows.stop - start)

    def gradients(self, expert: int, num: int) -> list[Tensor]:
        """Where the gradients of the expert's first `num` kept tensors go: over them, where that is allowed."""
        if expert not in self._gradients:
            kept = self.of(expert)[:num]
            self._gradients[expert] = kept if self.may_overwrite else [torch.empty_like(rows) for rows in kept]
        return self._gradients[expert]

    def is_last(self, expert: int, rows: slice) -> bool:
        """Whether these rows, whose part is being added to the weight gradients, are the last ones of the expert."""
        self._num_added[expert] += rows.stop - rows.start
        start, stop = self._spans[expert]
        return self._num_added[expert] == stop - start

    def release(self, expert: int, kept: int) -> None:
        """Gives one of the expert's kept tensors back, and its gradient."""
        index = expert * self._num_kept + kept
        nothing = self.saved[index] = self.saved[index].new_empty(0)
        if kept < len(gradients := self._gradients.get(expert, [])):
            gradients[kept] = nothing

    def weight_grads(self, expert: int) -> list[Tensor | None]:
        """The sums of the expert's weight gradients; its rows are not kept any longer."""
        for kept in range(self._num_kept):
            self.release(expert, kept)
        self._gradients.pop(expert, None)
        self._num_added[expert] = 0
        return self._sums[expert].take()


class GradSums:
    """The gradients of one expert's weights, summed block by block, at least in fp32. None for what is frozen."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self._trained = {name for name, weight in weights.items() if weight is not None and weight.requires_grad}
        self._sums: dict[str, Tensor | None] = {}

    def add(self, part: str, x_nI: Tensor, dy_nO: Tensor) -> None:
        """Adds the gradients of one Linear's weight and bias, from rows of its inputs and its outputs' gradient."""
        if not len(x_nI):
            return
        for name in (f"{part}.weight", f"{part}.bias"):
            weight = self.weights.get(name)
            if weight is None or name not in self._trained:
                continue
            total = self._sums.get(name)
            if total is not None and name.endswith("weight") and weight.dtype == total.dtype == _summed_in(weight):
                total.addmm_(dy_nO.t(), x_nI)
            else:
                self._sums[name] = _sum(total, dy_nO.sum(0) if name.endswith("bias") else dy_nO.t() @ x_nI)

    def take(self) -> list[Tensor | None]:
        """The sums in the weights' own type and order."""
        sums, self._sums = self._sums, {}
        return [
            _in_type_of(w, sums.get(name), name in self._trained) for name, w in self.weights.items() if w is not None
        ]


def _summed_in(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _in_type_of(weight: Tensor, grad: Tensor | None, is_trained: bool) -> Tensor | None:
    """A parameter's gradient in its own type: zeros where no row gave one, None where it is frozen."""
    if grad is not None:
        return grad.to(weight.dtype)
    return torch.zeros_like(weight) if is_trained else None


def blocks(*rows: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The tensors cut alike, on the CPU, by at most BLOCK_ROWS rows: what lies between products stays small."""
    num_blocks = -(-len(rows[0]) // BLOCK_ROWS) if rows[0].is_cpu else 1
    return [rows] if num_blocks <= 1 else zip(*(tensor.tensor_split(num_blocks) for tensor in rows), strict=True)


class GeluPass(KeptRows):
    """down(gelu(up(x))): keeps the rows before and after the activation."""

    def __init__(self, weights: Sequence[Weights], spans: Sequence[Span], approximate: str) -> None:
        super().__init__(weights, spans, 2)  # hidden rows, active rows
        self._approximate = approximate

    def compute(self, expert: int, rows: slice, x_nD: Tensor, y_nD: Tensor) -> None:
        weights, here = self._weights[expert], self.at(expert, rows)
        up, down = _weight(weights, "up"), _weight(weights, "down")
        hidden_nF, active_nF = (rows_RF[here] for rows_RF in self.of(expert))
        linear_rows(x_nD, up, weights.get("up.bias"), hidden_nF)
        torch.ops.aten.gelu.out(hidden_nF, approximate=self._approximate, out=active_nF)
        linear_rows(active_nF, down, weights.get("down.bias"), y_nD)

    def input_grads(self, expert: int, rows: slice, dy_nD: Tensor, dx_nD: Tensor) -> None:
        weights, here = self._weights[expert], self.at(expert, rows)
        up, down = _weight(weights, "up"), _weight(weights, "down")
        hidden_RF, (d_hidden_RF,) = self.of(expert)[0], self.gradients(expert, 1)
        for dy, hidden, d_hidden, dx in blocks(dy_nD, hidden_RF[here], d_hidden_RF[here], dx_nD):
            d_active = torch.empty_like(hidden)
            linear_grad_rows(dy, down, d_active)
            torch.ops.aten.gelu_backward.grad_input(
                d_active, hidden, approximate=self._approximate, grad_input=d_hidden
            )
            linear_grad_rows(d_hidden, up, dx)

    def add_weight_grads(self, expert: int, rows: slice, x_nD: Tensor, dy_nD: Tensor) -> None:
        here, sums, is_last = self.at(expert, rows), self._sums[expert], self.is_last(expert, rows)
        sums.add("down", self.of(expert)[1][here], dy_nD)
        if is_last:
            self.release(expert, 1)
        sums.add("up", x_nD, self.gradients(expert, 1)[0][here])


class SwiGLUPass(KeptRows):
    """down(silu(gate(x)) * up(x)): keeps gate rows, up rows and their product."""

    def __init__(self, weights: Sequence[Weights], spans: Sequence[Span]) -> None:
        super().__init__(weights, spans, 3)  # gate rows, up rows, active rows

    def compute(self, expert: int, rows: slice, x_nD: Tensor, y_nD: Tensor) -> None:
        weights, here = self._weights[expert], self.at(expert, rows)
        gate_RF, up_RF, active_RF = self.of(expert)
        for x, gate, up, active, y in blocks(x_nD, gate_RF[here], up_RF[here], active_RF[here], y_nD):
            linear_rows(x, _weight(weights, "gate"), weights.get("gate.bias"), gate)
            linear_rows(x, _weight(weights, "up"), weights.get("up.bias"), up)
            torch.mul(F.silu(gate), up, out=active)
            linear_rows(active, _weight(weights, "down"), weights.get("down.bias"), y)

    def input_grads(self, expert: int, rows: slice, dy_nD: Tensor, dx_nD: Tensor) -> None:
        weights, here = self._weights[expert], self.at(expert, rows)
        (gate_RF, up_RF, _), (d_gate_RF, d_up_RF) = self.of(expert), self.gradients(expert, 2)
        cut = blocks(dy_nD, gate_RF[here], up_RF[here], d_gate_RF[here], d_up_RF[here], dx_nD)
        for dy, gate, up, d_gate, d_up, dx in cut:
            d_active = torch.empty_like(gate)
            linear_grad_rows(dy, _weight(weights, "down"), d_active)
            through_up = d_active * F.silu(gate)
            d_silu = d_active.mul_(up)  # the last use of `up`, which `d_up` may lie over
            d_up.copy_(through_up)
            torch.ops.aten.silu_backward.grad_input(d_silu, gate, grad_input=d_gate)
            linear_grad_rows(d_gate, _weight(weights, "gate"), dx)
            dx_through_up = torch.empty_like(dx)
            linear_grad_rows(d_up, _weight(weights, "up"), dx_through_up)
            dx += dx_through_up

    def add_weight_grads(self, expert: int, rows: slice, x_nD: Tensor, dy_nD: Tensor) -> None:
        here, sums, is_last = self.at(expert, rows), self._sums[expert], self.is_last(expert, rows)
        sums.add("down", self.of(expert)[2][here], dy_nD)
        if is_last:
            self.release(expert, 2)
        sums.add("up", x_nD, self.gradients(expert, 2)[1][here])
        if is_last:
            self.release(expert, 1)
        sums.add("gate", x_nD, self.gradients(expert, 2)[0][here])


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
        self._experts = experts
        self._keep_graph = keep_graph
        self._graphs: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        self._grads: dict[int, list[Tensor | None]] = {}

    def compute(self, expert: int, rows: slice, x_nD: Tensor, y_nD: Tensor) -> None:
        if not self._keep_graph:
            y_nD.copy_(self._experts[expert].call(x_nD))
            return
        leaf_ND = x_nD.detach().clone().requires_grad_()
        # Saved as they are: a surrounding recomputation must not unpack this graph's tensors.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, keep):
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
        dx_nD.copy_(torch.zeros_like(dx_nD) if dx_ND is None else dx_ND)
        known = self._grads.get(expert, [None] * len(grads))
        self._grads[expert] = [_sum(old, new) for old, new in zip(known, grads, strict=True)]

    def add_weight_grads(self, expert: int, rows: slice, x_nD: Tensor, dy_nD: Tensor) -> None:
        """Nothing: they came with the rows' own gradients."""

    def weight_grads(self, expert: int) -> list[Tensor | None]:
        parameters = self._experts[expert].parameters
        trained = [p for p in parameters if p.requires_grad]
        grads = dict(zip(map(id, trained), self._grads.pop(expert, [None] * len(trained)), strict=True))
        return [_in_type_of(p, grads.get(id(p)), p.requires_grad) for p in parameters]

    def let_go(self) -> None:
        """Nothing: the graphs hold the parameters."""

    def take_weights(self, weights: Sequence[Tensor]) -> None:
        """Nothing."""


def refuse_foreign(output: Tensor, known: Sequence[Tensor]) -> None:
    """Raises EngineError where the output's graph reaches a tensor that needs a gradient and is none of the known.

    An expert's gradients travel as those of its rows and of its parameters: another tensor's would be lost in silence.
    """
    ends = {node for tensor in known if tensor.requires_grad if (node := gradient_edge(tensor)) is not None}
    nodes, seen = [output.grad_fn], set(ends)
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            raise EngineError(
                f"an expert reads a tensor of shape {tuple(leaf.shape)} that needs a gradient and is no parameter of "
                "it, so that its gradient would be lost: register it on the expert (nn.Parameter), or detach it"
            )
        nodes.extend(next_node for next_node, _ in node.next_functions)


def gradient_edge(tensor: Tensor) -> Any:
    """The node of autograd's graph at which a tensor's gradient arrives."""
    return torch.autograd.graph.get_gradient_edge(tensor).node


@contextmanager
def hooks_off(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Keeps the parameters' hooks for the outer backward pass, which calls them once, with the whole gradient."""
    kept = [(parameter, parameter._backward_hooks) for parameter in parameters if parameter._backward_hooks]
    for parameter, _ in kept:
        parameter._backward_hooks = None
    try:
        yield
    finally:
        for parameter, hooks in kept:
            parameter._backward_hooks = hooks


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """The sum of two parts of a gradient, at least in fp32: in bf16 every part would cost a rounding."""
    if total is None or part is None:
        return part if total is None else total
    return total.to(torch.promote_types(total.dtype, torch.float32)) + part


def keep(tensor: Tensor) -> Tensor:
    """A saved tensor as it is: for graphs of our own, whose tensors a surrounding recomputation must not unpack."""
    return tensor


def _weight(weights: Weights, part: str) -> Tensor:
    weight = weights[f"{part}.weight"]
    assert weight is not None
    return weight
