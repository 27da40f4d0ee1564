"""One pass of a layer by a blocking path that shares nothing with the layer's own: no schedule, no lanes, no kernels.

1. Choices are sorted by expert, and counts are exchanged.
2. Rows go out and come back in one all-to-all each, over DeepSpeed's own group; nothing else runs meanwhile.
3. Each expert is called once with all its rows, in a wide type, and autograd goes back through all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.engine.views.layers import ViewedLayer
from ds_moe_ep.engine.views.moved import SEED, ExactAndMoved, moved
from ds_moe_ep.engine.views.observe import ObservedPass
from ds_moe_ep.engine.views.shares import of_all_shares, own_shares

Weights = Mapping[str, Tensor]


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which rounding of `dtype` does not show."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.float64


class _Exchange(torch.autograd.Function):
    """One all-to-all of rows, and its way back."""

    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, send_P: list[int], receive_P: list[int], group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.sizes, ctx.group = (send_P, receive_P), group
        return _all_to_all(rows_ND, send_P, receive_P, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        send_P, receive_P = ctx.sizes
        return _all_to_all(gradients[0], receive_P, send_P, ctx.group), None, None, None


def _all_to_all(rows_ND: Tensor, send_P: list[int], receive_P: list[int], group: dist.ProcessGroup | None) -> Tensor:
    if group is None:
        return rows_ND.clone()
    received_RD = rows_ND.new_empty(sum(receive_P), rows_ND.shape[1])
    dist.all_to_all_single(received_RD, rows_ND.contiguous(), receive_P, send_P, group=group)
    return received_RD


@dataclass
class BlockingPass:
    """Results of a blocking pass on this rank: output, and gradients of rows, weights [T, K] and local experts."""

    y_TD: ExactAndMoved
    dx_TD: ExactAndMoved
    dweights_TK: ExactAndMoved
    experts: list[dict[str, ExactAndMoved]]


def blocking_pass(layer: ViewedLayer, whole: ObservedPass) -> BlockingPass:
    """The pass computed again, exactly and moved by rounding. Collective over the layer's group; it blocks.

    Of tensor ranks each takes its own tokens, and all get the results of all: collective over them too.
    """
    (seen,) = own_shares(layer.tensor_ranks, [whole])
    generator = torch.Generator(seen.x_TD.device).manual_seed(SEED)
    wide = wide_type(seen.type)
    weights = [
        {name: each.of(each.parameter).detach().to(wide) for name, each in layer.expert_tensors(local).items()}
        for local in range(layer.num_local)
    ]
    exact = _pass(layer, seen, weights, None)
    other = _pass(layer, seen, weights, generator)
    y_TD, dx_TD, dweights_TK, *rest = [
        ExactAndMoved(one, moved(two, seen.type, generator)) for one, two in zip(exact, other, strict=True)
    ]
    left = iter(rest)
    ranks, experts = layer.tensor_ranks, [{name: next(left) for name in theirs} for theirs in weights]
    y_TD, dx_TD, dweights_TK = (of_all_shares(ranks, whole, each) for each in (y_TD, dx_TD, dweights_TK))
    return BlockingPass(y_TD, dx_TD, dweights_TK, experts)


def _pass(
    layer: ViewedLayer, seen: ObservedPass, weights: list[dict[str, Tensor]], generator: torch.Generator | None
) -> list[Tensor]:
    """Output, and gradients of rows, routing weights and each expert's tensors."""
    assert seen.weights_TK is not None and seen.dy_TD is not None

    def step(values: Tensor) -> Tensor:
        values = values.to(wide_type(seen.type))
        return values.clone() if generator is None else moved(values, seen.type, generator)

    x_TD, weights_TK = step(seen.x_TD).requires_grad_(), step(seen.weights_TK).requires_grad_()
    leaves = [{name: step(weight).requires_grad_() for name, weight in theirs.items()} for theirs in weights]
    wanted = [x_TD, weights_TK, *(leaf for theirs in leaves for leaf in theirs.values())]
    with torch.enable_grad(), torch.autocast(x_TD.device.type, enabled=False):
        y_TD = _through(layer, seen, x_TD, weights_TK, leaves)
        found = torch.autograd.grad(y_TD, wanted, step(seen.dy_TD), allow_unused=True)
    gradients = [torch.zeros_like(leaf) if each is None else each for leaf, each in zip(wanted, found, strict=True)]
    return [y_TD.detach(), *gradients]


def _through(
    layer: ViewedLayer, seen: ObservedPass, x_TD: Tensor, weights_TK: Tensor, leaves: list[dict[str, Tensor]]
) -> Tensor:
    """Tokens through their experts and back, weighted and summed."""
    assert seen.ids_TK is not None and seen.kept_TK is not None
    tokens_N, choices_N = seen.kept_TK.nonzero().unbind(1)
    order_N = seen.ids_TK[tokens_N, choices_N].argsort(stable=True)
    tokens_N, choices_N = tokens_N[order_N], choices_N[order_N]
    counts_E = torch.bincount(seen.ids_TK[tokens_N, choices_N], minlength=layer.num_experts)
    counts_PL = _exchanged_counts(layer, counts_E)
    send_P = counts_E.view(-1, layer.num_local).sum(1).tolist()
    receive_P = counts_PL.sum(1).tolist()
    weight_N1 = weights_TK[tokens_N, choices_N][:, None]
    rows_ND = x_TD[tokens_N] * weight_N1 if layer.weighs_rows else x_TD[tokens_N]
    received_RD = _Exchange.apply(rows_ND, send_P, receive_P, layer.group)  # type: ignore[no-untyped-call]
    expert_R = torch.arange(layer.num_local, device=x_TD.device).repeat(len(receive_P))
    expert_R = expert_R.repeat_interleave(counts_PL.flatten())
    by_expert_R = expert_R.argsort(stable=True)
    sorted_RD = received_RD[by_expert_R].split(counts_PL.sum(0).tolist())
    results_RD = torch.cat([layer.compute(weights, rows) for weights, rows in zip(leaves, sorted_RD, strict=True)])
    back_RD = torch.zeros_like(received_RD).index_copy(0, by_expert_R, results_RD)
    back_ND = _Exchange.apply(back_RD, receive_P, send_P, layer.group)  # type: ignore[no-untyped-call]
    back_ND = back_ND if layer.weighs_rows else back_ND * weight_N1
    return torch.zeros_like(x_TD).index_add(0, tokens_N, back_ND)


def _exchanged_counts(layer: ViewedLayer, counts_E: Tensor) -> Tensor:
    """Rows that each rank of the group sends to each local expert [P, L]."""
    counts_PL = counts_E.view(-1, layer.num_local).contiguous()
    if layer.group is None:
        return counts_PL
    received_PL = torch.empty_like(counts_PL)
    dist.all_to_all_single(received_PL, counts_PL, group=layer.group)
    return received_PL
