"""Builds the systems that are compared: DeepSpeed engines around the same model, in the processes of one world.

Every engine is DeepSpeed's own. What differs is the layer in the feed-forward slot, and for the baseline the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from functools import partial
from io import StringIO

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
from ds_moe_ep.bench.systems.plan import EXPERT_SHARE, OURS, SystemsPlan
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.engine.layer import MoE
from ds_moe_ep.engine.pipeline import build_pipeline
from ds_moe_ep.engine.start import initialize
from ds_moe_ep.model.attention import CausalAttention
from ds_moe_ep.model.initialize import expert_index_of, first_value, global_name
from ds_moe_ep.model.transformer import build_transformer
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.records.names import BASELINE


def build(name: str, plan: SystemsPlan, data: Data, device: EmulatedDevice) -> SystemCandidate:
    """The system `name`, initialized by DeepSpeed. Collective over the world; the baseline comes last."""
    with redirect_stdout(StringIO()):  # DeepSpeed prints each group that it makes
        return BUILDERS[name](name, plan, data, device)


def _baseline(name: str, plan: SystemsPlan, data: Data, device: EmulatedDevice) -> SystemCandidate:
    model = build_pipeline(plan.model, plan.moe(name), plan.layout, plan.seed)
    if plan.is_emulated:
        route_evenly(model, plan.moe(name).num_experts)
    engine, *_ = deepspeed.initialize(model=model, config=plan.ds_config(name))
    emulate(model, plan, device, shares=plan.layout.tp_size)
    return PipelineCandidate(name, engine, data, device, plan)


def _autoep(name: str, plan: SystemsPlan, data: Data, device: EmulatedDevice) -> SystemCandidate:
    return _expert_parallel(partial(AutoEPSlot, plan.model.expert_width), name, plan, data, device)


def _expert_parallel(
    make_layer: Callable[..., nn.Module], name: str, plan: SystemsPlan, data: Data, device: EmulatedDevice
) -> SystemCandidate:
    """A model with `make_layer` in its feed-forward slots."""
    moe, ds_config = plan.moe(name), plan.ds_config(name)
    with torch.device(get_accelerator().current_device_name()):
        model = build_transformer(plan.model, moe, make_layer)
    init_alike(model, plan, moe)
    if plan.is_emulated:
        route_evenly(model, moe.num_experts)
    if name in OURS:
        engine, *_ = initialize(model=model, config=ds_config | {"moe_ep": {"schedule": moe.schedule}})
    else:
        engine, *_ = deepspeed.initialize(model=model, config=ds_config)
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


def emulate(model: nn.Module, plan: SystemsPlan, device: EmulatedDevice, shares: int = 1) -> None:
    """Puts emulated attention and experts into an engine's model, which holds one of `shares` of each width.

    Nothing where devices are real.
    """
    if not plan.is_emulated:
        return
    row_us, token_us = (part * plan.token_us / shares for part in (EXPERT_SHARE, 1 - EXPERT_SHARE))
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
    BASELINE: _baseline,
    **{name: partial(_expert_parallel, MoE) for name in OURS},
    "native_ep16": partial(_expert_parallel, NativeSlot),
    "autoep_ep16": _autoep,
}
