"""An MoE block of a Hugging Face model and its names in files, whoever computes it: the package, DeepSpeed, AutoEP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.hugging_face.families import PROJECTIONS, Family, Projection
from ds_moe_ep.errors import ExportError
from ds_moe_ep.moe.experts import SharedWithGate
from ds_moe_ep.moe.match_expert import Form, match_expert

AUTOEP_STACKS: Mapping[Projection, str] = {"gate": "w1", "up": "w3", "down": "w2"}
SHARED_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


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
        if family.gate_bias:
            yield f"{prefix}.{family.gate_bias}", self._gate_bias(router)
        if family.shared:
            yield from ((f"{prefix}.{name}", tensor) for name, tensor in self._shared())

    def take_router_bias(self, bias_E: Tensor) -> None:
        """Lets the package's layer choose with a routing bias of files."""
        self.layer.balance.start_from(bias_E)

    def _router_bias(self, router: Any) -> Tensor:
        bias = router.e_score_correction_bias if self.is_autoep else router.balance and router.balance.bias_E
        if bias is None:
            raise ExportError(
                f"{self.name}: the files of {self.family.model_type} have a routing bias, the layer has none; "
                'make it with moe_ep.balance="bias"'
            )
        assert isinstance(bias, Tensor)
        return bias

    def _gate_bias(self, router: Any) -> Tensor:
        bias: Tensor | None = (router.gate if self.is_autoep else router.wg).bias
        if bias is None:
            raise ExportError(
                f"{self.name}: the router of {self.family.model_type} has a bias in its product, the layer's has none; "
                "make it with moe_ep.gate_bias=true"
            )
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
        weights = self.weights_of(local)
        return {projection: weights[f"{projection}.weight"] for projection in PROJECTIONS}

    def weights_of(self, local: int) -> dict[str, Tensor]:
        """Weights, and biases where it has some, of an expert of the package's or DeepSpeed's layer by part."""
        expert = self.layer.deepspeed_moe.experts.deepspeed_experts[local]
        found = self._form(expert).weights_of(expert)
        return {name: _present(weight) for name, weight in found.items()}

    def _form(self, expert: nn.Module) -> Form:
        """The expert's form, which must be what the family's files hold. Raises ExportError."""
        form, family = match_expert(expert), self.family
        named = [name for name, _ in expert.named_parameters()]
        num_biases = sum(name.endswith("bias") for name in named)
        is_clamped = form is not None and form.clamp is not None
        if (
            form is None
            or form.kind != "swiglu"
            or is_clamped != family.stacked
            or num_biases != (len(named) // 2 if family.stacked else 0)
        ):
            kind = "something else" if form is None else f"{'clamped ' if is_clamped else ''}{form.kind}"
            held = (
                "gpt-oss's clamped SwiGLU with biases"
                if family.stacked
                else ("silu(gate(x)) * up(x), then down, without biases")
            )
            raise ExportError(
                f"{self.name}: files of {family.model_type} hold {held}; an expert computes {kind}"
                f"{' with biases' if num_biases else ''}. Merge adapters and take off hooks first"
            )
        return form


def _present(weight: Tensor | None) -> Tensor:
    assert weight is not None
    return weight
