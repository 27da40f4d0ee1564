"""Which known mathematics an expert module computes, read from its traced graph and never guessed from its class."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from ds_moe_ep.moe.forms import Weights

_PRODUCTS = (torch.mul, operator.mul)


@dataclass(frozen=True)
class Form:
    """A recognised kind of expert: which parameters play which part."""

    kind: Literal["gelu", "swiglu"]
    linears: dict[str, str]  # part ("up", "gate", "down") -> name of the Linear in the module
    approximate: str = "none"

    def weights_of(self, expert: nn.Module) -> Weights:
        """Weights and biases of an expert by part, in the order of the module's parameters."""
        part_of = {name: part for part, name in self.linears.items()}
        weights: Weights = {}
        for name, parameter in expert.named_parameters():
            linear, _, leaf = name.rpartition(".")
            weights[f"{part_of[linear]}.{leaf}"] = parameter
        return weights


def recognise(template: nn.Module) -> Form | None:
    """The form of a module's computation, or None when it is neither a GELU MLP nor a SwiGLU of plain Linears.

    Reads the traced graph, so that a class of any name is found, and anything beside it (dropout, hooks, a second
    output, a buffer) sends the module through autograd instead.
    """
    if any(has_hooks(module) for module in template.modules()):
        return None
    if any(True for _ in template.buffers()):
        return None
    try:
        graph = torch.fx.symbolic_trace(template).graph
    except Exception:  # tracing runs the user's forward on symbols, which may fail in any way
        return None
    output = next(node for node in graph.nodes if node.op == "output").args[0]
    form = _gelu_form(template, output) or _swiglu_form(template, output)
    if form is None or len(graph.nodes) != {"gelu": 5, "swiglu": 7}[form.kind]:
        return None
    names = {name for name, _ in template.named_parameters()}  # a tied weight stands here once
    if (
        len(set(form.linears.values())) < len(form.linears)
        or not {f"{n}.weight" for n in form.linears.values()} <= names
    ):
        return None
    owned = {f"{linear}.{leaf}" for linear in form.linears.values() for leaf in ("weight", "bias")}
    return form if names <= owned else None


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module would call somebody's hooks."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def _gelu_form(template: nn.Module, output: Any) -> Form | None:
    down = _linear(template, output)
    approximate = _gelu(template, down.args[0]) if down else None
    up = _linear(template, down.args[0].args[0]) if down and approximate else None
    if not (down and up and approximate and up.args[0].op == "placeholder"):
        return None
    return Form("gelu", {"up": str(up.target), "down": str(down.target)}, approximate)


def _swiglu_form(template: nn.Module, output: Any) -> Form | None:
    down = _linear(template, output)
    product = down.args[0] if down else None
    if product is None or product.op != "call_function" or product.target not in _PRODUCTS:
        return None
    for silu, other in (product.args, product.args[::-1]):
        gate, up = _linear(template, _silu_input(template, silu)), _linear(template, other)
        if gate and up and gate.args[0] is up.args[0] and gate.args[0].op == "placeholder":
            assert down is not None
            return Form("swiglu", {"gate": str(gate.target), "up": str(up.target), "down": str(down.target)})
    return None


def _linear(template: nn.Module, node: Any) -> Any:
    """The node if it calls a plain Linear, else None."""
    is_linear = (
        isinstance(node, torch.fx.Node)
        and node.op == "call_module"
        and type(template.get_submodule(str(node.target))) is nn.Linear
        and len(node.args) == 1
        and isinstance(node.args[0], torch.fx.Node)
    )
    return node if is_linear else None


def _gelu(template: nn.Module, node: Any) -> str | None:
    """The `approximate` of a GELU node, or None for any other."""
    if node.op == "call_module":
        module = template.get_submodule(str(node.target))
        return module.approximate if type(module) is nn.GELU else None
    if node.op == "call_function" and node.target is F.gelu and len(node.args) == 1:
        return str(node.kwargs.get("approximate", "none"))
    return None


def _silu_input(template: nn.Module, node: Any) -> Any:
    """What a SiLU node is applied to, or None for any other node."""
    if not isinstance(node, torch.fx.Node):
        return None
    if node.op == "call_module" and type(template.get_submodule(str(node.target))) is nn.SiLU:
        return node.args[0]
    return node.args[0] if node.op == "call_function" and node.target is F.silu else None
