"""AutoEP's layer, hooked: DeepSpeed's replacement of a Hugging Face block, with the package's traffic.

Router, shared experts, counters and the output's shape stay AutoEP's. The exchange runs inside of the call of its
`GroupedExperts`, so that whatever hangs on that module still happens: ZeRO-3 gathers its parameters before the call,
and before the backward pass through it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.ep_experts import GroupedExperts, apply_expert_activation
from torch import Tensor

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.engine import seams
from ds_moe_ep.engine.hooks.autoep_bias import AutoEPBias
from ds_moe_ep.engine.hooks.layer import HookedLayer, check_width, copied, refuse_pickling, restore_class, swap_class
from ds_moe_ep.engine.hooks.replayed import sent_by
from ds_moe_ep.engine.layouts.tensor import refuse_unlike, tensor_ranks_of
from ds_moe_ep.errors import EngineError
from ds_moe_ep.kernels.activation import Clamp
from ds_moe_ep.kernels.eager import not_compiled
from ds_moe_ep.moe.experts import OpaqueExperts, autocast_type, known_experts
from ds_moe_ep.moe.match_expert import Form
from ds_moe_ep.moe.replicas.replicas import Known
from ds_moe_ep.moe.routes import Routes
from ds_moe_ep.moe.split_experts import Opaque, Weights
from ds_moe_ep.moe.tensor_parallel.early import EarlyGather

SWIGLU = Form("swiglu", {"gate": "w1", "up": "w3", "down": "w2"})


class HookedAutoEP(HookedLayer):
    """`AutoEPMoELayer` with the package's traffic."""

    def __init__(
        self, name: str, layer: AutoEPMoELayer, traffic: Mapping[str, Any], balance: Mapping[str, Any]
    ) -> None:
        config = MoEConfig(
            num_experts=layer.num_experts,
            ep_size=layer.ep_size,
            top_k=layer.top_k,
            score=layer.router.score_func,
            renormalize=layer.router.route_norm,
            **traffic,
            **balance,
        )
        super().__init__("AutoEPMoELayer", name, config)
        self.group = layer.ep_group
        self._layer = layer
        self.bias: AutoEPBias | None = None

    @property
    def balance(self) -> AutoEPBias | None:
        return self.bias

    def problem_of_balance(self) -> str:
        return AutoEPBias.problem_of(self._layer) if self.config.has_bias else ""

    @staticmethod
    def problem_of(layer: AutoEPMoELayer) -> str:
        """Why the layer cannot be hooked, or an empty string."""
        missing = seams.missing_of(layer, seams.AUTOEP_NAMES, [seams.LATER["AutoEP"].since])
        if missing:
            return missing
        if isinstance(layer, OverlappedAutoEP):
            return "it is hooked already; call the handle's remove() first"
        experts = layer.experts
        for module, cls in ((layer, AutoEPMoELayer), (experts, GroupedExperts)):
            if type(module) is not cls or {"forward", "_forward"} & set(vars(module)):
                return f"its {cls.__name__} is a {type(module).__name__} with a forward of its own; hook plain layers"
        if layer.comm_backend != "comm":
            return f'comm_backend="{layer.comm_backend}" moves its own rows; set comm_backend to "comm"'
        if layer.async_split_plan:
            return "async_split_plan=true plans rows that the hooks plan themselves; leave it out"
        if layer.ep_group is None and layer.ep_size > 1:
            return "it has no expert-parallel group yet; call deepspeed.initialize first"
        return ""

    def known_experts(self) -> Known | None:
        experts = self._layer.experts
        form = form_of(experts)
        return (form, weights_of(experts)) if form else None

    def share_tokens(self, layer: AutoEPMoELayer) -> None:
        self.tensor_ranks = tensor_ranks_of(layer, self.config)
        if self.tensor_ranks.has_own_tokens:
            raise EngineError(
                f"{self.dispatcher.name}: moe_ep.sequence_parallel=true for a layer of AutoEP's, which DeepSpeed folds "
                "over tensor ranks with whole sequences alone; leave it out"
            )
        refuse_unlike(self.tensor_ranks, layer.router, self.dispatcher.name)

    def attach(self) -> None:
        if self.config.has_bias:
            self.bias = AutoEPBias(self._layer, self.config.bias_step)
        swap_class(self._layer.experts, OverlappedGroupedExperts, self)
        swap_class(self._layer, OverlappedAutoEP, self)
        # AutoEP's own exchange makes these gradients too large by the number of tensor ranks, which DeepSpeed takes
        # back but for parameters with this mark. Here they are right as they are.
        self.mark_experts(self._layer.experts)

    def remove(self) -> None:
        self.unmark_experts()
        restore_class(self._layer, AutoEPMoELayer)
        restore_class(self._layer.experts, GroupedExperts)


def form_of(experts: GroupedExperts) -> Form | None:
    """The form of AutoEP's experts; None of an activation that is not known here."""
    if experts.activation == "swiglu_oai":
        return replace(SWIGLU, clamp=Clamp(experts.activation_alpha, experts.activation_limit))
    return SWIGLU if experts.activation == "swiglu" else None


def weights_of(experts: GroupedExperts) -> list[Weights]:
    """The weights of each expert by part, views of AutoEP's stacks."""
    parts = {"gate.weight": experts.w1, "up.weight": experts.w3, "down.weight": experts.w2}
    each = zip(*(stack.unbind() for stack in parts.values()), strict=True)
    return [dict(zip(parts, tensors, strict=True)) for tensors in each]


class OverlappedAutoEP(AutoEPMoELayer):
    """`AutoEPMoELayer` whose exchange is a schedule."""

    overlap: HookedAutoEP

    __deepcopy__, __reduce_ex__ = copied, refuse_pickling

    @not_compiled
    def _forward(self, hidden_states: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The output that AutoEP's forward returns for [B, S, D]. Collective over the expert group."""
        hooked = self.overlap
        with hooked.dispatcher.announcing(hidden_states.device, self.training):
            check_width(hidden_states, self.hidden_size, hooked.dispatcher.name)
            x_TD = hidden_states.reshape(-1, self.hidden_size)
            hooked.tensor_ranks.compare(x_TD, hooked.dispatcher.name)
            with sent_by(self.router, hooked.chosen(x_TD), hooked.dispatcher.name):
                weights_TK, expert_ids_TK, counts_E = self.router(x_TD, self.expert_bias)
        with torch.no_grad():
            self.tokens_per_expert.add_(counts_E)
        hooked.last_counts_E = counts_E.to(torch.int64)
        if hooked.bias is not None and self.training:
            hooked.bias.observe(counts_E)
        routes = Routes(expert_ids_TK=expert_ids_TK, weights_TK=weights_TK, weighs_rows=self.score_apply == "pre")
        if hooked.tape is not None:
            hooked.tape.take(routes)
        y_TD = self.experts(x_TD, routes)
        output: Tensor | tuple[Tensor, Tensor] = self._finalize_output(
            y_TD.reshape(hidden_states.shape), x_TD, hidden_states, self.hidden_size
        )
        return output


class OverlappedGroupedExperts(GroupedExperts):
    """`GroupedExperts` that rows travel to: its call is the whole way from tokens to tokens."""

    overlap: HookedAutoEP

    __deepcopy__, __reduce_ex__ = copied, refuse_pickling

    def forward(self, x_TD: Tensor, routes: Routes) -> Tensor:
        """The weighted results [T, D]."""
        tensor = self.overlap.tensor_ranks
        early = tensor.early_gather(len(x_TD))
        share_TD, routes = tensor.cut(x_TD, routes, early)
        return tensor.gather(self._through_experts(share_TD, routes, early), len(x_TD), early)

    def _through_experts(self, x_TD: Tensor, routes: Routes, early: EarlyGather | None) -> Tensor:
        form = form_of(self)
        by_hand = form and known_experts(form, weights_of(self), x_TD)
        if by_hand:
            return self.overlap.dispatcher(by_hand[0], routes, by_hand[1], self.training, early=early)[0]
        each = zip(self.w1.unbind(), self.w3.unbind(), self.w2.unbind(), strict=True)
        opaque = OpaqueExperts([Opaque(partial(self._call, weights), weights) for weights in each])
        y_TD, _ = self.overlap.dispatcher(x_TD, routes, opaque, self.training, early=early)
        return y_TD.to(autocast_type(x_TD, self.w1) or x_TD.dtype)  # they end in a product

    def _call(self, weights: tuple[Tensor, Tensor, Tensor], rows_nD: Tensor) -> Tensor:
        """One expert as AutoEP computes it."""
        gate, up, down = (weight.to(rows_nD.dtype).t() for weight in weights)
        kind = (self.activation, self.activation_alpha, self.activation_limit)
        y_nD: Tensor = apply_expert_activation(rows_nD @ gate, rows_nD @ up, *kind, fused=rows_nD.is_cuda) @ down
        return y_nD
