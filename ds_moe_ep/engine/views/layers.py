"""The MoE layers of a model, whoever made them, in one form: gate, routes, experts one by one.

The package's layers, DeepSpeed's own and AutoEP's, with the package's hooks or without.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.engine import seams
from ds_moe_ep.engine.hooks.native import routing_of
from ds_moe_ep.engine.layouts.tensor import whole_tokens
from ds_moe_ep.engine.state.autoep_math import autoep_expert
from ds_moe_ep.engine.views.parts import Routed, RoutingRule, StoredTensor
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.moe.match_expert import is_plain
from ds_moe_ep.moe.tensor_parallel.ranks import TensorRanks


class ViewedLayer:
    """One MoE layer of a model. `inner` is the module from tokens to tokens, `gate` the one that gives the routes."""

    kind: str
    inner: Any
    gate: Any
    weighs_rows = False
    rule: RoutingRule

    def __init__(self, name: str, layer: Any) -> None:
        self.name, self.layer = name, layer
        self.num_experts, self.num_local = int(layer.num_experts), int(layer.num_local_experts)
        self.ep_size = int(layer.ep_size)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that share the experts; None where one rank has all of them."""
        return self.inner.ep_group if self.ep_size > 1 else None

    @property
    def tensor_ranks(self) -> TensorRanks:
        """The ranks that take a part of its tokens to the experts."""
        found = getattr(getattr(self.inner, "overlap", self.inner), "tensor_ranks", None)
        return found if isinstance(found, TensorRanks) else whole_tokens()

    @property
    def averages_gate_gradients(self) -> bool:
        """True where a tensor rank's gradients at the gate are of its own tokens, and their mean that of all."""
        return False

    @property
    def shares_width_with(self) -> dist.ProcessGroup | None:
        """The ranks that each have a share of every expert's width; None where experts are whole."""
        return None

    @property
    def ep_rank(self) -> int:
        """This rank's place in the group."""
        return dist.get_rank(self.group) if self.group is not None else 0

    def expert_of(self, local: int) -> int:
        """The global index of a local expert."""
        return self.ep_rank * self.num_local + local

    def routed(self, output: Any) -> Routed:
        """The routes in an answer of the gate."""
        raise NotImplementedError

    def expert_tensors(self, local: int) -> dict[str, StoredTensor]:
        """The tensors of a local expert by their names in it."""
        raise NotImplementedError

    def expert_name(self, local: int, name: str) -> str:
        """The name of a local expert's tensor by its global index, the same on every rank that has it."""
        return f"{self.name} expert {self.expert_of(local)} {name}"

    def expert_values(self, local: int) -> dict[str, Tensor]:
        """The weights of a local expert in float64 in host memory."""
        found = self.expert_tensors(local).items()
        return {name: stored.of(stored.parameter).detach().to("cpu", torch.float64) for name, stored in found}

    def stored_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the local experts as the optimizer has them, by their names in the model."""
        tensors = [each for local in range(self.num_local) for each in self.expert_tensors(local).values()]
        return {stored.name: stored.parameter for stored in tensors}

    def gate_parameters(self) -> dict[str, nn.Parameter]:
        """The gate's parameters by their names in the model."""
        prefix = next(name for name, module in self.layer.named_modules() if module is self.gate)
        return {f"{self.name}.{prefix}.{name}": parameter for name, parameter in self.gate.named_parameters()}

    def weight_ED(self) -> Tensor | None:
        """The gate's matrix; None where the gate is no plain product."""
        raise NotImplementedError

    def logits_bias_E(self) -> Tensor | None:
        """The bias of the gate's product; None without one."""
        raise NotImplementedError

    @property
    def gate_type(self) -> torch.dtype | None:
        """The type of the gate's product where it is not that of the tokens."""
        return torch.float32

    def choice_bias_E(self) -> Tensor | None:
        """The bias that moves the choice and no weight; None without one."""
        return None

    def bias_in_steps(self) -> Tensor | None:
        """The balancing bias that each step of the optimizer moves, counted in its steps; None where none is moved."""
        return None

    def compute(self, weights: Mapping[str, Tensor], rows_nD: Tensor) -> Tensor:
        """An expert of these weights on rows, in their type."""
        raise NotImplementedError

    def problem_of_oracle(self) -> str:
        """Why the experts cannot be computed again elsewhere, or an empty string."""
        return ""

    def adds_more(self) -> bool:
        """True where the output holds more than the weighted results: a shared expert's."""
        return False

    def balance_loss(self) -> Tensor | None:
        """The loss that the layer hands out with its output, with its graph; None where it has none."""
        return None

    def balance_config(self) -> MoEConfig | None:
        """The knobs of that loss."""
        return None


class _DeepSpeedFace(ViewedLayer):
    """The part that the package's layer and DeepSpeed's own have in common."""

    inner_name = "deepspeed_moe."  # of `inner` in the layer, with its dot

    def __init__(self, name: str, layer: Any) -> None:
        super().__init__(name, layer)
        self.inner, self.gate = layer.deepspeed_moe, layer.deepspeed_moe.gate

    def _experts(self) -> list[nn.Module]:
        return list(self.inner.experts.deepspeed_experts)

    def expert_tensors(self, local: int) -> dict[str, StoredTensor]:
        prefix = f"{self.name}.{self.inner_name}experts.deepspeed_experts.{local}"
        found = self._experts()[local].named_parameters()
        return {name: StoredTensor(f"{prefix}.{name}", parameter) for name, parameter in found}

    def weight_ED(self) -> Tensor | None:
        return self.gate.wg.weight if type(self.gate.wg) is nn.Linear and is_plain(self.gate.wg) else None

    def logits_bias_E(self) -> Tensor | None:
        bias_E: Tensor | None = self.gate.wg.bias
        return bias_E

    def compute(self, weights: Mapping[str, Tensor], rows_nD: Tensor) -> Tensor:
        expert = self._experts()[0]
        buffers = {name: each.to(rows_nD.dtype) for name, each in expert.named_buffers() if each.is_floating_point()}
        answer = functional_call(expert, {**weights, **buffers}, (rows_nD,))
        first: Tensor = answer[0] if isinstance(answer, tuple) else answer
        return first

    def problem_of_oracle(self) -> str:
        for expert in self._experts():
            drops = [name for name, module in expert.named_modules() if isinstance(module, nn.Dropout) and module.p]
            if drops and expert.training:
                return f"its experts drop numbers at random ({drops[0]})"
        return "use_tutel=True: Tutel's routes are not read" if self.inner.use_tutel else ""

    def balance_loss(self) -> Tensor | None:
        loss: Tensor | None = getattr(self.inner, "l_aux", None)
        return loss


class OwnLayerView(_DeepSpeedFace):
    """`ds_moe_ep.MoE`."""

    kind = "ds_moe_ep.MoE"

    @property
    def config(self) -> MoEConfig:
        """The knobs in force."""
        config: MoEConfig = self.layer.config
        return config

    @property
    def rule(self) -> RoutingRule:  # type: ignore[override]
        config = self.config
        return RoutingRule(
            top_k=config.top_k,
            score=config.score,
            renormalizes=config.renormalizes,
            scale=config.route_scale,
            num_groups=config.n_group if config.n_group > 1 else 0,
            kept_groups=config.topk_group,
            group_score=config.group_score,
            is_drawn=config.noise == "rsample" or config.sample_second or self.gate.tape is not None,
            moves_input=config.noise == "jitter" or config.force_even,
        )

    @property
    def gate_type(self) -> torch.dtype | None:
        return None if self.config.router_dtype == "tokens" else torch.float32

    def routed(self, output: Any) -> Routed:
        kept = output.is_kept_TK if output.is_kept_TK is not None else output.is_used_TK
        ids_TK = output.expert_ids_TK
        return Routed(ids_TK, output.weights_TK, torch.ones_like(ids_TK, dtype=torch.bool) if kept is None else kept)

    def choice_bias_E(self) -> Tensor | None:
        balance = self.gate.balance
        if balance is None:
            return None
        # From what is stored, and not `balance.bias_E`, which is a part of what is verified.
        moved_E: Tensor = balance.steps_E.double() * self.config.bias_step
        start_E = balance.start_bits_E
        return moved_E if start_E is None else start_E.view(torch.float32).double() + moved_E

    def bias_in_steps(self) -> Tensor | None:
        is_moved = self.config.has_bias and self.config.bias_step
        return self.gate.balance.steps_E.cpu().double() if is_moved else None

    def adds_more(self) -> bool:
        return self.inner.shared is not None

    def balance_config(self) -> MoEConfig | None:
        return self.config


class NativeLayerView(_DeepSpeedFace):
    """`deepspeed.moe.layer.MoE`, hooked or not."""

    kind = "deepspeed.moe.layer.MoE"

    @property
    def rule(self) -> RoutingRule:  # type: ignore[override]
        gate, routing = self.gate, routing_of(self.gate)
        return RoutingRule(
            top_k=gate.k,
            score="softmax",
            renormalizes=gate.k > 1,
            is_drawn=routing["noise"] == "rsample" or routing["sample_second"],
            moves_input=routing["noise"] == "jitter",
        )

    def routed(self, output: Any) -> Routed:
        ids_TK = output[3].t().long()
        return Routed(ids_TK.clamp(min=0), output[5].t(), ids_TK >= 0, bool((ids_TK < 0).any()))

    def balance_config(self) -> MoEConfig | None:
        return MoEConfig(num_experts=self.num_experts, ep_size=self.ep_size, top_k=self.gate.k)


class AutoEPLayerView(ViewedLayer):
    """A block of experts that AutoEP replaced, hooked or not."""

    kind = "AutoEPMoELayer"

    def __init__(self, name: str, layer: Any) -> None:
        super().__init__(name, layer)
        self.inner, self.gate = layer, layer.router
        self.weighs_rows = layer.score_apply == "pre"

    @property
    def averages_gate_gradients(self) -> bool:
        return not hasattr(self.layer, "overlap")  # AutoEP's own folding

    @property
    def rule(self) -> RoutingRule:  # type: ignore[override]
        router = self.gate
        return RoutingRule(
            top_k=router.top_k,
            score=router.score_func,
            renormalizes=bool(router.route_norm),
            scale=float(router.route_scale),
            num_groups=router.num_expert_groups or 0,
            kept_groups=router.num_limited_groups or 0,
            group_score=router.group_score_func,
        )

    def routed(self, output: Any) -> Routed:
        return Routed(output[1].long(), output[0], torch.ones_like(output[1], dtype=torch.bool))

    def expert_tensors(self, local: int) -> dict[str, StoredTensor]:
        found = self.inner.experts.named_parameters()
        return {name: StoredTensor(f"{self.name}.experts.{name}", each, local) for name, each in found}

    def weight_ED(self) -> Tensor | None:
        return self.gate.gate.weight if type(self.gate.gate) is nn.Linear else None

    def logits_bias_E(self) -> Tensor | None:
        bias_E: Tensor | None = self.gate.gate.bias
        return bias_E

    @property
    def gate_type(self) -> torch.dtype | None:
        return None

    def choice_bias_E(self) -> Tensor | None:
        parts = [each for each in (self.inner.expert_bias, self.gate.e_score_correction_bias) if each is not None]
        return sum((part.detach().double() for part in parts[1:]), parts[0].detach().double()) if parts else None

    def bias_in_steps(self) -> Tensor | None:
        config = getattr(getattr(self.layer, "overlap", None), "config", None)
        bias_E = self.choice_bias_E()
        if config is None or not config.has_bias or not config.bias_step or bias_E is None:
            return None
        return bias_E.cpu() / float(config.bias_step)

    def compute(self, weights: Mapping[str, Tensor], rows_nD: Tensor) -> Tensor:
        return autoep_expert(self.inner.experts, weights, rows_nD)

    def problem_of_oracle(self) -> str:
        if set(dict(self.inner.experts.named_parameters())) != {"w1", "w2", "w3"}:
            return "its experts have more than three matrices"
        return ""

    def adds_more(self) -> bool:
        return self.inner.shared_experts is not None


class CutLayerView(OwnLayerView):
    """The package's layer in `build_pipeline` with ep_size 1: each tensor rank has a share of every expert's width."""

    kind, inner_name = "ds_moe_ep.ExpertParallel", ""

    def __init__(self, name: str, layer: ExpertParallel) -> None:
        config = layer.config
        self.name, self.layer, self.inner, self.gate = name, layer, layer, layer.gate
        self.num_experts, self.num_local, self.ep_size = config.num_experts, config.num_local_experts, config.ep_size

    @property
    def shares_width_with(self) -> dist.ProcessGroup | None:
        return getattr(self.layer.region, "group", None)

    def expert_name(self, local: int, name: str) -> str:
        group, whole = self.shares_width_with, super().expert_name(local, name)
        return whole if group is None else f"{whole} of tensor rank {dist.get_rank(group)}"

    def problem_of_oracle(self) -> str:
        return ""


def viewed_layers(model: nn.Module) -> list[ViewedLayer]:
    """The MoE layers of a model, in its order."""
    views: list[ViewedLayer] = []
    for name, module in model.named_modules():
        if getattr(module, "kind", "") == OwnLayerView.kind:
            views.append(OwnLayerView(name, module))
        elif type(module) is ExpertParallel and module.config.ep_size == 1:
            views.append(CutLayerView(name, module))
        elif seams.is_autoep_layer(module):
            views.append(AutoEPLayerView(name, module))
        elif seams.is_moe_layer(module):
            views.append(NativeLayerView(name, module))
    return views
