"""A small pipeline of a user's own, whose layers carry the routing losses as a second tensor, as Megatron's do.

Or as one more column of the tokens: DeepSpeed's reentrant recomputation goes backward once, and so takes one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe_ep.moe.experts import GeluMLP

D, E, NUM_TOKENS, NUM_MICRO_BATCHES = 8, 4, 12, 2
LOSS_WEIGHT = 0.5
Carried = tuple[Tensor, Tensor]


class Enter(nn.Module):
    """Tokens and no losses yet."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Carried:
        return self.dense(x), x.new_zeros(1)


class MoEBlock(nn.Module):
    """A residual MoE layer that adds its routing loss to those before it."""

    def __init__(self, make: Callable[..., nn.Module], **knobs: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.moe = make(D, GeluMLP(D, 16, bias=True), num_experts=E, drop_tokens=False, use_rts=False, **knobs)

    def forward(self, carried: Carried) -> Carried:
        x, losses = carried
        y, l_aux, _ = self.moe(self.norm(x))
        return x + y, losses + l_aux


class DenseBlock(nn.Module):
    """A layer without experts."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(D, D)

    def forward(self, carried: Carried) -> Carried:
        return carried[0] + self.dense(carried[0]), carried[1]


class OneTensor(nn.Module):
    """A layer between tensors of tokens, whose last column is the losses in equal parts."""

    def __init__(self, make: Callable[..., nn.Module], *args: Any, **knobs: Any) -> None:
        super().__init__()
        self.layer = make(*args, **knobs)

    def forward(self, packed: Tensor) -> Tensor:
        is_first = packed.shape[-1] == D
        x, losses = self.layer(packed if is_first else (packed[:, :D], packed[:, D:].sum().view(1)))
        return torch.cat((x, (losses / len(x)).expand(len(x), 1)), dim=1)


def loss_of(carried: Carried | Tensor, target: Tensor) -> Tensor:
    if isinstance(carried, Tensor):
        carried = carried[:, :D], carried[:, D:].sum()
    return (carried[0] - target).square().mean() + LOSS_WEIGHT * carried[1].sum()


def layers_in_one_tensor(make: Callable[..., nn.Module], **knobs: Any) -> list[Any]:
    """The same layers, with one tensor between them."""
    from deepspeed.pipe import LayerSpec

    return [LayerSpec(OneTensor, s.typename, *s.module_args, **s.module_kwargs) for s in layers_of(make, **knobs)]


def layers_of(make: Callable[..., nn.Module], **knobs: Any) -> list[Any]:
    """Specs of the pipeline's layers: three MoE layers, of which the first stage has two."""
    from deepspeed.pipe import LayerSpec

    knobs = {"ep_size": 2, "k": 1, "top2_2nd_expert_sampling": False, **knobs}
    blocks = [LayerSpec(MoEBlock, make, **knobs) for _ in range(3)]
    return [LayerSpec(Enter), *blocks, LayerSpec(DenseBlock)]


def batches(step: int) -> list[tuple[Tensor, Tensor]]:
    """The micro-batches of a step, with one set of tokens for each of two data-parallel ranks: [2, T, D]."""
    generator = torch.Generator().manual_seed(step)
    drawn = torch.randn(NUM_MICRO_BATCHES, 2, 2, NUM_TOKENS, D, generator=generator)
    return [(micro_batch[0], micro_batch[1]) for micro_batch in drawn]


def ds_config(stage: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": NUM_TOKENS,
        "gradient_accumulation_steps": NUM_MICRO_BATCHES,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,  # without ZeRO, the norm of all experts is another one than DeepSpeed's
        "steps_per_print": 10**9,
        **more,
    }


def make_engine(
    make: Callable[..., nn.Module],
    door: Callable[..., Any],
    config: dict[str, Any],
    interval: int = 0,
    layers: Callable[..., list[Any]] = layers_of,
    **knobs: Any,
) -> Any:
    """An engine of two stages, each of two data-parallel ranks. Collective over four ranks."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    from ds_moe_ep.engine.layouts.known_groups import forget_groups

    forget_groups()
    net = PipelineModule(
        layers(make, **knobs),
        num_stages=2,
        loss_fn=loss_of,
        partition_method="uniform",
        activation_checkpoint_interval=interval,
    )
    for name, parameter in net.named_parameters():
        generator = torch.Generator().manual_seed(seed_of(name))
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    assert deepspeed.comm.is_initialized()
    return door(model=net, config=config)[0]


def seed_of(name: str) -> int:
    """A number of a parameter's name and of the experts that the rank holds: the same in every kind of layer."""
    place = dist.get_rank() % 2 if "experts" in name else 0
    return sum(ord(letter) * (i + 1) for i, letter in enumerate(f"{name.split('deepspeed_moe.')[-1]} {place}"))


def mine(engine: Any, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The micro-batches of a step that this rank's copy of the model takes."""
    place = engine.grid.get_data_parallel_rank()
    return iter([(x[place], target[place]) for x, target in batches(step)])
