"""The one-device model as the modules of a pipeline: embedding, layers, head.

A pipeline sends one tensor from stage to stage, since DeepSpeed runs a backward pass for each tensor that it sent. So
the sum of the routing losses travels as one more column of the tokens, rounded to their type, and its gradient is the
engine's loss scale over the micro-batches: in fp16 that must stay below 65,504, or the step overflows and the scale is
lowered. Inside a stage tokens and losses are two tensors and nothing is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.model.attention import rotation_of
from ds_moe_ep.model.transformer import Transformer, run_layer

Carried = tuple[Tensor, Tensor]  # tokens [B, S, D], and the routing losses of the layers so far []


def stage_modules(model: Transformer, num_stages: int) -> list[list[nn.Module]]:
    """The modules of each stage, which share the model's parameters: equally many layers per stage.

    Run one after the other, they compute (logits [B, S, V], routing losses []) of token ids [B, S]. Raises ConfigError
    where the layers cannot be shared equally.
    """
    if len(model.layers) % num_stages:
        raise ConfigError(
            f"pipeline stages={num_stages} cannot share {len(model.layers)} layers equally; change one of them"
        )
    per_stage = len(model.layers) // num_stages
    blocks: list[nn.Module] = [Block(model, index) for index in range(len(model.layers))]
    stages = [blocks[start : start + per_stage] for start in range(0, len(blocks), per_stage)]
    stages[0].insert(0, Entry(model.embedding))
    stages[-1].append(Exit(model.final_norm, model.head))
    for stage in stages[:-1]:
        stage[-1].register_forward_hook(lambda _, inputs, carried: pack(carried))
    for stage in stages[1:]:
        stage[0].register_forward_pre_hook(lambda _, inputs: (unpack(inputs[0], model.config.hidden_size),))
    return stages


class Entry(nn.Module):
    """Token ids [B, S] -> tokens [B, S, D] and no losses yet."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, token_ids_BS: Tensor) -> Carried:
        x_BSD = self.embedding(token_ids_BS)
        return x_BSD, x_BSD.new_zeros((), dtype=torch.float32)


class Block(nn.Module):
    """One layer of the model, with its recomputation; `counts_E` are its rows since the last `take_counts`."""

    def __init__(self, model: Transformer, index: int) -> None:
        super().__init__()
        self.index = index
        self.layer = model.layers[index]
        self.counts_E: Tensor | None = None
        self._head_size, self._recompute = model.head_size, model.config.recompute

    def forward(self, carried: Carried) -> Carried:
        x_BSD, losses = carried
        rotation = rotation_of(x_BSD.shape[1], self._head_size, x_BSD.device)
        y_BSD, l_aux, counts_E = run_layer(self.layer, x_BSD, rotation, recompute=self._recompute)
        self.counts_E = counts_E if self.counts_E is None else self.counts_E + counts_E
        return y_BSD, losses + l_aux.float()

    def take_counts(self) -> Tensor:
        """The rows [E] that each expert got since the last call: those of whole micro-batches, on every rank alike."""
        assert self.counts_E is not None, "no pass ran"
        counts_E, self.counts_E = self.counts_E, None
        return counts_E


class Exit(nn.Module):
    """Tokens [B, S, D] -> logits [B, S, V]; the losses pass."""

    def __init__(self, final_norm: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.final_norm, self.head = final_norm, head

    def forward(self, carried: Carried) -> Carried:
        x_BSD, losses = carried
        return self.head(self.final_norm(x_BSD)), losses


def name_on_one_device(module: nn.Module, name: str) -> str:
    """The name in the whole model of the parameter `name` of a stage's module."""
    return f"layers.{module.index}.{name.removeprefix('layer.')}" if isinstance(module, Block) else name


def pack(carried: Carried) -> Tensor:
    """Tokens [B, S, D] and losses [] as one tensor [B, S*D + 1], in the tokens' type."""
    x_BSD, losses = carried
    column_B1 = torch.cat((losses.to(x_BSD.dtype).view(1), x_BSD.new_zeros(len(x_BSD) - 1)))[:, None]
    return torch.cat((x_BSD.flatten(1), column_B1), dim=1)


def unpack(packed: Tensor, hidden_size: int) -> Carried:
    """The values that `pack` was given."""
    x_BSD = packed[:, :-1].unflatten(1, (-1, hidden_size)).contiguous()
    return x_BSD, packed[:, -1].sum().float()
