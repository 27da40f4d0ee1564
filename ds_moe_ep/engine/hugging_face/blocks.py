"""MoE blocks of a Hugging Face model, whoever computes them: the package's layer, DeepSpeed's, or AutoEP's.

`ExpertBlock` says what a block's names in files stand for here. `MoEBlock` is the package's layer in a block's place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.engine import seams
from ds_moe_ep.engine.hugging_face.families import PROJECTIONS, Family, Projection
from ds_moe_ep.engine.layer import MoE
from ds_moe_ep.errors import ConfigError, ExportError
from ds_moe_ep.moe.experts import SwiGLU
from ds_moe_ep.moe.match_expert import Form, match_expert

AUTOEP_STACKS: Mapping[Projection, str] = {"gate": "w1", "up": "w3", "down": "w2"}
SHARED_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class SharedWithGate(nn.Module):
    """A shared expert whose output is weighted by sigmoid(gate(x)) per token (Qwen2-MoE)."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.expert = SwiGLU(hidden_size, width)
        self.weight = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.sigmoid(self.weight(x)) * self.expert(x)
        return y


class MoEBlock(nn.Module):
    """`MoE` in the place of a Hugging Face block: takes and gives hidden states [..., D].

    `l_aux` [] is the weighted balance loss of the last forward pass, with gradient; `balance_loss` sums a model's.
    """

    def __init__(self, config: Any, family: Family, knobs: MoEConfig) -> None:
        super().__init__()
        hidden_size, width = int(config.hidden_size), int(getattr(config, family.expert_width))
        shared: nn.Module | None = None
        if family.shared:
            shared_width = int(getattr(config, family.shared_width))
            shared = (SharedWithGate if family.shared_gate else SwiGLU)(hidden_size, shared_width)
        self.moe = MoE(hidden_size, SwiGLU(hidden_size, width), config=knobs, shared=shared)
        self.l_aux = torch.zeros(())

    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor
        output, self.l_aux, _ = self.moe(hidden_states)
        return output


def balance_loss(model: nn.Module) -> Tensor:
    """The sum [] of the weighted balance losses of a model's blocks in the last forward pass, to add to its loss."""
    losses = [module.l_aux.float() for module in model.modules() if isinstance(module, MoEBlock)]
    if not losses:
        raise ConfigError(
            f"model={type(model).__name__}: has no block of ds_moe_ep.from_pretrained, and so no balance loss of one"
        )
    return torch.stack(losses).sum()


@dataclass(frozen=True)
class ExpertBlock:
    """An MoE block on this rank: its name in the model, its family, and the layer that computes it."""

    name: str
    family: Family
    layer: Any

    @property
    def num_experts(self) -> int:
        """Over all ranks."""
        return int(self.layer.num_experts)

    @property
    def num_local_experts(self) -> int:
        return int(self.layer.num_local_experts)

    @property
    def is_autoep(self) -> bool:
        return seams.is_autoep_layer(self.layer)

    def replicated(self) -> Iterator[tuple[str, Tensor]]:
        """Names in files, and parameters or buffers of the block that every rank holds."""
        prefix, family = self.family.in_files(self.name), self.family
        layer = self.layer
        router = layer.router if self.is_autoep else layer.deepspeed_moe.gate
        yield f"{prefix}.{family.router}", (router.gate if self.is_autoep else router.wg).weight
        if family.router_bias:
            yield f"{prefix}.{family.router_bias}", self._router_bias(router)
        if family.shared:
            yield from ((f"{prefix}.{name}", tensor) for name, tensor in self._shared())

    def _router_bias(self, router: Any) -> Tensor:
        bias = router.e_score_correction_bias if self.is_autoep else router.balance and router.balance.bias_E
        if bias is None:
            raise ExportError(
                f"{self.name}: the files of {self.family.model_type} have a routing bias, the layer has none; "
                'make it with moe_ep.balance="bias"'
            )
        assert isinstance(bias, Tensor)
        return bias

    def _shared(self) -> Iterator[tuple[str, Tensor]]:
        family = self.family
        if self.is_autoep:
            shared, gate = self.layer.shared_experts, self.layer.shared_experts_gate
            if shared is None or (family.shared_gate and gate is None):
                raise ExportError(
                    f"{self.name}: the files of {family.model_type} have a shared expert, AutoEP's layer has none; set "
                    "expert_parallel.has_shared_experts and shared_experts_pattern before the conversion"
                )
            named = [(f"{name}.weight", getattr(shared, name).weight) for name in SHARED_PROJECTIONS]
        else:
            shared = self.layer.deepspeed_moe.shared
            gate = shared.weight if isinstance(shared, SharedWithGate) else None
            expert = shared.expert if isinstance(shared, SharedWithGate) else shared
            weights = self._form(expert).weights_of(expert)
            named = [
                (f"{name}.weight", _present(weights[f"{projection}.weight"]))
                for name, projection in zip(SHARED_PROJECTIONS, PROJECTIONS, strict=True)
            ]
        yield from ((f"{family.shared}.{name}", weight) for name, weight in named)
        if family.shared_gate:
            yield f"{family.shared_gate}.weight", gate.weight

    def experts(self, first: int) -> Iterator[tuple[str, Tensor]]:
        """Names in files, and weights of this rank's experts, of which `first` is the first one's global index."""
        prefix, family = self.family.in_files(self.name), self.family
        for local in range(self.num_local_experts):
            weights = self._expert(local)
            for projection in PROJECTIONS:
                yield f"{prefix}.{family.expert(first + local, projection)}", weights[projection]

    def _expert(self, local: int) -> dict[Projection, Tensor]:
        if self.is_autoep:
            stacks = self.layer.experts
            return {projection: getattr(stacks, name)[local] for projection, name in AUTOEP_STACKS.items()}
        expert = self.layer.deepspeed_moe.experts.deepspeed_experts[local]
        weights = self._form(expert).weights_of(expert)
        return {projection: _present(weights[f"{projection}.weight"]) for projection in PROJECTIONS}

    def _form(self, expert: nn.Module) -> Form:
        """The expert's form, which must be what the family's files hold. Raises ExportError."""
        form = match_expert(expert)
        has_bias = any(name.endswith("bias") for name, _ in expert.named_parameters())
        if form is None or form.kind != "swiglu" or has_bias:
            kind = "something else" if form is None else form.kind
            raise ExportError(
                f"{self.name}: files of {self.family.model_type} hold silu(gate(x)) * up(x), then down, without "
                f"biases; an expert computes {kind}{' with biases' if has_bias else ''}. Merge adapters and take off "
                "hooks first"
            )
        return form


def _present(weight: Tensor | None) -> Tensor:
    assert weight is not None
    return weight


def blocks_of(model: nn.Module, family: Family) -> list[ExpertBlock]:
    """The MoE blocks of a model in its order: the package's layers, DeepSpeed's and AutoEP's."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if seams.is_autoep_layer(module) or seams.is_moe_layer(module)
    }
    return [ExpertBlock(name.removesuffix(".moe"), family, layer) for name, layer in layers.items()]


def knobs_of(config: Any, family: Family, ep_size: int, knobs: Mapping[str, Any]) -> MoEConfig:
    """The knobs that route as the family's block does. `knobs` are others, which may not contradict them.

    Raises ConfigError for a router that the package does not have, and for a knob that the family decides.
    """
    for problem, is_there in (
        (family.refused, bool(family.refused)),
        ("config.router_jitter_noise multiplies the experts' input", bool(getattr(config, "router_jitter_noise", 0))),
        ("config.hidden_act is not silu", getattr(config, "hidden_act", "silu") != "silu"),
    ):
        if is_there:
            raise ConfigError(
                f"config.model_type={family.model_type!r}: cannot become MoE layers, {problem}; train it through "
                "AutoEP with attach_overlap"
            )
    decided: dict[str, Any] = {
        "num_experts": int(getattr(config, family.num_experts)),
        "ep_size": ep_size,
        "top_k": int(config.num_experts_per_tok),
        "score": family.score,
        "renormalize": bool(getattr(config, family.renormalizes)) if family.renormalizes else True,
    }
    for name in decided:
        if name in knobs and knobs[name] != decided[name]:
            raise ConfigError(
                f"moe_ep.{name}={knobs[name]!r}: the folder's config decides it ({decided[name]!r}); leave it out"
            )
    return MoEConfig(**{"balance": "none", **knobs, **decided})
