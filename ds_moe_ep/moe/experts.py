"""Local experts, and how one pass goes through them.

Parameters live where DeepSpeed keeps them: one module an expert in a list, so that checkpoints, optimizer states and
parameter groups are interchangeable with DeepSpeed's own layer. Rows are stacked instead: all rows of an expert lie
side by side, and each product is one matrix product per expert and piece, or one of all experts (`grouped/`).

A form (`split_experts.py`) knows the mathematics of a kind of expert and splits its gradient in two: input gradients,
which other ranks wait for, and weight gradients, which nothing waits for. Unknown experts go through autograd.
`KnownExperts` and `OpaqueExperts` are those of somebody else's layer: their parameters stay where they are.

Inside of torch.autocast experts compute in the types that their modules would compute in. Those of a known form are
matrix products, which autocast computes in its own type: rows are cast before they travel, weights once per pass, and
the weights' gradients come back in the parameters' own type. Experts of unknown mathematics are called under autocast;
their rows and results travel in the input's type, and the outputs get the type that the experts gave them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.moe.grouped.experts import GroupedPass, start_grouped
from ds_moe_ep.moe.layout import Grouping
from ds_moe_ep.moe.match_expert import ExpertForms, Form
from ds_moe_ep.moe.routes import Routes
from ds_moe_ep.moe.snapshot import has_foreign_hooks
from ds_moe_ep.moe.split_experts import ExpertPass, GeluPass, Opaque, OpaquePass, Span, SwiGLUPass, Weights


class GeluMLP(nn.Module):
    """An expert: Linear(D, F), GELU, Linear(F, D). `approximate` is "none" (erf) or "tanh"."""

    def __init__(self, hidden_size: int, width: int, bias: bool = False, approximate: str = "none") -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, width, bias=bias)
        self.act = nn.GELU(approximate)
        self.fc2 = nn.Linear(width, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.act(self.fc1(x)))
        return y


class SwiGLU(nn.Module):
    """An expert: down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, width: int, bias: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, width, bias=bias)
        self.up = nn.Linear(hidden_size, width, bias=bias)
        self.down = nn.Linear(width, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return y


class ClampedSwiGLU(nn.Module):
    """An expert of gpt-oss (arXiv 2508.10925): down((up(x) + 1) * g * sigmoid(alpha * g)), g = gate(x).

    g is at most `limit`, and up(x) within -limit and limit. In gpt-oss's files gate and up stand in turn in one matrix:
    its rows 0, 2, 4 ... are gate's, and 1, 3, 5 ... up's.
    """

    def __init__(
        self, hidden_size: int, width: int, bias: bool = True, alpha: float = 1.702, limit: float = 7.0
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, width, bias=bias)
        self.up = nn.Linear(hidden_size, width, bias=bias)
        self.down = nn.Linear(width, hidden_size, bias=bias)
        self.alpha, self.limit = alpha, limit

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x).clamp(max=self.limit)
        up = self.up(x).clamp(min=-self.limit, max=self.limit)
        y: Tensor = self.down((up + 1) * (gate * torch.sigmoid(gate * self.alpha)))
        return y


class SharedWithGate(nn.Module):
    """A shared expert whose output is weighted by sigmoid(gate(x)) per token (Qwen2-MoE)."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.expert = SwiGLU(hidden_size, width)
        self.weight = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.sigmoid(self.weight(x)) * self.expert(x)
        return y


class LocalExperts(Protocol):
    """This rank's experts, as a pass goes through them."""

    def expert_parameters(self) -> list[Tensor]:
        """All parameters, expert by expert: the order in which a pass returns their gradients."""

    def start(
        self, spans: Sequence[Span], keep_graph: bool, groupings: Sequence[Grouping] = ()
    ) -> ExpertPass | GroupedPass:
        """A pass over each expert's span of stacked rows; with `keep_graph` it may go backward.

        With groupings, for which experts must be known: over all rows of a group's experts at once.
        """

    def known(self) -> tuple[Form, Sequence[Weights]] | None:
        """The form and the weights of the experts; None where their mathematics is unknown."""

    def buffers(self) -> Iterator[Tensor]:
        """State that a pass may change."""


class Experts(nn.Module):
    """`num_local_experts` copies of a template module that maps rows [n, D] to rows [n, D]."""

    def __init__(self, template: nn.Module, num_local_experts: int) -> None:
        super().__init__()
        self.deepspeed_experts = nn.ModuleList(copy.deepcopy(template) for _ in range(num_local_experts))
        self._forms = ExpertForms()
        self.output_type: torch.dtype | None = None  # under autocast, of experts of unknown form: what they gave last

    def __len__(self) -> int:
        return len(self.deepspeed_experts)

    def expert_parameters(self) -> list[Tensor]:
        """All parameters, expert by expert: the order in which a pass returns their gradients."""
        return [parameter for expert in self.deepspeed_experts for parameter in expert.parameters()]

    def check(self) -> None:
        """Raises ConfigError for hooks and forwards that would never be called: rows go to each expert by itself."""
        if has_foreign_hooks(self) or "forward" in vars(self):
            raise ConfigError(
                "MoE.deepspeed_moe.experts: hooks, or a forward of its own, hang on the module that holds the experts, "
                "which is not called: rows go to each expert by itself; put them on each of its deepspeed_experts"
            )

    @property
    def dtype(self) -> torch.dtype | None:
        """The parameters' type; None for experts without parameters."""
        first = first_parameter(self)
        return None if first is None else first.dtype

    @property
    def form(self) -> Form | None:
        """The known mathematics that all of them have in common now; None where there is none."""
        return self._forms.common(list(self.deepspeed_experts))

    def lay_together(self) -> None:
        """Moves the parameters of all experts side by side, one memory for each name: their products can be grouped.

        An engine's flat buffer serves as well. Local, before anything keeps the parameters' memory (an optimizer may
        have the parameters themselves); moving the module to another type or device undoes it.
        """
        names = [name for name, _ in self.deepspeed_experts[0].named_parameters()]
        by_name = [dict(expert.named_parameters()) for expert in self.deepspeed_experts]
        for name in names:
            stacked = torch.stack([named[name].detach() for named in by_name])
            for named, place in zip(by_name, stacked, strict=True):
                named[name].data = place

    def known(self) -> tuple[Form, Sequence[Weights]] | None:
        """The form and the weights of all of them; None where they have no known one in common."""
        return self._forms.known(list(self.deepspeed_experts))

    def start(
        self, spans: Sequence[Span], keep_graph: bool, groupings: Sequence[Grouping] = ()
    ) -> ExpertPass | GroupedPass:
        """A pass over each expert's span of stacked rows; `keep_graph`: modules of unknown form may go backward."""
        known = self.known()
        if known is None:
            return OpaquePass([opaque(expert) for expert in self.deepspeed_experts], keep_graph)
        return start_pass(*known, spans, groupings)


def first_parameter(module: nn.Module) -> Tensor | None:
    """The first of `module.parameters()`, which take ten times as long to begin; None without any."""
    own = next((parameter for parameter in module._parameters.values() if parameter is not None), None)
    if own is not None:
        return own
    for child in module._modules.values():
        if child is not None and (found := first_parameter(child)) is not None:
            return found
    return None


def opaque(expert: nn.Module) -> Opaque:
    """A module as an expert of unknown mathematics."""
    return Opaque(partial(first_output, expert), list(expert.parameters()))


def first_output(expert: nn.Module, rows: Tensor) -> Tensor:
    """The module's output for rows; as DeepSpeed, without a second output (a bias)."""
    out = expert(rows)
    first: Tensor = out[0] if isinstance(out, tuple) else out
    return first


@dataclass(frozen=True)
class SharedExpert:
    """An expert that every token of this rank visits, and its tokens [T, D]: rows that no wire carries."""

    experts: LocalExperts  # one
    x_TD: Tensor

    def start(self) -> ExpertPass:
        """A pass over the tokens."""
        started = self.experts.start([(0, len(self.x_TD))], keep_graph=False)
        assert not isinstance(started, GroupedPass), "one expert is no group"
        return started


def start_pass(
    form: Form, weights: Sequence[Weights], spans: Sequence[Span], groupings: Sequence[Grouping] = ()
) -> ExpertPass | GroupedPass:
    """A pass over each expert's span of stacked rows by the split mathematics of their form."""
    if form.own_pass is not None:
        return form.own_pass(weights)
    if groupings:
        return start_grouped(form, weights, groupings)
    if form.kind == "gelu":
        return GeluPass(weights, spans, form.approximate)
    return SwiGLUPass(weights, spans, form.clamp)


class KnownExperts:
    """Experts of a known form, given by their weights: a mapping per expert, in the order of its gradients."""

    def __init__(self, form: Form, weights: Sequence[Weights]) -> None:
        self.form, self.weights = form, weights

    def expert_parameters(self) -> list[Tensor]:
        return [tensor for named in self.weights for tensor in named.values() if tensor is not None]

    def known(self) -> tuple[Form, Sequence[Weights]]:
        return self.form, self.weights

    def start(
        self, spans: Sequence[Span], keep_graph: bool, groupings: Sequence[Grouping] = ()
    ) -> ExpertPass | GroupedPass:
        return start_pass(self.form, self.weights, spans, groupings)

    def buffers(self) -> Iterator[Tensor]:
        return iter(())


class OpaqueExperts:
    """Experts of unknown mathematics, and the state that calling them may change.

    `output_type` is what they gave the last time that one of them was called: under autocast each may choose its own.
    """

    def __init__(
        self, experts: Sequence[Opaque], buffers: Sequence[Tensor] = (), output_type: torch.dtype | None = None
    ) -> None:
        self._experts, self._buffers, self.output_type = experts, buffers, output_type

    def expert_parameters(self) -> list[Tensor]:
        return [parameter for expert in self._experts for parameter in expert.parameters]

    def known(self) -> None:
        return None

    def start(self, spans: Sequence[Span], keep_graph: bool, groupings: Sequence[Grouping] = ()) -> ExpertPass:
        return OpaquePass([Opaque(partial(self._call, each), each.parameters) for each in self._experts], keep_graph)

    def _call(self, expert: Opaque, rows_nD: Tensor) -> Tensor:
        y_nD = expert.call(rows_nD)
        self.output_type = y_nD.dtype
        return y_nD

    def buffers(self) -> Iterator[Tensor]:
        return iter(self._buffers)


def needs_gradient(
    x_TD: Tensor, routes: Routes, experts: LocalExperts, shared: SharedExpert | None, weighs_far: bool = False
) -> bool:
    """True where something of this rank's needs the backward pass through the experts.

    `weighs_far`: weights multiply results where they are summed, on other ranks.
    """
    if not torch.is_grad_enabled():
        return False
    parameters = [*experts.expert_parameters(), *(() if shared is None else shared.experts.expert_parameters())]
    is_weighed = (routes.weighs_rows or weighs_far) and routes.weights_TK.requires_grad
    return x_TD.requires_grad or is_weighed or any(parameter.requires_grad for parameter in parameters)


def autocast_type(*tensors: Tensor) -> torch.dtype | None:
    """The type in which autocast would multiply these tensors; None where it leaves them alone."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return None
    is_cast = all(tensor.is_floating_point() and tensor.dtype != torch.float64 for tensor in tensors)
    return torch.get_autocast_dtype(kind) if is_cast else None


def local_experts(experts: Experts, x_TD: Tensor) -> tuple[Tensor, LocalExperts]:
    """A layer's experts as they go through a pass, and the rows that go to them."""
    known = experts.known()
    if autocast_type(x_TD) is None:
        return x_TD, experts if known is None else KnownExperts(*known)
    by_hand = known and known_experts(*known, x_TD)
    if by_hand:
        return by_hand
    calls = [opaque(module) for module in experts.deepspeed_experts]
    return x_TD, OpaqueExperts(calls, list(experts.buffers()), experts.output_type)


def shared_expert(form: Form, module: nn.Module, x_TD: Tensor) -> SharedExpert | None:
    """A shared expert of known form with its tokens, as `known_experts` has them."""
    by_hand = known_experts(form, [form.weights_of(module)], x_TD)
    return SharedExpert(by_hand[1], by_hand[0]) if by_hand else None


def known_experts(form: Form, weights: Sequence[Weights], x_TD: Tensor) -> tuple[Tensor, KnownExperts] | None:
    """Rows and experts of one type, which both have or autocast gives them; None where their types differ."""
    parameter = next(weight for weight in weights[0].values() if weight is not None)
    dtype = autocast_type(x_TD, parameter)
    if dtype is not None:
        return x_TD.to(dtype), KnownExperts(form, [in_type(dtype, each) for each in weights])
    return (x_TD, KnownExperts(form, weights)) if x_TD.dtype == parameter.dtype else None


def in_type(dtype: torch.dtype, weights: Weights) -> Weights:
    """The weights in another type; differentiable, so that gradients come back in their own."""
    return {name: None if weight is None else weight.to(dtype) for name, weight in weights.items()}
