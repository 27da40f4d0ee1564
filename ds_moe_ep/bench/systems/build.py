"""Builds the systems that are compared: DeepSpeed engines around the same model, in the processes of one world.

Every engine is DeepSpeed's own. What differs is the layer in the feed-forward slot, and for the baseline the pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from typing import Any, Protocol

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.layer import MoE as NativeMoE
from torch import Tensor, nn

from ds_moe_ep.bench.rivals.autoep import AutoEPSide, autoep_layer, emulate_experts
from ds_moe_ep.bench.rivals.cases import LayerCase
from ds_moe_ep.bench.rivals.emulated import EmulatedAttention, EmulatedDevice, EmulatedExpert, EmulatedExperts
from ds_moe_ep.bench.rivals.even import even_windows, route_evenly
from ds_moe_ep.bench.rivals.native import dropless
from ds_moe_ep.bench.systems.plan import EXPERT_SHARE, SystemsPlan
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.engine.layer import MoE
from ds_moe_ep.engine.pipeline import Pipeline, build_pipeline
from ds_moe_ep.engine.start import initialize
from ds_moe_ep.model.attention import CausalAttention
from ds_moe_ep.model.initialize import expert_index_of, first_value, global_name
from ds_moe_ep.model.text import load_corpus, training_batch
from ds_moe_ep.model.transformer import build_transformer
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.records.names import BASELINE

OURS = ("ep16", "ep16_serial")
Batch = tuple[Tensor, Tensor]


class Data(Protocol):
    """Where the sequences of a step come from."""

    def batch(self, step: int, first: int, count: int) -> Batch:
        """Token ids and targets [count, S] of the sequences `first` and following."""


@dataclass(frozen=True)
class Text:
    """Sequences of real text: the standard library's sources."""

    plan: SystemsPlan
    text: Tensor

    def batch(self, step: int, first: int, count: int) -> Batch:
        size = (count, self.plan.model.sequence_length)
        return training_batch(
            self.text, size, seed=self.plan.seed, step=step, first=first, num_sequences=self.plan.num_sequences
        )


@dataclass(frozen=True)
class EvenText:
    """Sequences whose tokens route evenly; the same in every step."""

    windows: Tensor

    def batch(self, step: int, first: int, count: int) -> Batch:
        here = self.windows[first : first + count]
        return here[:, :-1].contiguous(), here[:, 1:].contiguous()


def make_data(plan: SystemsPlan) -> Data:
    """The data of a run: text for real devices, evenly routed tokens for emulated ones."""
    if not plan.is_emulated:
        return Text(plan, load_corpus().train)
    model = plan.model
    return EvenText(even_windows(plan.num_sequences, model.sequence_length, model.vocab_size, plan.seed))


class System(Protocol):
    """One system on this rank. Its passes are collective over the world."""

    name: str
    engine: Any

    def train(self, step: int) -> object:
        """One optimizer step on the sequences of step `step`."""

    def forward(self, step: int) -> object:
        """One forward pass on the same sequences, without gradients."""

    def cross_entropy(self) -> Tensor:
        """The mean loss of the last training step, over all ranks."""

    def loads(self) -> Tensor:
        """Rows [L, E] of all ranks in the last training step."""


class ExpertParallelSystem:
    """A model whose ranks each take their part of the batch and share the experts."""

    def __init__(self, name: str, engine: Any, data: Data) -> None:
        self.name, self.engine, self._data = name, engine, data
        self._losses: list[Tensor] = []
        self._counts: list[Tensor] = []

    def train(self, step: int) -> None:
        self.engine.train()
        self._losses, self._counts = [], []
        for batch in self._batches(step):
            output = self.engine(*batch)
            self.engine.backward(output.loss)
            self.engine.step()
            self._losses.append(output.cross_entropy)
            self._counts.append(output.exp_counts_LE)

    @torch.no_grad()
    def forward(self, step: int) -> None:
        """In training mode, which computes the same here: recorders look at nothing else."""
        for batch in self._batches(step):
            self.engine(*batch)

    def cross_entropy(self) -> Tensor:
        loss = torch.stack(self._losses).mean()
        dist.all_reduce(loss)
        return loss / dist.get_world_size()

    def loads(self) -> Tensor:
        rows_LE = torch.stack(self._counts).sum(0)
        dist.all_reduce(rows_LE)
        return rows_LE

    def _batches(self, step: int) -> Iterator[Batch]:
        count, world_size = self.engine.train_micro_batch_size_per_gpu(), dist.get_world_size()
        for micro_step in range(self.engine.gradient_accumulation_steps()):
            first = (micro_step * world_size + dist.get_rank()) * count
            token_ids, targets = self._data.batch(step, first, count)
            yield token_ids.to(self.engine.device), targets.to(self.engine.device)


class PipelineSystem:
    """The baseline under DeepSpeed's pipeline engine."""

    def __init__(self, name: str, engine: Any, data: Data) -> None:
        self.name, self.engine, self._data = name, engine, data

    def train(self, step: int) -> None:
        self.engine.train_batch(self._batches(step))

    def forward(self, step: int) -> None:
        micro_batches = self.engine.gradient_accumulation_steps()
        self.engine.eval_batch(
            self._batches(step), compute_loss=True, bcast_loss=False, num_micro_batches=micro_batches
        )
        for block in self.engine.module.blocks:
            block.take_counts()

    def cross_entropy(self) -> Tensor:
        loss: Tensor = self.engine.agg_additional_losses["cross_entropy"]
        return loss

    def loads(self) -> Tensor:
        model: Pipeline = self.engine.module
        here = {block.index: block.take_counts() for block in model.blocks}
        num_experts = len(next(iter(here.values())))
        num_layers = self.engine.grid.pipe_parallel_size * len(here)
        rows_LE = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=self.engine.device)
        if self.engine.grid.get_slice_parallel_rank() == 0:  # the others of its tensor group counted the same rows
            for index, rows_E in here.items():
                rows_LE[index] = rows_E
        dist.all_reduce(rows_LE)
        return rows_LE

    def _batches(self, step: int) -> Iterator[Batch]:
        count, grid = self.engine.train_micro_batch_size_per_gpu(), self.engine.grid
        copies, copy = grid.get_data_parallel_world_size(), grid.get_data_parallel_rank()
        for micro_step in range(self.engine.gradient_accumulation_steps()):
            yield self._data.batch(step, (micro_step * copies + copy) * count, count)


def build_system(name: str, plan: SystemsPlan, data: Data, device: EmulatedDevice) -> System:
    """The system `name`, initialized by DeepSpeed. Collective over the world; the baseline comes last."""
    moe, ds_config, start = plan.moe(name), plan.ds_config(name), deepspeed.initialize
    model: nn.Module
    with redirect_stdout(StringIO()):  # DeepSpeed prints each group that it makes
        if name == BASELINE:
            model = build_pipeline(plan.model, moe, plan.layout, plan.seed)
        else:
            with torch.device(get_accelerator().current_device_name()):
                model = build_transformer(plan.model, moe, maker_of(name, plan))
            init_alike(model, plan, moe)
        if name in OURS:
            ds_config["moe_ep"], start = {"schedule": moe.schedule}, initialize
        if plan.is_emulated:
            route_evenly(model, moe.num_experts)
        engine, *_ = start(model=model, config=ds_config)
    if plan.is_emulated:
        emulate(model, plan, device, shares=plan.layout.tp_size if name == BASELINE else 1)
    return (PipelineSystem if name == BASELINE else ExpertParallelSystem)(name, engine, data)


def maker_of(name: str, plan: SystemsPlan) -> Callable[..., nn.Module]:
    """What fills the feed-forward slots of the system `name`."""
    return MoE if name in OURS else NativeSide if name == "native_ep16" else partial(autoep_side, plan)


class NativeSide(nn.Module):
    """DeepSpeed's own MoE layer, dropless, with our weight on its auxiliary loss; it has no z-loss."""

    def __init__(self, hidden_size: int, expert: nn.Module, *, config: MoEConfig, shared: None) -> None:
        super().__init__()
        self.aux_loss_weight = config.aux_loss_weight
        self.native = dropless(hidden_size, expert, config.num_experts, config.ep_size, config.top_k)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y_BSD, l_aux, exp_counts_E = self.native(x_BSD)
        return y_BSD, self.aux_loss_weight * l_aux, exp_counts_E


class AutoEPSlot(nn.Module):
    """AutoEP's layer behind the model's protocol."""

    def __init__(self, side: nn.Module) -> None:
        super().__init__()
        self.side = side

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y_TD, l_aux, exp_counts_E = self.side(x_BSD.flatten(0, 1))
        return y_TD.view_as(x_BSD), l_aux, exp_counts_E


def autoep_side(
    plan: SystemsPlan, hidden_size: int, expert: nn.Module, *, config: MoEConfig, shared: None
) -> nn.Module:
    """AutoEP's layer of the same size: SwiGLU experts of 2/3 of the width (see autoep.py)."""
    case = LayerCase(
        name="slot",
        top_k=config.top_k,
        load="random",
        hidden_size=hidden_size,
        width=plan.model.expert_width,
        num_experts=config.num_experts,
    )
    return AutoEPSlot(autoep_layer(case, config.ep_size))


def init_alike(model: nn.Module, plan: SystemsPlan, moe: MoEConfig) -> None:
    """The first values of one device, in whichever layer; AutoEP's experts, of another shape, keep their own."""
    index = expert_index_of(dist.get_rank() % plan.ep_size, moe.num_local_experts)
    for name, parameter in model.named_parameters():
        if ".autoep.experts." not in name:
            plain = name.replace("native.", "").replace("side.autoep.router.gate.", "gate.wg.")
            value = first_value(global_name(plain, index), parameter.shape, plan.seed, plan.model.num_layers)
            with torch.no_grad():
                parameter.copy_(value)


def emulate(model: nn.Module, plan: SystemsPlan, device: EmulatedDevice, shares: int) -> None:
    """Puts emulated attention and experts into an engine's model, which holds one of `shares` of each width."""
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
        elif isinstance(module, AutoEPSide):
            emulate_experts(module, expert)
