"""Builds the systems that are compared: DeepSpeed engines around the same model, in the processes of one world.

Every engine is DeepSpeed's own. What differs is the layer in the feed-forward slot, and for the baseline the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.layer import MoE as NativeMoE
from torch import Tensor, nn

from ds_moe_ep.bench.candidates.autoep import AutoEPLayer, autoep_layer, emulate_experts
from ds_moe_ep.bench.candidates.cases import LayerCase
from ds_moe_ep.bench.candidates.emulated import EmulatedAttention, EmulatedDevice, EmulatedExpert, EmulatedExperts
from ds_moe_ep.bench.candidates.even import route_evenly
from ds_moe_ep.bench.candidates.native import dropless
from ds_moe_ep.bench.systems.candidate import ExpertParallelCandidate, PipelineCandidate, SystemCandidate
from ds_moe_ep.bench.systems.data import Data
from ds_moe_ep.bench.systems.plan import CUTS, EXPERT_SHARE, OURS, SystemsPlan
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.engine.layer import MoE
from ds_moe_ep.engine.layouts.known_groups import forget_groups
from ds_moe_ep.engine.pipeline import build_pipeline
from ds_moe_ep.engine.start import initialize
from ds_moe_ep.model.attention import CausalAttention
from ds_moe_ep.model.initialize import expert_index_of, first_value, global_name
from ds_moe_ep.model.transformer import build_transformer
from ds_moe_ep.moe.layer import ExpertParallel


def build(name: str, plan: SystemsPlan, data: Data, device: EmulatedDevice) -> SystemCandidate:
    """The system `name`, initialized by DeepSpeed. Collective over the world; systems that are cut come last."""
    with redirect_stdout(StringIO()):  # DeepSpeed prints each group that it makes
        return BUILDERS[name](name, plan, data, device)


def _cut(name: str, plan: SystemsPlan, data: Data, device: EmulatedDevice) -> SystemCandidate:
    """The model under DeepSpeed's pipeline engine."""
    forget_groups()  # two layouts have other ranks in groups of one name
    moe, layout = plan.moe(name), plan.cuts[name].layout
    model = build_pipeline(plan.model, moe, layout, plan.seed)
    if plan.is_emulated:
        route_evenly(model, moe.num_experts)
    engine = _engine(name, model, plan)
    emulate(model, plan, device, layout.tp_size, layout.tp_size if moe.ep_size == 1 else 1)
    return PipelineCandidate(name, engine, data, device, plan)


def _engine(name: str, model: nn.Module, plan: SystemsPlan) -> Any:
    """DeepSpeed's engine of a system, by our door where it has our layers."""
    ds_config = plan.ds_config(name)
    if name in OURS:
        engine, *_ = initialize(model=model, config=ds_config | {"moe_ep": {"schedule": plan.moe(name).schedule}})
    else:
        engine, *_ = deepspeed.initialize(model=model, config=ds_config)
    return engine


def _autoep(name: str, plan: SystemsPlan, data: Data, device: EmulatedDevice) -> SystemCandidate:
    return _expert_parallel(partial(AutoEPSlot, plan.model.expert_width), name, plan, data, device)


def _expert_parallel(
    make_layer: Callable[..., nn.Module], name: str, plan: SystemsPlan, data: Data, device: EmulatedDevice
) -> SystemCandidate:
    """A model with `make_layer` in its feed-forward slots."""
    moe = plan.moe(name)
    with torch.device(get_accelerator().current_device_name()):
        model = build_transformer(plan.model, moe, make_layer)
    init_alike(model, plan, moe)
    if plan.is_emulated:
        route_evenly(model, moe.num_experts)
    engine = _engine(name, model, plan)
    emulate(model, plan, device)
    return ExpertParallelCandidate(name, engine, data, device, plan)


class NativeSlot(nn.Module):
    """DeepSpeed's own MoE layer, dropless, with our weight on its auxiliary loss; it has no z-loss."""

    def __init__(self, hidden_size: int, expert: nn.Module, *, config: MoEConfig, shared: None) -> None:
        super().__init__()
        self.aux_loss_weight = config.aux_loss_weight
        self.native = dropless(hidden_size, expert, config.num_experts, config.ep_size, config.top_k)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y_BSD, l_aux, exp_counts_E = self.native(x_BSD)
        return y_BSD, self.aux_loss_weight * l_aux, exp_counts_E


class AutoEPSlot(nn.Module):
    """AutoEP's layer of the same size: SwiGLU experts of 2/3 of the width (see candidates/autoep.py)."""

    def __init__(self, width: int, hidden_size: int, expert: nn.Module, *, config: MoEConfig, shared: None) -> None:
        super().__init__()
        sizes = {"hidden_size": hidden_size, "width": width, "num_experts": config.num_experts}
        case = LayerCase(name="slot", top_k=config.top_k, load="random", **sizes)
        self.layer = autoep_layer(case, config.ep_size)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y_TD, l_aux, exp_counts_E = self.layer(x_BSD.flatten(0, 1))
        return y_TD.view_as(x_BSD), l_aux, exp_counts_E


def init_alike(model: nn.Module, plan: SystemsPlan, moe: MoEConfig) -> None:
    """The first values of one device, in whichever layer; AutoEP's experts, of another shape, keep their own."""
    index = expert_index_of(dist.get_rank() % plan.ep_size, moe.num_local_experts)
    for name, parameter in model.named_parameters():
        if ".autoep.experts." not in name:
            plain = name.replace("native.", "").replace("layer.autoep.router.gate.", "gate.wg.")
            value = first_value(global_name(plain, index), parameter.shape, plan.seed, plan.model.num_layers)
            with torch.no_grad():
                parameter.copy_(value)


def emulate(
    model: nn.Module, plan: SystemsPlan, device: EmulatedDevice, attention_shares: int = 1, expert_shares: int = 1
) -> None:
    """Puts emulated attention and experts into an engine's model, which holds one of so many shares of each width.

    Nothing where devices are real.
    """
    if not plan.is_emulated:
        return
    row_us = EXPERT_SHARE * plan.token_us / expert_shares
    token_us = (1 - EXPERT_SHARE) * plan.token_us / attention_shares
    expert = EmulatedExpert(row_us, device)
    for module in list(model.modules()):
        if isinstance(module, CausalAttention):
            EmulatedAttention.take_over(module, token_us, device)
        elif isinstance(module, ExpertParallel):
            module.experts = EmulatedExperts(len(module.experts), row_us, device)
        elif isinstance(module, NativeMoE) and not isinstance(module, MoE):
            local = module.deepspeed_moe.experts.deepspeed_experts
            module.deepspeed_moe.experts.deepspeed_experts = nn.ModuleList(expert for _ in local)
        elif isinstance(module, AutoEPLayer):
            emulate_experts(module, expert)


BUILDERS: Mapping[str, Callable[[str, SystemsPlan, Data, EmulatedDevice], SystemCandidate]] = {
    **{name: partial(_expert_parallel, MoE) for name in OURS if name not in CUTS},
    **dict.fromkeys(CUTS, _cut),
    "native_ep16": partial(_expert_parallel, NativeSlot),
    "autoep_ep16": _autoep,
}
