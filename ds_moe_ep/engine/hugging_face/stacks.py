"""Experts of a block in tensors that hold all of them, as gpt-oss's files do: out of these stacks, and into them.

Along the first dimension of a stack are the experts: gate_up_proj [E, D, 2 F] with gate and up in turn, down_proj
[E, F, D], and the biases of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.engine.checkpoint.own_experts import holders_of
from ds_moe_ep.engine.hugging_face.checked_files import TensorForm, same
from ds_moe_ep.engine.hugging_face.expert_block import ExpertBlock
from ds_moe_ep.engine.hugging_face.families import STACKS
from ds_moe_ep.errors import ExportError
from ds_moe_ep.kernels.activation import Clamp
from ds_moe_ep.moe.match_expert import match_expert

PARTS = {
    "gate_up_proj": ("gate.weight", "up.weight"),
    "gate_up_proj_bias": ("gate.bias", "up.bias"),
    "down_proj": ("down.weight",),
    "down_proj_bias": ("down.bias",),
}  # of an expert, in its places in the stacks


def into_stack(part: str, weights: Mapping[str, Tensor]) -> Tensor:
    """One expert's place in a stack, in memory of its own, from its weights and biases by part."""
    if part == "gate_up_proj":
        return torch.stack((weights["gate.weight"].t(), weights["up.weight"].t()), -1).flatten(1)
    if part == "gate_up_proj_bias":
        return torch.stack((weights["gate.bias"], weights["up.bias"]), -1).flatten()
    place = weights["down.weight"].t() if part == "down_proj" else weights["down.bias"]
    return place.clone(memory_format=torch.contiguous_format)


def out_of_stack(part: str, place: Tensor) -> dict[str, Tensor]:
    """Weights or biases of one expert by part, from its place in a stack."""
    if part == "gate_up_proj":
        return {"gate.weight": place[:, 0::2].t(), "up.weight": place[:, 1::2].t()}
    if part == "gate_up_proj_bias":
        return {"gate.bias": place[0::2], "up.bias": place[1::2]}
    return {"down.weight": place.t()} if part == "down_proj" else {"down.bias": place}


@dataclass(frozen=True)
class BlockStacks:
    """The stacks of one block, whose experts lie on several ranks; `read` gives a weight as it is to be written."""

    block: ExpertBlock
    read: Callable[[Tensor], Tensor] = same

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

    @property
    def forms(self) -> dict[str, TensorForm]:
        """Types and shapes of the stacks by their names in files."""
        weights = {name: torch.empty_like(weight, device="meta") for name, weight in self.block.weights_of(0).items()}
        places = (into_stack(part, weights) for part in STACKS)
        return {
            name: TensorForm(place.dtype, (self.block.num_experts, *place.shape), is_stack=True)
            for name, place in zip(self.names, places, strict=True)
        }

    def places(self) -> Iterator[tuple[str, int, Tensor]]:
        """The name of a stack, the index of an expert and its place there, of all ranks' experts on every rank.

        Collective over the world: each expert is broadcast by the first rank that holds it, one part at a time.
        """
        block = self.block
        holders = holders_of(block.layer) if int(block.layer.ep_size) > 1 else [0]
        for first, holder in enumerate(holders):
            for local in range(block.num_local_experts):
                own = {name: weight.detach() for name, weight in block.weights_of(local).items()}
                read = self.read if dist.get_rank() == holder else same
                for name, part in zip(self.names, STACKS, strict=True):
                    place = into_stack(part, {each: read(own[each]).to(own[each].device) for each in PARTS[part]})
                    dist.broadcast(place, src=holder)
                    yield name, first * block.num_local_experts + local, place

    def filled(self, is_writer: bool) -> dict[str, Tensor]:
        """The stacks by their names in files, in host memory, on ranks that write; nothing on others. Collective."""
        found: dict[str, Tensor] = {}
        for name, form in self.forms.items() if is_writer else ():
            found[name] = torch.empty(form.shape, dtype=form.dtype)
        for name, index, place in self.places():
            if is_writer:
                found[name][index] = place.cpu()
        return found
