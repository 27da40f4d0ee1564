"""All experts of a group and known form at once: a product per matrix and piece, one per matrix for weight gradients.

1. A piece's rows of a group lie by expert, side by side (`layout.py`): forward and input gradients are grouped products
   over them. A rank's own experts are a group, and the copies in its slots another one.
2. Weight gradients need all rows by expert: one copy of each operand brings them there, none where there is one piece.
3. The matrices of the experts are read where they lie, as a tensor [L, ...]: an engine's flat buffer, a stacked
   parameter, and the slots hold them at equal distances. Where they lie apart each pass copies them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ds_moe_ep.comm.host_copies import to_device
from ds_moe_ep.kernels.activation import gelu, gelu_backward, swiglu, swiglu_backward
from ds_moe_ep.kernels.grouped import (
    Groups,
    add_of_expert,
    grouped_rows,
    grouped_sums,
    grouped_weights,
    lie_together,
)
from ds_moe_ep.moe.layout import Grouping
from ds_moe_ep.moe.match_expert import Form
from ds_moe_ep.moe.split_experts import ActiveRows, Weights

PARTS = {"gelu": ("up",), "swiglu": ("gate", "up")}  # whose outputs the activation reads


def named_tensors(weights: Sequence[Weights], name: str) -> list[Tensor]:
    """The tensor of this name of each expert that has one."""
    return [tensor for named in weights if (tensor := named.get(name)) is not None]


class GroupedPass:
    """One pass through all local experts, piece by piece; each group of them stands for one expert that has all rows.

    Saved for the backward pass, per piece: the rows before the activation, and as in `SavedActivations` the active
    rows of a recomputation.
    """

    def __init__(
        self, form: Form, weights: Sequence[Weights], groupings: Sequence[Grouping], device: torch.device
    ) -> None:
        """`groupings`: of each group, which has the next of the experts."""
        self._form, self._weights = form, weights
        self._ends = list(accumulate((len(grouping.rows_L) for grouping in groupings), initial=0))
        self._together: dict[tuple[int, str], Tensor] = {}
        self._names = [[name for name, weight in named.items() if weight is not None] for named in weights]
        self._trained = [
            {name for named in self._of(group) for name, w in named.items() if w is not None and w.requires_grad}
            for group in range(len(groupings))
        ]
        self._active = ActiveRows.of_this_pass(device.type == "cpu")
        by_group = [_groups_of(grouping, device) for grouping in groupings]
        self._all = [groups.pop(-1) for groups in by_group]
        self._groups = {first: groups for each in by_group for first, groups in each.items()}
        self._orders = [_row_order(grouping, device) for grouping in groupings]
        self.saved: list[Tensor] = []
        self.may_overwrite = False
        self.use_triton: bool | None = None
        self._piece_of: dict[int, int] = {}  # of a piece's first row: its place among the saved
        self._gradients: dict[int, list[Tensor]] = {}  # of hidden rows, then the active rows
        self._grads: dict[int, dict[str, Tensor]] = {}

    def _of(self, group: int) -> Sequence[Weights]:
        """The weights of the group's experts."""
        return self._weights[self._ends[group] : self._ends[group + 1]]

    def compute(self, group: int, rows: slice, x_nD: Tensor) -> Tensor:
        """The outputs of a piece's rows of a group."""
        groups, parts = self._groups[rows.start], PARTS[self._form.kind]
        hidden = [self._linear(group, part, x_nD, groups) for part in parts]
        active_nF = torch.empty_like(hidden[0])
        if self._form.kind == "gelu":
            gelu(hidden[0], active_nF, self._form.approximate)
        else:
            swiglu(hidden[0], hidden[1], active_nF, self.use_triton, self._form.clamp)
        self._piece_of[rows.start] = len(self._piece_of)
        self.saved += hidden
        if self._active is ActiveRows.SAVED:
            self.saved.append(active_nF)
        elif self._active is ActiveRows.SAVED_LATER:  # in their shape, without their memory
            self.saved.append(active_nF.new_empty(()).expand_as(active_nF))
        return self._linear(group, "down", active_nF, groups)

    def input_grads(self, group: int, rows: slice, dy_nD: Tensor) -> Tensor:
        """The gradient of the inputs of a piece's rows of a group."""
        groups, parts = self._groups[rows.start], PARTS[self._form.kind]
        per_piece = len(parts) + (self._active is not ActiveRows.MADE_AGAIN)
        first = self._piece_of[rows.start] * per_piece
        hidden, kept = self.saved[first : first + len(parts)], self.saved[first + len(parts) : first + per_piece]
        d_active_nF = grouped_rows(dy_nD, self._stacked(group, "down.weight"), groups)
        made_again = None if kept else d_active_nF
        d_hidden = hidden if self.may_overwrite else [torch.empty_like(each) for each in hidden]
        if self._form.kind == "gelu":
            gelu_backward(d_active_nF, hidden[0], d_hidden[0], made_again, self._form.approximate, self.use_triton)
        else:
            gate_nF, up_nF = hidden
            grads = d_hidden[0], d_hidden[1], made_again
            swiglu_backward(d_active_nF, gate_nF, up_nF, *grads, self.use_triton, self._form.clamp)
        self._gradients[rows.start] = [*d_hidden, *(kept or [d_active_nF])]
        dx_nD, *others = (
            grouped_rows(each, self._stacked(group, f"{part}.weight"), groups)
            for part, each in zip(parts, d_hidden, strict=True)
        )
        for other in others:
            dx_nD += other
        return dx_nD

    def add_weight_grads(self, group: int, rows: slice, x_RD: Tensor, dy_RD: Tensor) -> None:
        """Makes the gradients of all parameters of a group's experts from all its rows; behind the rows' own ones."""
        self.saved = []
        firsts = sorted(first for first in self._gradients if rows.start <= first < rows.stop)
        made = [self._gradients.pop(first) for first in firsts]  # in the order of the rows
        active = [each.pop() for each in made]
        self._make(group, "down", self._by_expert(group, active), self._by_expert(group, [dy_RD]))
        del active
        x_RD = self._by_expert(group, [x_RD])
        for index, part in enumerate(PARTS[self._form.kind]):
            self._make(group, part, x_RD, self._by_expert(group, [each[index] for each in made]))

    def weight_grads(self, group: int) -> list[Tensor | None]:
        """The gradients of a group, expert by expert, in the order of their parameters."""
        grads, trained = self._grads.pop(group, {}), self._trained[group]
        return [
            grads[name][local] if name in grads else torch.zeros_like(weight) if name in trained else None
            for local, named in enumerate(self._of(group))
            for name, weight in named.items()
            if weight is not None
        ]

    def release_weights(self) -> None:
        """Forgets the weights between forward and backward."""
        self._weights, self._together = [], {}

    def restore_weights(self, weights: Sequence[Tensor]) -> None:
        """Takes the weights back, in the order of the experts' parameters."""
        rest, self._together = iter(weights), {}
        self._weights = [dict(zip(names, rest, strict=False)) for names in self._names]

    def _stacked(self, group: int, name: str) -> Tensor:
        """The tensors of this name of a group's experts [L, ...], where they lie or, apart, as a copy."""
        if (known := self._together.get((group, name))) is None:
            tensors = named_tensors(self._of(group), name)
            together = lie_together(tensors)
            known = torch.stack([tensor.detach() for tensor in tensors]) if together is None else together
            self._together[group, name] = known
        return known

    def _linear(self, group: int, part: str, x_nI: Tensor, groups: Groups) -> Tensor:
        y_nO = grouped_rows(x_nI, self._stacked(group, f"{part}.weight").transpose(1, 2), groups)
        if f"{part}.bias" in self._names[0]:
            add_of_expert(y_nO, self._stacked(group, f"{part}.bias"), groups)
        return y_nO

    def _by_expert(self, group: int, pieces: Sequence[Tensor]) -> Tensor:
        """Rows of all pieces, given one by one or side by side, in the order by expert."""
        order_R = self._orders[group]
        if order_R is None:
            return pieces[0]
        rows_RC, start = pieces[0].new_empty(len(order_R), pieces[0].shape[1]), 0
        for piece_nC in pieces:
            rows_RC.index_copy_(0, order_R[start : start + len(piece_nC)], piece_nC)
            start += len(piece_nC)
        return rows_RC

    def _make(self, group: int, part: str, x_RI: Tensor, dy_RO: Tensor) -> None:
        grads = self._grads.setdefault(group, {})
        if (name := f"{part}.weight") in self._trained[group]:
            grads[name] = grouped_weights(dy_RO, x_RI, self._all[group])
        if (name := f"{part}.bias") in self._trained[group]:
            grads[name] = grouped_sums(dy_RO, self._all[group])


def _groups_of(grouping: Grouping, device: torch.device) -> dict[int, Groups]:
    """The groups of each piece by its first row, and of all rows under -1; one copy to the device."""
    rows = {**grouping.rows_of_piece, -1: grouping.rows_L}
    ends = [end for rows_L in rows.values() for end in accumulate(rows_L)]
    ends_PL = to_device(ends, device).to(torch.int32).view(len(rows), -1)
    return {first: Groups(rows_L, ends_L) for (first, rows_L), ends_L in zip(rows.items(), ends_PL, strict=True)}


def _row_order(grouping: Grouping, device: torch.device) -> Tensor | None:
    """The place of each stacked row in the order by expert; None where it is the same."""
    if not grouping.moves:
        return None
    columns = to_device([value for column in zip(*grouping.moves, strict=True) for value in column], device).view(3, -1)
    num_rows = sum(grouping.rows_L)
    behind_R = torch.repeat_interleave(columns[1] - columns[0], columns[2], output_size=num_rows)
    return behind_R + torch.arange(num_rows, device=device)


def start_grouped(form: Form, weights: Sequence[Weights], groupings: Sequence[Grouping]) -> GroupedPass:
    """A grouped pass over experts of a form; each group has the next of them."""
    return GroupedPass(form, weights, groupings, named_tensors(weights, "up.weight")[0].device)
