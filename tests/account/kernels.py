"""Triton's kernels on meta tensors: each launch, and the bytes that its own text says it reads and writes.

Kernels that multiply tokens with the gate's weights count as products, as the library's would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.account.counting import Account


def gate_product(x_TD: Tensor, weight_ED: Tensor) -> tuple[int, int, int]:
    return len(x_TD), x_TD.shape[1], len(weight_ED)


Kernel = Callable[..., None]  # one launch: its name, what it reads, what it writes, and its product


def permute_kernels(one: Kernel) -> SimpleNamespace:
    def spread(x_TD: Tensor, row_of_choice_TK: Tensor, is_dropped_TK: Tensor | None, rows_ND: Tensor) -> None:
        one("spread", [x_TD, row_of_choice_TK, is_dropped_TK], [rows_ND])

    def weighted_spread(
        dy_TD: Tensor,
        rows_ND: Tensor,
        weights_TK: Tensor,
        row_of_choice_TK: Tensor,
        is_dropped_TK: Tensor | None,
        d_rows_ND: Tensor,
        d_weights_TK: Tensor | None,
    ) -> None:
        reads = [dy_TD, None if d_weights_TK is None else rows_ND, weights_TK, row_of_choice_TK, is_dropped_TK]
        one("weighted_spread", reads, [d_rows_ND, d_weights_TK])

    def weighted_collect(
        d_rows_ND: Tensor,
        x_TD: Tensor,
        weights_TK: Tensor,
        row_of_choice_TK: Tensor,
        is_dropped_TK: Tensor | None,
        dx_TD: Tensor,
        d_weights_TK: Tensor | None,
    ) -> None:
        reads = [d_rows_ND, None if d_weights_TK is None else x_TD, weights_TK, row_of_choice_TK, is_dropped_TK]
        one("weighted_collect", reads, [dx_TD, d_weights_TK])

    def collect(
        rows_ND: Tensor,
        weights_TK: Tensor | None,
        row_of_choice_TK: Tensor,
        is_dropped_TK: Tensor | None,
        added: Sequence[Tensor],
        y_TD: Tensor,
    ) -> None:
        one("collect", [rows_ND, weights_TK, row_of_choice_TK, is_dropped_TK, *added], [y_TD])

    return SimpleNamespace(
        spread=spread, weighted_spread=weighted_spread, weighted_collect=weighted_collect, collect=collect
    )


def activation_kernels(one: Kernel) -> SimpleNamespace:
    def swiglu(gate_nF: Tensor, up_nF: Tensor, active_nF: Tensor) -> None:
        one("swiglu", [gate_nF, up_nF], [active_nF])

    def gelu_backward(
        d_active_nF: Tensor, hidden_nF: Tensor, d_hidden_nF: Tensor, active_nF: Tensor | None, approximate: str
    ) -> None:
        one("gelu_backward", [d_active_nF, hidden_nF], [d_hidden_nF, active_nF])

    def swiglu_backward(
        d_active_nF: Tensor,
        gate_nF: Tensor,
        up_nF: Tensor,
        d_gate_nF: Tensor,
        d_up_nF: Tensor,
        active_nF: Tensor | None,
    ) -> None:
        one("swiglu_backward", [d_active_nF, gate_nF, up_nF], [d_gate_nF, d_up_nF, active_nF])

    return SimpleNamespace(swiglu=swiglu, gelu_backward=gelu_backward, swiglu_backward=swiglu_backward)


def gate_kernels(one: Kernel) -> SimpleNamespace:
    def logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        logits_TE = weight_ED.new_empty(len(x_TD), len(weight_ED))
        one("gate logits", [x_TD, weight_ED], [logits_TE], gate_product(x_TD, weight_ED))
        return logits_TE

    def routes(
        x_TD: Tensor,
        weight_ED: Tensor,
        bias_E: Tensor | None,
        is_used_T: Tensor | None,
        num_choices: int,
        is_softmax: bool,
        renormalizes: bool,
        noise_TE: Tensor | None = None,
        noise_from: int = 0,
    ) -> tuple[Tensor, ...]:
        logits_TE, scores_TE = (weight_ED.new_empty(len(x_TD), len(weight_ED)) for _ in range(2))
        weights_TK = weight_ED.new_empty(len(x_TD), num_choices)
        ids_TK = torch.empty_like(weights_TK, dtype=torch.int64)
        counts_KE = torch.zeros(num_choices, len(weight_ED), dtype=torch.int32, device=x_TD.device)
        made = logits_TE, scores_TE, weights_TK, ids_TK, counts_KE
        one("gate routes", [x_TD, weight_ED, bias_E, is_used_T, noise_TE], made, gate_product(x_TD, weight_ED))
        return made

    def logit_gradients(
        scores_TE: Tensor,
        ids_TK: Tensor,
        d_logits_TE: Tensor | None,
        d_scores_TE: Tensor | None,
        d_weights_TK: Tensor | None,
        rule: tuple[int, bool, bool],
    ) -> Tensor:
        whole_TE = torch.empty_like(scores_TE)
        one("logit gradients", [scores_TE, ids_TK, d_logits_TE, d_scores_TE, d_weights_TK], [whole_TE])
        return whole_TE

    def gradients(
        d_logits_TE: Tensor, x_TD: Tensor, weight_ED: Tensor, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        dx_TD = torch.empty_like(x_TD) if wanted[0] else None
        d_weight_ED = torch.empty_like(weight_ED) if wanted[1] else None
        product = gate_product(x_TD, weight_ED)
        if dx_TD is not None:
            one("gate's token gradients", [d_logits_TE, weight_ED], [dx_TD], product)
        if d_weight_ED is not None:
            one("gate's weight gradients", [d_logits_TE, x_TD], [d_weight_ED], product)
        return dx_TD, d_weight_ED

    return SimpleNamespace(logits=logits, routes=routes, logit_gradients=logit_gradients, gradients=gradients)


def sort_kernels(one: Kernel) -> SimpleNamespace:
    def sort_choices(ids_TK: Tensor, is_used_TK: Tensor | None, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
        rows = ids_TK.new_empty(ids_TK.numel()), torch.empty_like(ids_TK), ids_TK.new_zeros(num_experts)
        one("count", [ids_TK, is_used_TK], [])
        one("place", [ids_TK, is_used_TK], rows)
        return rows

    return SimpleNamespace(sort_choices=sort_choices)


def stand_ins(account: Account) -> dict[str, ModuleType]:
    """The modules of Triton kernels, each kernel one launch that reads and writes what it says."""
    one = account.kernel
    stands = {
        "permute": permute_kernels(one),
        "activation": activation_kernels(one),
        "gate": gate_kernels(one),
        "sort": sort_kernels(one),
    }
    package: Any = ModuleType("ds_moe_ep.kernels.compiled")
    named = {package.__name__: package}
    for name, stand in stands.items():
        setattr(package, name, stand)
        named[f"{package.__name__}.{name}"] = stand  # type: ignore[assignment]
    return named
