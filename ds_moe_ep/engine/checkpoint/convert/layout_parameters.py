"""The parameters that an optimizer lists in each layout: order, names and shares, and names on one device."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from ds_moe_ep.config.knobs import Layout, ModelConfig, MoEConfig
from ds_moe_ep.engine.layer import MoE
from ds_moe_ep.model.initialize import LOCAL_EXPERT, global_name
from ds_moe_ep.model.transformer import build_transformer
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.parallel.stages import name_on_one_device, stage_modules
from ds_moe_ep.parallel.tensor import Share

WHOLE = Share(0, 1)


@dataclass(frozen=True)
class Listed:
    """A parameter in a rank's optimizer. `key` is its name there, `name` that on one device, `shape` its share's."""

    key: str
    name: str
    share: Share
    shape: tuple[int, ...]

    @property
    def is_of_expert(self) -> bool:
        return LOCAL_EXPERT.search(self.key) is not None


def pipeline_parameters(model: ModelConfig, moe: MoEConfig, layout: Layout) -> list[list[Listed]]:
    """Those of each model rank: a stage's tensor ranks follow each other."""
    with torch.device("meta"):
        stages = stage_modules(
            build_transformer(model, dataclasses.replace(moe, ep_size=1), ExpertParallel), layout.pp_size
        )
    found: list[list[Listed]] = []
    index = 0
    for modules in stages:
        numbered = list(enumerate(modules, start=index))
        index += len(modules)
        for tp_rank in range(layout.tp_size):
            share = Share(tp_rank, layout.tp_size)
            named = [
                (f"{number}.{key}", name_on_one_device(module, key), parameter)
                for number, module in numbered
                for key, parameter in module.named_parameters()
            ]
            found.append([Listed(key, name, share, tuple(share.of(value, name).shape)) for key, name, value in named])
    return found


def expert_parameters(model: ModelConfig, moe: MoEConfig, ep_size: int, ep_rank: int = 0) -> list[Listed]:
    """Those of a rank that shares experts with `ep_size - 1` others: the dense ones, and its experts behind them.

    Keys count experts over all ranks.
    """
    with torch.device("meta"):
        net = build_transformer(model, dataclasses.replace(moe, ep_size=ep_size), MoE)
    first = ep_rank * (moe.num_experts // ep_size)
    listed = [
        Listed(_key_over_all(name, first), global_name(name, lambda local: first + local), WHOLE, tuple(value.shape))
        for name, value in net.named_parameters()
    ]
    return [each for each in listed if not each.is_of_expert] + [each for each in listed if each.is_of_expert]


def _key_over_all(name: str, first: int) -> str:
    return LOCAL_EXPERT.sub(lambda match: f"deepspeed_experts.{first + int(match[1])}.", name)
