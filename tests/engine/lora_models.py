"""The small model with PEFT's LoRA adapters on its experts, on ranks and on one device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.engine.small_model import Job, SmallModel, batches, make_layer, named_weights, train_steps

TRAINED = ("lora_", "enter.", "leave.", "wg.")  # parts of names: adapters, and dense parameters beside them


@dataclass(frozen=True)
class Adapted:
    """Results of a run with adapters on one rank."""

    losses: list[float]
    weights: dict[str, Tensor]
    base_before: dict[str, Tensor]
    outputs: dict[str, Tensor]  # of the first batch: trained, merged, unmerged, and merged for good
    forms: tuple[bool, bool]  # whether the experts ran as split products: with adapters, and merged for good


def adapt(model: nn.Module) -> nn.Module:
    """The model with an adapter on each Linear of each expert; beside them dense parameters and the gate train."""
    adapted: nn.Module = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["fc1", "fc2"]))
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINED))
    return adapted


def run_adapted(jobs: Sequence[Job], marks_by_hand: bool = True) -> list[Adapted]:
    """Each job with adapters on this rank.

    DeepSpeed's layer marks what its experts had when it was made: adapters that came later get the marks by hand.
    """
    import deepspeed

    import ds_moe_ep
    from ds_moe_ep.model.initialize import init_weights

    deepspeed.init_distributed("gloo")
    results = []
    for job in jobs:
        model = adapt(SmallModel(lambda job=job: make_layer(job)))
        init_weights(model, job.seed, job.expert_index(dist.get_rank()))
        if job.layer == "native" and marks_by_hand:
            mark(model, f"ep_size_{job.ep_size}")
        before = named_weights(model, job)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        start = ds_moe_ep.initialize if job.door == "ds_moe_ep" and job.layer == "ours" else deepspeed.initialize
        engine = start(model=model, config=job.ds_config, model_parameters=trained)[0]
        losses = train_steps(engine, job, batches(job))
        weights = named_weights(engine.module, job)
        base = {name: value for name, value in before.items() if not any(part in name for part in TRAINED)}
        results.append(Adapted(losses, weights, base, *merge_and_unmerge(engine, job)))
    return results


def mark(model: nn.Module, group_name: str) -> None:
    """DeepSpeed's marks of an expert's parameter."""
    for name, parameter in model.named_parameters():
        if "deepspeed_experts" in name:
            parameter.allreduce, parameter.group_name = False, group_name


def merge_and_unmerge(engine: Any, job: Job) -> tuple[dict[str, Tensor], tuple[bool, bool]]:
    """The model's output with adapters, merged, unmerged and merged for good. Collective."""
    x = batches(job)[0][0][0][dist.get_rank()]
    outputs: dict[str, Tensor] = {}
    model = engine.module.eval()

    def look(name: str, module: nn.Module) -> None:
        with torch.no_grad():
            outputs[name] = forward(module, x)

    look("adapted", model.base_model.model)
    model.merge_adapter()
    look("merged", model.base_model.model)
    model.unmerge_adapter()
    look("unmerged", model.base_model.model)
    with_adapters = is_split(model)
    whole = model.merge_and_unload()
    look("merged for good", whole)
    return outputs, (with_adapters, is_split(whole))


def forward(model: SmallModel, x: Tensor) -> Tensor:
    """The model's output for tokens, without its loss."""
    hidden = model.enter(x)
    for norm, layer in zip(model.norms, model.layers, strict=True):
        hidden = hidden + layer(norm(hidden))[0]
    return model.leave(hidden)


def is_split(model: nn.Module) -> bool:
    """True where our experts run as split products now; False for DeepSpeed's layer."""
    for module in model.modules():
        if hasattr(module, "_forms"):
            return module._forms.common(list(module.deepspeed_experts)) is not None
    return False
