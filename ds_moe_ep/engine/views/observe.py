"""Passes of the layers as they ran: what went in and came out, and the gradients that came back.

1. Before a layer, its input passes through a view, so that the gradient that is seen there is the layer's own alone.
2. Behind its gate the routes are kept, and behind the layer its output and the balance loss.
3. Gradients arrive in the backward pass. A pass that got none (evaluation, or the first one of a recomputation) is
   dropped.

Everything is copied, to host memory by default: a layer's tokens, five times their size per micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ds_moe_ep.engine.views.layers import ViewedLayer
from ds_moe_ep.moe.experts import autocast_type


@dataclass
class ObservedPass:
    """One pass of one layer on this rank. Gradients are None until they came, or where none was asked for."""

    x_TD: Tensor
    type: torch.dtype  # in which experts compute
    ids_TK: Tensor | None = None
    weights_TK: Tensor | None = None
    kept_TK: Tensor | None = None
    y_TD: Tensor | None = None
    balance_loss: float | None = None
    bias_E: Tensor | None = None
    dx_TD: Tensor | None = None
    dgate_TD: Tensor | None = None  # the part of dx_TD that came through the gate
    dy_TD: Tensor | None = None
    dweights_TK: Tensor | None = None
    dbalance: float | None = None
    hides_dropped: bool = False  # of a dropped choice the expert is not known
    has_mask: bool = False  # tokens were left out by the caller
    has_residual: bool = False  # the caller had something added to the output
    dlogits_TE: dict[int, Tensor] = field(default_factory=dict)  # at each use of AutoEP's gate, of which 0 routes
    num_uses: int = 0  # of that gate


class Observation:
    """The passes of all layers since `take` was called last."""

    def __init__(self, layers: Sequence[ViewedLayer], keep: Callable[[Tensor], Tensor] | None = None) -> None:
        self._layers = layers
        self._keep = keep or kept
        self._passes: dict[str, list[ObservedPass]] = {layer.name: [] for layer in layers}

    def take(self) -> dict[str, list[ObservedPass]]:
        """The passes by layer that got a gradient, in their order; forgets them."""
        taken = {
            name: [each for each in passes if each.dy_TD is not None and each.ids_TK is not None]
            for name, passes in self._passes.items()
        }
        self._passes = {layer.name: [] for layer in self._layers}
        return taken

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A scope in which passes are seen."""
        handles = [handle for layer in self._layers for handle in self._hooks(layer)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooks(self, layer: ViewedLayer) -> Iterator[Any]:
        yield layer.inner.register_forward_pre_hook(partial(self._before, layer), with_kwargs=True)
        yield layer.gate.register_forward_pre_hook(partial(self._before_gate, layer))
        yield layer.gate.register_forward_hook(partial(self._routed, layer))
        yield layer.inner.register_forward_hook(partial(self._after, layer))
        if layer.kind == "AutoEPMoELayer":
            # Before ZeRO-3's hooks, which put a node between: the model's balance loss takes the logits from here.
            yield layer.gate.gate.register_forward_hook(partial(self._logits, layer), prepend=True)

    def _before(self, layer: ViewedLayer, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = None if args else "hidden_states"
        x = args[0] if name is None else kwargs[name]
        reached = x.view_as(x)
        parameter = next(layer.inner.experts.parameters(), x)
        seen = ObservedPass(self._keep(x.reshape(-1, x.shape[-1])), autocast_type(x, parameter) or x.dtype)
        seen.has_mask = len(args) > 1 and args[1] is not None
        seen.has_residual = (args[2] if len(args) > 2 else kwargs.get("residual")) is not None
        bias_E = layer.choice_bias_E()
        seen.bias_E = None if bias_E is None else self._keep(bias_E)
        self._passes[layer.name].append(seen)
        if reached.requires_grad:
            reached.register_hook(partial(self._keep_gradient, seen, "dx_TD", x.shape[-1]))
        return ((reached, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: reached})

    def _before_gate(self, layer: ViewedLayer, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if not self._passes[layer.name] or not args:
            return None
        reached = args[0].view_as(args[0])
        if reached.requires_grad:
            seen = self._passes[layer.name][-1]
            reached.register_hook(partial(self._keep_gradient, seen, "dgate_TD", reached.shape[-1]))
        return (reached, *args[1:])

    def _routed(self, layer: ViewedLayer, module: nn.Module, args: Any, output: Any) -> None:
        if not self._passes[layer.name]:
            return
        seen, routed = self._passes[layer.name][-1], layer.routed(output)
        seen.ids_TK, seen.weights_TK = self._keep(routed.ids_TK), self._keep(routed.weights_TK)
        seen.kept_TK = self._keep(routed.kept_TK)
        seen.hides_dropped = routed.hides_dropped
        if routed.weights_TK.requires_grad:
            routed.weights_TK.register_hook(partial(self._keep_gradient, seen, "dweights_TK", routed.ids_TK.shape[1]))

    def _logits(self, layer: ViewedLayer, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._passes[layer.name] and output.requires_grad:
            seen = self._passes[layer.name][-1]
            output.register_hook(partial(self._add_gradient, seen, seen.num_uses))
            seen.num_uses += 1

    def _after(self, layer: ViewedLayer, module: nn.Module, args: Any, output: Any) -> None:
        seen = self._passes[layer.name][-1]
        y = output[0] if isinstance(output, tuple) else output
        width = seen.x_TD.shape[1]
        seen.y_TD = self._keep(y.reshape(-1, width))
        if y.requires_grad:
            y.register_hook(partial(self._keep_gradient, seen, "dy_TD", width))
        loss = output[1] if isinstance(output, tuple) and layer.kind != "AutoEPMoELayer" else layer.balance_loss()
        if loss is not None:
            seen.balance_loss = float(loss.detach())
            if loss.requires_grad:
                loss.register_hook(partial(_keep_number, seen))

    def _keep_gradient(self, seen: ObservedPass, name: str, width: int, gradient: Tensor) -> None:
        before, own = getattr(seen, name), self._keep(gradient.reshape(-1, width))
        setattr(seen, name, own if before is None else before + own)  # a stage goes backward once per tensor it sent

    def _add_gradient(self, seen: ObservedPass, use: int, gradient: Tensor) -> None:
        before, own = seen.dlogits_TE.get(use), self._keep(gradient)
        seen.dlogits_TE[use] = own if before is None else before + own


def kept(tensor: Tensor) -> Tensor:
    """A copy in host memory."""
    return tensor.detach().to("cpu", copy=True)


def _keep_number(seen: ObservedPass, gradient: Tensor) -> None:
    seen.dbalance = (seen.dbalance or 0.0) + float(gradient)
