"""First values that do not depend on how the model is laid out.

Every parameter draws from a generator of its own, seeded by (seed, global name). A rank that holds expert 3
of 16 as its only one draws for it what a single device draws, so EP=1, 4 and 16 start equal.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable

import torch
from torch import nn

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.model.transformer import Layer

RESIDUAL_OUTPUTS = ("out.weight", "fc2.weight", "down.weight")  # what a layer adds to the residual stream

EMBEDDING_STD = 0.2  # with GPT-2's 0.02 tokens look alike at first, and one expert gets them all

LOCAL_EXPERT = re.compile(r"deepspeed_experts\.(\d+)\.")


def local_is_global(local_index: int) -> int:
    """The expert index of a rank that holds every expert."""
    return local_index


def expert_index_of(ep_rank: int, num_local_experts: int) -> Callable[[int], int]:
    """The map from local to global expert indices on place `ep_rank` of an expert-parallel group."""
    return lambda local_index: ep_rank * num_local_experts + local_index


def init_weights(model: nn.Module, seed: int, expert_index: Callable[[int], int] = local_is_global) -> None:
    """Sets every parameter of `model` to a value that depends only on `seed` and its global name.

    Matrices: normal, with the standard deviation sqrt(2 / (5 * inputs)) (arXiv 1910.05895), which at GPT-2's
    width is close to its 0.02; those that add to the residual stream are divided by sqrt(2 * layers), as in
    GPT-2. Embeddings: normal, EMBEDDING_STD. Norms start at one, biases at zero. Numbers are drawn on the host
    in fp32, so that device and dtype do not matter either. Local: no communication. Raises ConfigError for a
    parameter on the meta device.
    """
    num_layers = max(1, sum(isinstance(module, Layer) for module in model.modules()))
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ConfigError(
                f"{name} is on the device 'meta': it has a shape and no memory to fill; call "
                "model.to_empty(device=...) first"
            )
        value = first_value(global_name(name, expert_index), parameter.shape, seed, num_layers)
        with torch.no_grad():
            parameter.copy_(value)


def global_name(name: str, expert_index: Callable[[int], int] = local_is_global) -> str:
    """The parameter's name on a single device: global expert index, without the engine's own level."""
    return renumbered(name.replace("deepspeed_moe.", ""), expert_index)


def renumbered(name: str, expert_index: Callable[[int], int]) -> str:
    """The name of an expert's tensor with another index of the expert; other names as they are."""
    return LOCAL_EXPERT.sub(lambda match: f"deepspeed_experts.{expert_index(int(match[1]))}.", name)


def first_value(name: str, shape: torch.Size, seed: int, num_layers: int) -> torch.Tensor:
    """The fp32 value on the host that the parameter of this global name starts from."""
    if len(shape) < 2:
        return torch.ones(shape, device="cpu") if name.endswith("weight") else torch.zeros(shape, device="cpu")
    std = EMBEDDING_STD if name.endswith("embedding.weight") else math.sqrt(2 / (5 * shape[-1]))
    if name.endswith(RESIDUAL_OUTPUTS):
        std /= math.sqrt(2 * num_layers)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(shape, generator=generator, device="cpu").mul_(std)
