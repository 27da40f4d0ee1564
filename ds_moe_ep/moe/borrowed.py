"""Experts that live in somebody else's layer: their parameters stay where they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ds_moe_ep.moe.experts import start_pass
from ds_moe_ep.moe.recognise import Form
from ds_moe_ep.moe.split_experts import ExpertPass, Opaque, OpaquePass, Span, Weights


class KnownExperts:
    """Experts of a known form, given by their weights: a mapping an expert, in the order of its gradients."""

    def __init__(self, form: Form, weights: Sequence[Weights]) -> None:
        self._form, self._weights = form, weights

    def expert_parameters(self) -> list[Tensor]:
        return [tensor for named in self._weights for tensor in named.values() if tensor is not None]

    def start(self, spans: Sequence[Span], keep_graph: bool) -> ExpertPass:
        return start_pass(self._form, self._weights, spans)

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

    def start(self, spans: Sequence[Span], keep_graph: bool) -> ExpertPass:
        return OpaquePass([Opaque(partial(self._call, each), each.parameters) for each in self._experts], keep_graph)

    def _call(self, expert: Opaque, rows_nD: Tensor) -> Tensor:
        y_nD = expert.call(rows_nD)
        self.output_type = y_nD.dtype
        return y_nD

    def buffers(self) -> Iterator[Tensor]:
        return iter(self._buffers)
