"""Experts inside of torch.autocast, in the types that their modules would compute in.

Experts of a known form are matrix products, which autocast computes in its own type: rows are cast before they travel,
weights once per pass, and the weights' gradients come back in the parameters' own type. Experts of unknown mathematics
are called under autocast; their rows and results travel in the input's type, and the outputs get the type that the
experts gave them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ds_moe_ep.moe.experts import Experts, KnownExperts, LocalExperts, OpaqueExperts, SharedExpert, opaque
from ds_moe_ep.moe.match_expert import Form
from ds_moe_ep.moe.split_experts import Weights


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
