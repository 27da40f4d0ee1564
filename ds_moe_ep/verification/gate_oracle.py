"""The gate's own backward pass, computed again from the gradient of the routing weights and of balance losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.engine.state.optimizer_view import loss_scale
from ds_moe_ep.engine.views.layers import ViewedLayer
from ds_moe_ep.engine.views.moved import SEED, ExactAndMoved, moved
from ds_moe_ep.engine.views.observe import ObservedPass
from ds_moe_ep.verification.reference_routing import balance_loss, counted_ids, scores_of, weights_of


@dataclass(frozen=True)
class GateOracle:
    """The oracle of a gate that is one matrix, for one pass of this rank."""

    layer: ViewedLayer
    seen: ObservedPass
    weight_ED: Tensor  # float64

    @property
    def logits_were_seen(self) -> bool:
        """True where the gradient of the logits was seen in the run, as at AutoEP's gates."""
        return bool(self.seen.dlogits_TE)

    def logits(self, dweights_TK: ExactAndMoved) -> ExactAndMoved:
        """The gradient of the logits that comes from the routing weights, and from the layer's own balance loss."""
        generator = torch.Generator().manual_seed(SEED)
        exact_TE = self._logits_gradient(self._logits(self.seen.x_TD.double(), self.weight_ED), dweights_TK.exact)
        other_TE = self._logits_gradient(self._logits(*self._moved(generator)), dweights_TK.moved)
        return ExactAndMoved(exact_TE, moved(other_TE, self.seen.type, generator))

    def seen_logits(self) -> Tensor:
        """The gradient of the logits that was seen in the run, over all uses of the gate."""
        return torch.stack([each.double() for each in self.seen.dlogits_TE.values()]).sum(0)

    def gradients(self, dweights_TK: ExactAndMoved) -> tuple[ExactAndMoved, ExactAndMoved]:
        """The gradients of the matrix and of the tokens through it, of this rank's tokens. Local."""
        dlogits = ExactAndMoved(*[self.seen_logits()] * 2) if self.logits_were_seen else self.logits(dweights_TK)
        generator = torch.Generator().manual_seed(SEED + 1)
        near_TD, near_ED = self._moved(generator)
        x_TD = self.seen.x_TD.double()
        exact = (dlogits.exact.t() @ x_TD, dlogits.exact @ self.weight_ED)
        near_TE = moved(dlogits.moved, self.seen.type, generator)
        other = [moved(each, self.seen.type, generator) for each in (near_TE.t() @ near_TD, near_TE @ near_ED)]
        return ExactAndMoved(exact[0], other[0]), ExactAndMoved(exact[1], other[1])

    def _moved(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        kind = self.seen.type
        return moved(self.seen.x_TD.double(), kind, generator), moved(self.weight_ED, kind, generator)

    def _logits(self, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        return logits_of(self.layer, x_TD, weight_ED)

    def _logits_gradient(self, logits_TE: Tensor, dweights_TK: Tensor) -> Tensor:
        seen, rule, config = self.seen, self.layer.rule, self.layer.balance_config()
        assert seen.ids_TK is not None and seen.kept_TK is not None
        logits_TE = logits_TE.detach().requires_grad_()
        with torch.enable_grad():
            weights_TK = weights_of(scores_of(logits_TE, rule), seen.ids_TK, seen.kept_TK, rule)
            loss = (weights_TK * dweights_TK).sum()
            if config is not None and seen.dbalance is not None:
                loss = loss + seen.dbalance * balance_loss(logits_TE, counted_ids(seen, logits_TE, rule), config, rule)
        return torch.autograd.grad(loss, logits_TE)[0]


def logits_of(layer: ViewedLayer, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """A gate's logits in the type of its arguments."""
    bias_E = layer.logits_bias_E()
    logits_TE = x_TD @ weight_ED.t()
    return logits_TE if bias_E is None else logits_TE + bias_E.detach().to(logits_TE)


def model_balance(
    engine: Any, layers: Sequence[ViewedLayer], passes: Mapping[str, Sequence[ObservedPass]], batch: Mapping[str, Any]
) -> dict[str, list[ExactAndMoved]] | None:
    """The gradients of logits that a Hugging Face model's balance loss makes, by layer and pass.

    Empty where the model has none; None where it cannot be computed again (masked tokens, a loss of its own). Local.
    The loss is one over all layers (Switch, arXiv 2101.03961, eq. 4 to 6, with k choices per token).
    """
    config = getattr(engine.module, "config", None)
    coefficient = float(getattr(config, "router_aux_loss_coef", 0.0) or 0.0)
    is_on = batch.get("output_router_logits", getattr(config, "output_router_logits", False))
    if not is_on or not coefficient:
        return {}
    counts = {len(passes[layer.name]) for layer in layers}
    masks = batch.get("attention_mask")
    is_masked = isinstance(masks, Tensor) and not bool(masks.all())
    if is_masked or len(counts) != 1 or any(layer.weight_ED() is None for layer in layers):
        return None
    scale = coefficient * loss_scale(engine) / engine.gradient_accumulation_steps()
    found: dict[str, list[ExactAndMoved]] = {layer.name: [] for layer in layers}
    for index in range(counts.pop()):
        generator = torch.Generator().manual_seed(SEED)
        sides = [
            _balance_gradients([(layer, passes[layer.name][index]) for layer in layers], scale, moves)
            for moves in (None, generator)
        ]
        for layer, exact_TE, other_TE in zip(layers, *sides, strict=True):
            kind = passes[layer.name][index].type
            found[layer.name].append(ExactAndMoved(exact_TE, moved(other_TE, kind, generator)))
    return found


def _balance_gradients(
    seen: Sequence[tuple[ViewedLayer, ObservedPass]], scale: float, generator: torch.Generator | None
) -> list[Tensor]:
    """The gradient of each layer's logits [T, E]."""
    leaves = []
    for layer, each in seen:
        weight_ED = layer.weight_ED()
        assert weight_ED is not None, "asked before"
        x_TD, w_ED = each.x_TD.double(), weight_ED.detach().to("cpu", torch.float64)
        if generator is not None:
            x_TD, w_ED = moved(x_TD, each.type, generator), moved(w_ED, each.type, generator)
        leaves.append(logits_of(layer, x_TD, w_ED).requires_grad_())
    with torch.enable_grad():
        scores_NE = torch.cat([leaf.softmax(1) for leaf in leaves])
        ids_NK = torch.cat([each.ids_TK for _, each in seen if each.ids_TK is not None])
        share_E = torch.bincount(ids_NK.flatten(), minlength=scores_NE.shape[1]) / len(ids_NK)
        loss = scale * scores_NE.shape[1] * (share_E * scores_NE.mean(0)).sum()
    return list(torch.autograd.grad(loss, leaves))
