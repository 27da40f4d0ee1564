"""DeepSpeed's own layer, hooked: its gate says who visits whom, the dispatcher moves the rows.

The gate (`TopKGate`) is called as DeepSpeed calls it, its losses and counters are handed on, and its sparse routes are
read. With a capacity, padded rows travel as DeepSpeed sends them; a dropless gate pads every expert to the fullest one
of all ranks, which is not sent here, and so the ranks need not ask each other for it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from deepspeed.moe.experts import Experts
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from deepspeed.moe.sharded_moe import MOELayer, TopKGate
from torch import Tensor, nn

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.engine import seams
from ds_moe_ep.engine.arguments import NOISE
from ds_moe_ep.engine.extensions.clock import LayerClock, Timed
from ds_moe_ep.engine.hooks.layer import HookedLayer, check_width, copied, refuse_pickling, restore_class, swap_class
from ds_moe_ep.engine.hooks.replayed import native_answer
from ds_moe_ep.engine.layouts.tensor import refuse_scattering, refuse_unlike, tensor_ranks_of
from ds_moe_ep.engine.parallelism import problem_of_sequences
from ds_moe_ep.errors import EngineError
from ds_moe_ep.kernels.eager import not_compiled
from ds_moe_ep.moe.experts import OpaqueExperts, autocast_type, first_output, known_experts
from ds_moe_ep.moe.match_expert import ExpertForms
from ds_moe_ep.moe.replicas.replicas import Known
from ds_moe_ep.moe.routes import Routes
from ds_moe_ep.moe.snapshot import has_foreign_hooks
from ds_moe_ep.moe.split_experts import Opaque
from ds_moe_ep.moe.tensor_parallel.early import EarlyGather
from ds_moe_ep.moe.tensor_parallel.ranks import is_cut


class HookedNative(HookedLayer):
    """`deepspeed.moe.layer.MoE` with the package's traffic."""

    def __init__(self, name: str, moe: DeepSpeedMoE, traffic: Mapping[str, Any], balance: Mapping[str, Any]) -> None:
        gate: TopKGate = moe.deepspeed_moe.gate
        config = MoEConfig(
            num_experts=moe.num_experts,
            ep_size=moe.ep_size,
            top_k=gate.k,
            capacity_factor=gate.capacity_factor if gate.drop_tokens else None,
            eval_capacity_factor=gate.eval_capacity_factor if gate.drop_tokens else None,
            min_capacity=gate.min_capacity,
            **routing_of(gate),
            **traffic,
        )
        super().__init__("deepspeed.moe.layer.MoE", name, config)
        self.group = moe.deepspeed_moe.ep_group
        self._layer: MOELayer = moe.deepspeed_moe
        self.forms = ExpertForms()
        self.output_type: torch.dtype | None = None  # of experts of unknown form: what they gave last
        self._wants_bias = bool(balance)
        self._report_unmarked()
        self.clock = LayerClock()

    def _report_unmarked(self) -> None:
        """Says where DeepSpeed would average gradients of different experts: adapters that came after its layer."""
        trained = [(name, p) for name, p in self._layer.experts.named_parameters() if p.requires_grad]
        unmarked = [name for name, parameter in trained if not seams.is_expert_parameter(parameter)]
        if unmarked:
            seams.log_rank0(
                f"{self.dispatcher.name}: {len(unmarked)} parameters of its experts ({unmarked[0]}) lack DeepSpeed's "
                "marks (allreduce, group_name): it averages their gradients over ranks that hold other experts; "
                "mark them before deepspeed.initialize",
                logging.WARNING,
            )

    @staticmethod
    def problem_of(moe: DeepSpeedMoE) -> str:
        """Why the layer cannot be hooked, or an empty string."""
        layer = moe.deepspeed_moe
        if isinstance(layer, OverlappedMOELayer):
            return "it is hooked already; call the handle's remove() first"
        if type(layer) is not MOELayer or "forward" in vars(layer):
            return f"its exchange is {type(layer).__name__}.forward, not DeepSpeed's MOELayer; hook plain layers"
        if not isinstance(layer.gate, TopKGate):
            return f"its gate is {type(layer.gate).__name__}; routes are read from DeepSpeed's TopKGate alone"
        missing = seams.missing_of(layer, seams.MOE_LAYER_NAMES) or seams.missing_of(layer.gate, seams.GATE_NAMES)
        if missing:
            return missing
        if problem := problem_of_container(layer.experts):
            return problem
        if layer.use_tutel:
            return "use_tutel=True: Tutel packs its rows; make the layer with use_tutel=False"
        if problem := problem_of_sequences():
            return problem
        if layer.ep_group is None:
            return "it has no expert-parallel group yet; call deepspeed.initialize first"
        return ""

    def problem_of_balance(self) -> str:
        return "DeepSpeed's TopKGate chooses without a bias; leave moe_ep.balance out" if self._wants_bias else ""

    def problem_of_replay(self) -> str:
        if self._layer.gate.drop_tokens:
            return "its gate does not say which expert a dropped choice was for; make it with drop_tokens=False"
        if self.config.noise == "jitter":
            return "its gate weighs tokens with noise of its own (noisy_gate_policy='Jitter'); make it without"
        return ""

    def known_experts(self) -> Known | None:
        return self.forms.known(list(self._layer.experts.deepspeed_experts))

    def share_tokens(self, moe: DeepSpeedMoE) -> None:
        ranks = self.tensor_ranks = tensor_ranks_of(moe, self.config)
        if ranks.has_own_tokens and moe.use_residual and not is_cut(moe.mlp):
            raise EngineError(
                f"{self.dispatcher.name}: use_residual=True with tokens that come cut: DeepSpeed's layer shows its "
                "dense expert only those of each rank, and nobody sums its gradients; use ds_moe_ep.MoE, or no residual"
            )
        if ranks.is_shared:
            refuse_scattering(self._layer.experts, self.dispatcher.name)
        refuse_unlike(ranks, self._layer.gate, self.dispatcher.name)
        if moe.use_residual and not is_cut(moe.mlp):
            refuse_unlike(ranks, moe.mlp, f"{self.dispatcher.name}: its dense expert")
            refuse_unlike(ranks, moe.coefficient, f"{self.dispatcher.name}: its coefficient")

    def attach(self) -> None:
        swap_class(self._layer, OverlappedMOELayer, self)
        self.mark_experts(self._layer.experts)

    def remove(self) -> None:
        restore_class(self._layer, MOELayer)
        self.unmark_experts()


class OverlappedMOELayer(Timed, MOELayer):
    """`MOELayer` whose exchange is a schedule."""

    overlap: HookedNative

    __deepcopy__, __reduce_ex__ = copied, refuse_pickling

    @not_compiled
    def forward(self, *input: Tensor, **kwargs: Any) -> Tensor:
        """Tokens [..., D] to tokens [..., D]; sets `l_aux` and `exp_counts`. Collective over the expert group."""
        clock = self.overlap.clock
        clock.begin(input[0].device, is_on=self.wall_clock_breakdown and self.training)
        self.overlap.dispatcher.time_with(clock.lanes)
        with clock.scope("moe"):
            return self._routed(*input)

    def _routed(self, x: Tensor, used_token: Tensor | None = None) -> Tensor:
        hooked, name = self.overlap, self.overlap.dispatcher.name
        shares = hooked.tensor_ranks.is_shared
        with hooked.dispatcher.announcing(x.device, self.training, shares), alone(self.gate):
            if problem := problem_of_container(self.experts):
                raise EngineError(f"{name}: {problem}")
            check_width(x, self.gate.wg.weight.shape[1], name)
            x_TD, tensor = x.reshape(-1, x.shape[-1]), hooked.tensor_ranks
            tensor.compare(x_TD, name)
            used = used_token if used_token is None else tensor.all_tokens(used_token)
            all_TD = tensor.all_tokens(x_TD)
            chosen = hooked.chosen(all_TD)
            if chosen is None:
                with tensor.drawing_alike(x.device, tensor.is_shared and draws(self.gate)):
                    answer = seams.sparse_routes(self.gate, all_TD, used)
            else:
                answer = native_answer(self.gate, all_TD, used, chosen)
        self.l_aux, capacity, _, experts_KT, places_KT, weights_KT, self.exp_counts = answer
        if self.gate.drop_tokens:
            routes = routes_of(experts_KT, places_KT, weights_KT, int(capacity))
        else:
            is_drawn = self.gate.k == 1 and self.gate.use_rts
            may_leave_out = used_token is not None or is_drawn or not seams.has("sparse routes")
            may_leave_out |= chosen is not None and not chosen.is_whole
            routes = dropless_routes(experts_KT, weights_KT, may_leave_out)
        if hooked.tape is not None:
            hooked.tape.take(routes)
        hooked.last_counts_E = self.exp_counts.to(torch.int64)
        early = tensor.early_gather(len(x_TD))
        share_TD, routes = tensor.cut(x_TD, routes, early)
        return tensor.gather(self._through_experts(share_TD, routes, early), len(x_TD), early).reshape(x.shape)

    def _through_experts(self, x_TD: Tensor, routes: Routes, early: EarlyGather | None) -> Tensor:
        hooked, experts = self.overlap, list(self.experts.deepspeed_experts)
        known = hooked.forms.known(experts)
        by_hand = known and known_experts(*known, x_TD)
        if by_hand:
            return hooked.dispatcher(by_hand[0], routes, by_hand[1], self.training, early=early)[0]
        calls = [Opaque(partial(call_as_deepspeed, expert), list(expert.parameters())) for expert in experts]
        opaque = OpaqueExperts(calls, list(self.experts.buffers()), hooked.output_type)
        y_TD, _ = hooked.dispatcher(x_TD, routes, opaque, self.training, early=early)
        hooked.output_type = opaque.output_type
        if not seams.has("sparse routes"):  # DeepSpeed weighs the results in a matrix product, which autocast casts
            return y_TD.to(autocast_type(x_TD) or x_TD.dtype)
        return y_TD.to(opaque.output_type or x_TD.dtype)

    def layer_clock(self) -> LayerClock:
        return self.overlap.clock


def problem_of_container(experts: nn.Module) -> str:
    """Why the module that holds the experts, which is not called here, may not be left out; or an empty string."""
    if type(experts) is not Experts or "forward" in vars(experts):
        return f"its experts are a {type(experts).__name__} with a forward of their own; hook plain layers"
    if has_foreign_hooks(experts):
        return "hooks of modules hang on its `experts`, which is not called here; put them on each expert"
    return ""


@contextmanager
def alone(gate: TopKGate) -> Iterator[None]:
    """A scope in which a gate knows no other ranks.

    A dropless one asks them, without a time limit, for the fullest expert, which sizes buffers that nobody makes here;
    routes, weights and losses do not depend on it.
    """
    group, gate.ep_group = gate.ep_group, None
    try:
        yield
    finally:
        gate.ep_group = group


def draws(gate: TopKGate) -> bool:
    """True where a pass of a gate may draw numbers, in the mode that it is in."""
    is_drawn = {1: gate.use_rts, 2: gate.top2_2nd_expert_sampling}.get(gate.k, False)
    return bool(is_drawn or (gate.training and gate.noisy_gate_policy not in (None, "None")))


def routes_of(experts_KT: Tensor, places_KT: Tensor, weights_KT: Tensor, capacity: int) -> Routes:
    """The gate's sparse routes under a capacity: an expert below 0 stands for a choice that is dropped."""
    return Routes(
        expert_ids_TK=experts_KT.t().long(),
        weights_TK=weights_KT.t(),
        is_kept_TK=experts_KT.t() >= 0,
        place_TK=places_KT.t().long(),
        capacity=capacity,
    )


def routing_of(gate: TopKGate) -> dict[str, Any]:
    """The knobs of a configuration that say what a gate does, by DeepSpeed's own rules."""
    noise = NOISE.get(gate.noisy_gate_policy, "none")
    policies = {1: "random" if gate.use_rts else "position", 2: "position"}
    return {
        "noise": "none" if noise == "rsample" and gate.k > 1 else noise,  # DeepSpeed has it for top-1 alone
        "sample_second": gate.k == 2 and gate.top2_2nd_expert_sampling,
        "drop_policy": policies.get(gate.k, "score"),
    }


def dropless_routes(experts_KT: Tensor, weights_KT: Tensor, may_leave_out: bool) -> Routes:
    """The same without a capacity. An expert below 0 stands for a choice that is left out.

    A mask of used tokens leaves some out, and so does random token selection where it draws an exact 0.
    """
    ids_TK = experts_KT.t().long()
    return Routes(expert_ids_TK=ids_TK, weights_TK=weights_KT.t(), is_used_TK=ids_TK >= 0 if may_leave_out else None)


def call_as_deepspeed(expert: nn.Module, rows_nD: Tensor) -> Tensor:
    """The expert's outputs for rows, which it sees as DeepSpeed shows them: [1, 1, n, D]."""
    return first_output(expert, rows_nD[None, None]).reshape(len(rows_nD), -1)
