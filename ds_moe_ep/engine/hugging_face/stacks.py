"""Experts of a block in tensors that hold all of them, as gpt-oss's files do: out of these stacks, and into them.

Along the first dimension of a stack are the experts: gate_up_proj [E, D, 2 F] with gate and up in turn, down_proj
[E, F, D], and the biases of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.engine.checkpoint.own_experts import holders_of
from ds_moe_ep.engine.hugging_face.expert_block import ExpertBlock
from ds_moe_ep.engine.hugging_face.families import STACKS
from ds_moe_ep.errors import ExportError
from ds_moe_ep.kernels.activation import Clamp
from ds_moe_ep.moe.match_expert import match_expert


def into_stacks(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One expert's place in each stack, from its weights and biases by part."""
    return {
        "gate_up_proj": torch.stack((weights["gate.weight"].t(), weights["up.weight"].t()), -1).flatten(1),
        "gate_up_proj_bias": torch.stack((weights["gate.bias"], weights["up.bias"]), -1).flatten(),
        "down_proj": weights["down.weight"].t(),
        "down_proj_bias": weights["down.bias"],
    }


def out_of_stacks(places: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One expert's weights and biases by part, from its place in each stack."""
    gate_up_D2F, bias_2F = places["gate_up_proj"], places["gate_up_proj_bias"]
    return {
        "gate.weight": gate_up_D2F[:, 0::2].t(),
        "gate.bias": bias_2F[0::2],
        "up.weight": gate_up_D2F[:, 1::2].t(),
        "up.bias": bias_2F[1::2],
        "down.weight": places["down_proj"].t(),
        "down.bias": places["down_proj_bias"],
    }


@dataclass(frozen=True)
class BlockStacks:
    """The stacks of one block, whose experts lie on several ranks."""

    block: ExpertBlock

    def check(self, clamp: Clamp) -> None:
        """Raises ExportError where an expert of this rank computes something else than the files say. Local."""
        for local in range(self.block.num_local_experts):
            self.block.weights_of(local)
        experts = self.block.layer.deepspeed_moe.experts.deepspeed_experts
        odd = [form for expert in experts if (form := match_expert(expert)) is None or form.clamp != clamp]
        if odd:
            raise ExportError(
                f"{self.block.name}: config.json says {clamp}, and an expert computes with "
                f"{odd[0].clamp if odd[0] else None}; change the configuration's swiglu_alpha and swiglu_limit"
            )

    @property
    def names(self) -> list[str]:
        """Their names in files."""
        prefix, family = self.block.family.in_files(self.block.name), self.block.family
        return [f"{prefix}.{family.stack(part)}" for part in STACKS]

    def filled(self, is_writer: bool) -> dict[str, Tensor]:
        """The stacks by their names in files, in host memory, on the ranks that write; nothing on others.

        Collective over the world: each expert is broadcast by the first rank that holds it, one part at a time.
        """
        block, found = self.block, dict[str, Tensor]()
        holders = holders_of(block.layer) if int(block.layer.ep_size) > 1 else [0]
        for place, holder in enumerate(holders):
            for local in range(block.num_local_experts):
                parts = into_stacks(block.weights_of(local))
                for name, part in zip(self.names, parts.values(), strict=True):
                    there = part.detach().clone(memory_format=torch.contiguous_format)
                    dist.broadcast(there, src=holder)
                    if is_writer and name not in found:
                        found[name] = torch.empty(block.num_experts, *part.shape, dtype=part.dtype)
                    if is_writer:
                        found[name][place * block.num_local_experts + local] = there.cpu()
        return found
