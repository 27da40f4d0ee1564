"""Proof that two layers compute the same thing, before anything is timed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ds_moe_ep.bench.candidates.layers import LayerCandidate, experts_of, gate_of
from ds_moe_ep.errors import EngineError
from ds_moe_ep.records.quantity import number

SAME_TOLERANCE = 1e-5  # of the largest element: fp32 sums of 1,024 terms in another order differ by 1e-6


@dataclass(frozen=True)
class LayerOutcome:
    """All that one forward and backward leaves on a rank."""

    exp_counts_E: Tensor
    tensors: dict[str, Tensor]  # y, l_aux, dx, dwg, d<expert>.<parameter>


def outcome_of(candidate: LayerCandidate) -> LayerOutcome:
    """One step's results, on the host; no gradient is left behind. Collective, where the layer is."""
    candidate.prepare()
    y_TD, l_aux, exp_counts_E = candidate.run()
    found = {"y": y_TD, "l_aux": l_aux, "dx": candidate.x_TD.grad, "dwg": gate_of(candidate.layer).weight.grad}
    for index, expert in enumerate(experts_of(candidate.layer)):
        for position, parameter in enumerate(expert.parameters()):
            found[f"d{index}.{position}"] = parameter.grad
    tensors = {name: _on_host(tensor) for name, tensor in found.items()}
    candidate.prepare()
    return LayerOutcome(exp_counts_E.detach().cpu().clone(), tensors)


def _on_host(tensor: Tensor | None) -> Tensor:
    return torch.zeros(()) if tensor is None else tensor.detach().cpu().clone()


def check_same(name: str, found: LayerOutcome, expected: LayerOutcome, tolerance: float = SAME_TOLERANCE) -> float:
    """The largest difference, relative to the largest element of each tensor.

    Raises EngineError where counts differ or a tensor differs by more than `tolerance`: layers that compute
    different things must not be compared by time.
    """
    if not torch.equal(found.exp_counts_E.long(), expected.exp_counts_E.long()):
        raise EngineError(
            f"bench.{name}.exp_counts={found.exp_counts_E.tolist()}: the first layer has "
            f"{expected.exp_counts_E.tolist()}; both must route alike before they are timed"
        )
    worst = 0.0
    for key, reference in expected.tensors.items():
        value = found.tensors[key]
        if value.shape != reference.shape:
            shapes = f"{tuple(value.shape)} against {tuple(reference.shape)}"
            raise EngineError(f"bench.{name}.{key}: shapes {shapes}; a gradient is missing or misplaced")
        scale = reference.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        difference = float((value - reference).abs().max() / scale)
        if not difference <= tolerance:
            raise EngineError(
                f"bench.{name}.{key}: differs by {number(difference, significant=2)} of the largest element, more than "
                f"{number(tolerance, significant=1)}; layers that compute different things must not be compared by time"
            )
        worst = max(worst, difference)
    return worst
