"""Layers as candidates, by name: all of them with the weights of one case and the tokens of this rank.

    build("native", LayerSetup(case=case, rank=0, num_ranks=4)) -> LayerCandidate

DeepSpeed is imported by those that are made of it: it reads DS_ACCELERATOR then, and the demo does without.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import partial
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn

from ds_moe_ep.bench.candidates.cases import LayerCase, expert_weights, gate_weight, output_gradient, tokens
from ds_moe_ep.bench.candidates.emulated import EmulatedExpert, EmulatedExperts
from ds_moe_ep.comm.recorder import HostRecorder
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.schedule.shaping import ALIKE, SCHEDULES, WIRE
from ds_moe_ep.schedule.spans import overlap

NATIVE, AUTOEP, HOOKED, PLAIN = "native", "autoep", "hooked native", "all-to-all-v"
OURS: Mapping[str, Mapping[str, Any]] = {"auto": {"schedule": "auto", **ALIKE}, **SCHEDULES}
REPLICAS, BIAS, NO_REMEDY = "replicas", "bias", "peers, 2 cuts"  # remedies of unequal loads, and their schedule
CHEAP_COPIES = "replicas, cheap copies"  # as priced where no ranks share a core
REMEDIES: Mapping[str, Mapping[str, Any]] = {
    REPLICAS: {**SCHEDULES[NO_REMEDY], "replicas": 1},
    CHEAP_COPIES: {**SCHEDULES[NO_REMEDY], "replicas": 1, "replica_pass_share": 1 / 128},
    BIAS: {**SCHEDULES[NO_REMEDY], "balance": "bias"},
}
TWO_LEVEL: Mapping[str, Mapping[str, Any]] = {  # one copy per token and far node
    f"{schedule}, {kind}": {**SCHEDULES[schedule], "two_level": kind}
    for schedule in ("peers", "serial")
    for kind in ("copies", "sums")
}
CPU = torch.device("cpu")
PHASES = ("forward", "backward", "step")


@dataclass(frozen=True, kw_only=True)
class LayerSetup:
    """A case on one rank of a world that shares the layer's experts."""

    case: LayerCase
    rank: int
    num_ranks: int
    node_size: int = 0  # ranks of a node; 0: as the hosts are
    row_us: float | None = None  # what an emulated expert takes for one row, forward; None: experts compute
    device: torch.device = CPU
    aux_loss_weight: float = 0.0  # what a training loss multiplies l_aux with
    is_recorded: bool = False  # transfers are, where the package moves the rows


@dataclass
class LayerCandidate:
    """One layer on this rank with its tokens; `run` leaves the seconds of its passes."""

    layer: nn.Module
    x_TD: Tensor
    dy_TD: Tensor
    aux_loss_weight: float = 0.0
    recorder: HostRecorder | None = None
    seconds: dict[str, float] = field(default_factory=dict)

    def prepare(self) -> None:
        """Drops every gradient, as an optimizer's zero_grad does."""
        self.x_TD.grad = None
        for parameter in self.layer.parameters():
            parameter.grad = None

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        """(y_TD, l_aux, exp_counts_E) of one forward and backward; gradients are left on the leaves."""
        start_s = time.perf_counter()
        y_TD, l_aux, exp_counts_E = self.layer(self.x_TD)
        middle_s = time.perf_counter()
        outputs, gradients = [y_TD], [self.dy_TD]
        if l_aux.requires_grad:  # a bias balances without a loss
            outputs, gradients = [y_TD, l_aux], [self.dy_TD, torch.full_like(l_aux, self.aux_loss_weight)]
        torch.autograd.backward(outputs, gradients)
        if self.x_TD.is_cuda:
            torch.cuda.synchronize()
        stop_s = time.perf_counter()
        self.seconds = dict(zip(PHASES, (middle_s - start_s, stop_s - middle_s, stop_s - start_s), strict=True))
        return y_TD, l_aux, exp_counts_E

    def traffic(self) -> Iterator[tuple[str, float, float]]:
        """(pass, total and exposed seconds of its transfers) of the last run, where they were recorded."""
        spans = self.recorder.spans() if self.recorder is not None else []
        for phase in PHASES if spans else ():
            found = overlap(span for span in spans if phase in ("step", span.tags.phase))
            yield phase, 1e-6 * found.total_us, 1e-6 * found.exposed_us


def build(name: str, setup: LayerSetup) -> LayerCandidate:
    """The layer `name` of LAYERS with the case's weights and this rank's tokens. Collective."""
    with redirect_stdout(StringIO()):  # DeepSpeed prints each group that it makes
        layer = LAYERS[name](setup)
    return candidate_of(layer, setup)


def candidate_of(layer: nn.Module, setup: LayerSetup) -> LayerCandidate:
    """`layer` on the setup's device with the rank's tokens; a recorder sees its transfers, where it is to."""
    layer.to(setup.device)
    x_TD = tokens(setup.case, setup.rank).to(setup.device).requires_grad_()
    dy_TD = output_gradient(setup.case, setup.rank).to(setup.device)
    recorder = None
    if setup.is_recorded and (dispatcher := dispatcher_of(layer)) is not None:
        recorder = HostRecorder(setup.rank)
        dispatcher.record(recorder)
    return LayerCandidate(layer, x_TD, dy_TD, setup.aux_loss_weight, recorder)


def load_weights(layer: nn.Module, setup: LayerSetup) -> nn.Module:
    """`layer`, whose gate and experts have the case's weights now; emulated experts have none."""
    experts = list(experts_of(layer)) if setup.row_us is None else []
    first = (setup.rank % setup.num_ranks) * len(experts)
    with torch.no_grad():
        gate_of(layer).weight.copy_(gate_weight(setup.case))
        for index, expert in enumerate(experts):
            values = expert_weights(setup.case, first + index).tensors()
            for parameter, value in zip(expert.parameters(), values, strict=True):
                parameter.copy_(value)
    return layer


def gate_of(layer: nn.Module) -> nn.Linear:
    """The projection of a layer's gate."""
    return _inner(layer).get_submodule("gate.wg")  # type: ignore[return-value]


def experts_of(layer: nn.Module) -> nn.ModuleList:
    """This rank's experts."""
    return _inner(layer).get_submodule("experts.deepspeed_experts")  # type: ignore[return-value]


def _inner(layer: nn.Module) -> nn.Module:
    """The layer without DeepSpeed's wrapper around it."""
    return getattr(layer, "deepspeed_moe", layer)


def dispatcher_of(layer: nn.Module) -> Any:
    """The dispatcher of the layer, or of its hooks; None where this package moves no rows of it."""
    inner = _inner(layer)
    return getattr(getattr(inner, "overlap", inner), "dispatcher", None)


def _own(knobs: Mapping[str, Any], setup: LayerSetup) -> nn.Module:
    """The package's layer on the schedule of `knobs`."""
    from ds_moe_ep.engine.layer import MoE
    from ds_moe_ep.moe.experts import GeluMLP

    case = setup.case
    config = MoEConfig(
        num_experts=case.num_experts, ep_size=setup.num_ranks, node_size=setup.node_size, top_k=case.top_k, **knobs
    )
    layer = MoE(case.hidden_size, GeluMLP(case.hidden_size, case.width, bias=True), config=config)
    layer.set_deepspeed_parallelism()
    if setup.row_us is not None:
        travelling = 2 * case.hidden_size * case.width if config.replicas else 0  # numbers of an expert
        layer.deepspeed_moe.experts = EmulatedExperts(config.num_local_experts, setup.row_us, num_weights=travelling)
    return load_weights(layer, setup)


def _native(setup: LayerSetup) -> nn.Module:
    """DeepSpeed's own layer."""
    from ds_moe_ep.bench.candidates.native import native_layer

    expert = None if setup.row_us is None else EmulatedExpert(setup.row_us)
    return load_weights(native_layer(setup.case, setup.num_ranks, expert), setup)


def _hooked(setup: LayerSetup) -> nn.Module:
    """DeepSpeed's own layer with the hooks, on the schedule "peers, 2 cuts"."""
    from ds_moe_ep.engine.hooks.attach import attach_overlap
    from ds_moe_ep.engine.hooks.layer import TRAFFIC

    layer = _native(setup)
    knobs = {name: value for name, value in OURS["peers, 2 cuts"].items() if name in TRAFFIC}  # the layer is as it is
    attach_overlap(layer, {**knobs, "node_size": setup.node_size})
    return layer


def _autoep(setup: LayerSetup) -> nn.Module:
    """DeepSpeed's AutoEP, which takes its weights when it is made."""
    from ds_moe_ep.bench.candidates.autoep import autoep_layer, emulate_experts

    layer = autoep_layer(setup.case, setup.num_ranks)
    if setup.row_us is not None:
        emulate_experts(layer, EmulatedExpert(setup.row_us))
    return layer


def _plain(setup: LayerSetup) -> nn.Module:
    """Two all-to-all-v and nothing else."""
    from ds_moe_ep.bench.candidates.all_to_all import AllToAllLayer

    return load_weights(AllToAllLayer(setup.case, setup.num_ranks), setup)


def _wire(setup: LayerSetup) -> nn.Module:
    """Serial with experts that take no time: the traffic alone."""
    return _own(OURS["serial"], replace(setup, row_us=0.0))


LAYERS: Mapping[str, Callable[[LayerSetup], nn.Module]] = {
    **{name: partial(_own, knobs) for name, knobs in {**OURS, **REMEDIES, **TWO_LEVEL}.items()},
    "overlapped": partial(_own, OURS["peers"]),
    HOOKED: _hooked,
    NATIVE: _native,
    AUTOEP: _autoep,
    PLAIN: _plain,
    WIRE: _wire,
}
