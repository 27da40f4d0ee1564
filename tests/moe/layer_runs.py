"""Our layer on layer cases: what each rank executes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe_ep.comm.open import open_transport
from ds_moe_ep.comm.transport import Transport
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus, torus_of
from ds_moe_ep.moe.experts import Experts
from ds_moe_ep.moe.layer import ExpertParallel
from tests.moe.faulty_transports import Lossy
from tests.moe.layer_cases import CaseData, D, LayerCase, LayerResult, case_data, make_expert

TAMPERS = ("perturb a weight", "swap two ranks", "lose a row")


class Links:
    """The transports of one rank: communicators are made once for each grouping."""

    def __init__(self) -> None:
        self._open: dict[tuple[int, str, bool], Transport] = {}

    def of(self, case: LayerCase) -> Transport:
        key = (case.config.ep_size, case.config.transport, case.config.two_level != "off")
        if key not in self._open:
            self._open[key] = open_transport(case.groups, case.config)
        return self._open[key]


def run_cases(cases: Sequence[LayerCase], tamper: str = "") -> list[LayerResult]:
    """Each case's result on this rank; `tamper` is one of TAMPERS, for negative controls."""
    links = Links()
    return [run_case(case, links.of(case), tamper=tamper) for case in cases]


def run_case(case: LayerCase, transport: Transport, tamper: str = "") -> LayerResult:
    """Forward and backward of one case over a transport."""
    data = case_data(case)
    experts = experts_of(case.expert, case.config.num_local_experts, case.dtype)
    layer = build_layer(case, data, tamper, experts)
    layer.connect(Lossy(transport) if tamper == "lose a row" else transport, torus_for(case))
    return forward_backward(layer, case, data)


def torus_for(case: LayerCase) -> Torus:
    """The group's ranks on nodes of the case's node_size."""
    return torus_of(case.groups[0], case.config.node_size)


@functools.cache
def experts_of(kind: str, num_local: int, dtype: torch.dtype) -> Experts:
    """Experts that all layers of this rank have in turn: to read the mathematics of others takes as long as a pass."""
    return Experts(make_expert(kind), num_local).to(dtype)


def build_layer(case: LayerCase, data: CaseData, tamper: str = "", experts: Experts | None = None) -> ExpertParallel:
    """The layer with this rank's share of the case's weights, not yet connected. Experts are its own unless given."""
    shared = make_expert(case.expert) if case.shared else None
    template = nn.Module() if experts is not None else make_expert(case.expert)
    layer = ExpertParallel(D, template, case.config, shared=shared).to(case.dtype)
    if experts is not None:
        experts.zero_grad()
        layer.experts = experts
    if shared is not None:
        shared.load_state_dict(data.shared)
    place = dist.get_rank() % case.config.ep_size if dist.is_initialized() else 0
    if tamper == "swap two ranks" and place < 2:
        place = 1 - place
    first = place * case.config.num_local_experts
    with torch.no_grad():
        layer.gate.wg.weight.copy_(data.gate_ED)
        if layer.gate.balance is not None:
            layer.gate.balance.steps_E.copy_(data.bias_steps_E)
        for local, expert in enumerate(layer.experts.deepspeed_experts):
            expert.load_state_dict(data.experts[first + local])
        if tamper == "perturb a weight" and place == case.config.ep_size - 1:
            for parameter in layer.experts.deepspeed_experts[-1].parameters():
                parameter.view(-1)[0] += 0.5
    return layer.train(case.training)


def forward_backward(
    layer: ExpertParallel,
    case: LayerCase,
    data: CaseData,
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None,
) -> LayerResult:
    """One pass over this rank's shard; `forward` stands in for the layer's own call."""
    rank = dist.get_rank()
    x = data.inputs[rank].clone().requires_grad_()
    used = data.used_tokens[rank] if data.used_tokens is not None else None
    output, l_aux, counts = (forward or layer)(x, used)
    ((output * data.output_grads[rank]).sum() + l_aux).backward()
    return gather_result(layer, case, x, output, l_aux, counts)


def gather_result(
    layer: ExpertParallel, case: LayerCase, x: Tensor, output: Tensor, l_aux: Tensor, counts: Tensor
) -> LayerResult:
    """The layer's gradients after the pass, by global expert."""
    first = dist.get_rank() % case.config.ep_size * case.config.num_local_experts
    experts: dict[int | str, nn.Module] = {first + i: e for i, e in enumerate(layer.experts.deepspeed_experts)}
    if layer.shared is not None:
        experts["shared"] = layer.shared
    grads = {key: {name: _grad(p) for name, p in expert.named_parameters()} for key, expert in experts.items()}
    return LayerResult(output.detach(), l_aux.detach(), counts.tolist(), _grad(x), _grad(layer.gate.wg.weight), grads)


def _grad(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.detach().clone()


def config(**knobs: object) -> MoEConfig:
    """A configuration for small cases: 8 experts and groups of peers unless said otherwise."""
    return MoEConfig(**({"num_experts": 8, "min_capacity": 2, "schedule": "peers"} | knobs))
