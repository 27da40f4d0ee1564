"""A GPT that calls the layer, marks its parameters, trains and saves as Megatron-DeepSpeed's does; written anew.

What its callers and parameters do was read from its sources (megatron/model/transformer.py, language_model.py and
gpt_model.py, core/tensor_parallel/layers.py and core/parallel_state.py, training.py, checkpointing.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from tests.engine.layouts.tensor_models import CopyToRanks, JoinTokens, SplitTokens, SumOverRanks
from tests.moe.layer_cases import D, F

VOCABULARY, SEQUENCE, BATCH, LAYERS, TENSOR_SIZE = 16, 6, 2, 2, 2
MOE_LOSS_COEFF = 0.05


@dataclass(frozen=True)
class CoreConfig:
    """The configuration that Megatron's modules keep."""

    sequence_parallel: bool = False
    adds_gradients: bool = False  # a linear layer adds its weight's gradient to `weight.grad` by itself


class ScatteredSum(torch.autograd.Function):
    """A sum over the tensor ranks of which each keeps its span of the first dimension."""

    @staticmethod
    def forward(context: Any, group: Any, x: Tensor) -> Tensor:
        context.group = group
        x = x.contiguous().clone()
        dist.all_reduce(x, group=group)
        return x.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[None, Tensor]:
        parts = [torch.empty_like(gradient) for _ in range(dist.get_world_size(context.group))]
        dist.all_gather(parts, gradient.contiguous(), group=context.group)
        return None, torch.cat(parts)


class AddingLinear(torch.autograd.Function):
    """A product whose backward pass adds the weight's gradient to `weight.grad`, and returns none."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor) -> Tensor:
        context.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        x, weight = context.saved_tensors
        d_weight = gradient.flatten(0, -2).t() @ x.flatten(0, -2)
        weight.grad = d_weight if weight.grad is None else weight.grad + d_weight
        return gradient @ weight, None


def mark(parameter: Tensor, dim: int) -> None:
    """Megatron's marks, which it puts on each weight, also on one that is whole."""
    parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, dim, 1  # type: ignore[attr-defined]


class ParallelLinear(nn.Module):
    """What both linear layers have: a part of the weight, or with `moe` all of it; the bias is returned."""

    def __init__(self, sizes: tuple[int, int], dim: int, config: CoreConfig, grid: Any, moe: bool) -> None:
        super().__init__()
        parts = 1 if moe else TENSOR_SIZE
        out, into = (size // parts if i == dim else size for i, size in enumerate(sizes))
        self.is_expert_without_slicing = moe
        self.config, self.grid = config, grid
        self.weight, self.bias = nn.Parameter(torch.empty(out, into)), nn.Parameter(torch.zeros(out))
        mark(self.weight, dim)

    def product(self, x: Tensor) -> Tensor:
        return AddingLinear.apply(x, self.weight) if self.config.adds_gradients else x @ self.weight.t()


class ColumnParallelLinear(ParallelLinear):
    def __init__(self, into: int, out: int, *, config: CoreConfig, grid: Any, moe: bool = False) -> None:
        super().__init__((out, into), 0, config, grid, moe)
        mark(self.bias, 0)
        self.sequence_parallel = config.sequence_parallel and not moe

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        group = self.grid.get_tensor_model_parallel_group()
        if self.sequence_parallel:
            x = JoinTokens.apply(group, x)
        if not self.is_expert_without_slicing:
            x = CopyToRanks.apply(group, x)
        return self.product(x), self.bias


class RowParallelLinear(ParallelLinear):
    def __init__(self, into: int, out: int, *, config: CoreConfig, grid: Any, moe: bool = False) -> None:
        super().__init__((out, into), 1, config, grid, moe)
        self.sequence_parallel = config.sequence_parallel  # as Megatron's: also of an expert
        self.bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        part, group = self.product(x), self.grid.get_tensor_model_parallel_group()
        if self.sequence_parallel:
            return ScatteredSum.apply(group, part), self.bias
        return part if self.is_expert_without_slicing else SumOverRanks.apply(group, part), self.bias


class ParallelMLP(nn.Module):
    """A feed-forward network; returns its output and the second bias."""

    def __init__(
        self, config: CoreConfig, grid: Any, moe: bool = False, enable_expert_tensor_parallelism: bool = False
    ) -> None:
        super().__init__()
        whole = moe and not enable_expert_tensor_parallelism
        self.dense_h_to_4h = ColumnParallelLinear(D, F, config=config, grid=grid, moe=whole)
        self.dense_4h_to_h = RowParallelLinear(F, D, config=config, grid=grid, moe=whole)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        inner, bias = self.dense_h_to_4h(hidden_states)
        return self.dense_4h_to_h(functional.gelu(inner + bias))


class ParallelTransformerLayer(nn.Module):
    """A dense network and a layer of experts on hidden states [s, b, h]; returns them and the MoE loss."""

    def __init__(self, make_moe: Callable[..., nn.Module], args: Any, config: CoreConfig, grid: Any) -> None:
        super().__init__()
        self.grid, self.config = grid, config
        self.self_attention = ParallelMLP(config, grid)
        cut = args.enable_expert_tensor_parallelism
        self.mlp = make_moe(
            D,
            ParallelMLP(config, grid, moe=True, enable_expert_tensor_parallelism=cut),
            num_experts=args.num_experts[0],
            ep_size=args.moe_expert_parallel_size,
            k=args.topk,
            use_residual=(args.mlp_type == "residual"),
            capacity_factor=args.moe_train_capacity_factor,
            eval_capacity_factor=args.moe_eval_capacity_factor,
            min_capacity=args.moe_min_capacity,
            drop_tokens=args.moe_token_dropping,
            use_tutel=args.use_tutel,
            enable_expert_tensor_parallelism=cut,
            top2_2nd_expert_sampling=args.moe_top2_2nd_expert_sampling,
        )

    def forward(self, hidden: Tensor, aggregated_moe_loss: Tensor | None = None) -> tuple[Tensor, Tensor]:
        output, bias = self.self_attention(functional.layer_norm(hidden, (D,)))
        hidden = hidden + output + bias
        moe_loss = torch.tensor(0.0, device=hidden.device, dtype=hidden.dtype)
        mlp_output, moe_loss, _ = self.mlp(functional.layer_norm(hidden, (D,)))
        if aggregated_moe_loss is not None:
            moe_loss += aggregated_moe_loss  # in place
        return hidden + mlp_output, moe_loss


class ParallelTransformer(nn.Module):
    def __init__(self, make_moe: Callable[..., nn.Module], args: Any, config: CoreConfig, grid: Any) -> None:
        super().__init__()
        self.sums_losses = args.sums_losses
        self.layers = nn.ModuleList(ParallelTransformerLayer(make_moe, args, config, grid) for _ in range(LAYERS))

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        moe_losses, before = [], None
        for layer in self.layers:
            hidden, moe_loss = layer(hidden, before) if self.sums_losses else layer(hidden)
            before = moe_loss
            moe_losses.append(moe_loss)
        return hidden, *(moe_losses[-1:] if self.sums_losses else moe_losses)


class TransformerLanguageModel(nn.Module):
    """Embedding and encoder; its checkpoint is a tree, with the experts' tensors apart."""

    def __init__(self, make_moe: Callable[..., nn.Module], args: Any, config: CoreConfig, grid: Any) -> None:
        super().__init__()
        self.config, self.grid = config, grid
        self.embedding = nn.Embedding(VOCABULARY, D)
        self.encoder = ParallelTransformer(make_moe, args, config, grid)

    def forward(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        hidden, group = self.embedding(tokens).transpose(0, 1).contiguous(), self.grid.get_tensor_model_parallel_group()
        if self.config.sequence_parallel:
            hidden = SplitTokens.apply(group, hidden)
        hidden, *moe_losses = self.encoder(hidden)
        if self.config.sequence_parallel:
            hidden = JoinTokens.apply(group, hidden)
        return hidden, moe_losses

    def state_dict_for_save_checkpoint(self, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        tree: dict[str, Any] = {"embedding": self.embedding.state_dict(prefix=prefix, keep_vars=keep_vars)}
        encoder = self.encoder.state_dict(prefix=prefix, keep_vars=keep_vars)
        of_experts = [key for key in encoder if "expert" in key and "moe.gate.wg.weight" not in key]
        moe_state_dict = {f"encoder.{key}": encoder.pop(key) for key in of_experts}
        return tree | {"encoder": encoder, "moe_state_dict": moe_state_dict}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> None:  # type: ignore[override]
        self.embedding.load_state_dict(state_dict["embedding"], strict=strict)
        encoder = dict(state_dict["encoder"])
        for key, value in state_dict.get("moe_state_dict", {}).items():
            encoder[key.split("encoder.", 1)[1]] = value
        self.encoder.load_state_dict(encoder, strict=strict)


class GPTModel(nn.Module):
    """Tokens and labels [b, s] to the losses [b, s] and the layers' MoE losses."""

    def __init__(self, make_moe: Callable[..., nn.Module], args: Any, config: CoreConfig, grid: Any) -> None:
        super().__init__()
        self.language_model = TransformerLanguageModel(make_moe, args, config, grid)

    def forward(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        hidden, moe_losses = self.language_model(tokens)
        logits = hidden @ self.language_model.embedding.weight.t()  # [s, b, v]
        return functional.cross_entropy(logits.permute(1, 2, 0).float(), labels, reduction="none"), moe_losses

    def state_dict_for_save_checkpoint(self, prefix: str = "", keep_vars: bool = False) -> dict[str, Any]:
        tree = self.language_model.state_dict_for_save_checkpoint(prefix=prefix, keep_vars=keep_vars)
        top = {f"language_model.{key}": value for key, value in tree.pop("moe_state_dict").items()}
        return top | {"language_model": tree}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> None:  # type: ignore[override]
        moe_state_dict = {
            key: state_dict.pop(key) for key in list(state_dict) if "expert" in key and "moe.gate.wg.weight" not in key
        }
        tree = dict(state_dict["language_model"])
        self.language_model.load_state_dict(tree | {"moe_state_dict": moe_state_dict}, strict=strict)


class Functions(SimpleNamespace):
    """Functions of a module, which nobody copies."""

    def __deepcopy__(self, memo: object) -> Functions:
        return self


def parallel_state() -> Any:
    """The functions of `megatron.core.parallel_state` that a layer or an engine may call, for TP 2. Collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    everyone = list(range(world))
    alone = [[each] for each in everyone]
    rows = [everyone[first : first + TENSOR_SIZE] for first in range(0, world, TENSOR_SIZE)]
    columns = [everyone[first::TENSOR_SIZE] for first in range(TENSOR_SIZE)]
    tables = {
        "tensor_model_parallel": rows,
        "model_parallel": rows,
        "pipeline_model_parallel": alone,
        "data_parallel": columns,
        "sequence_parallel": alone,  # made, of one rank each, where nobody asks for sequence ranks
        "sequence_data_parallel": columns,
    }
    functions: dict[str, Callable[..., Any]] = {}
    for name, table in tables.items():
        made = [(ranks, dist.new_group(ranks)) for ranks in table]
        ranks, group = next((ranks, group) for ranks, group in made if rank in ranks)
        values = {"rank": ranks.index(rank), "world_size": len(ranks), "group": group, "src_rank": ranks[0]}
        functions |= {
            f"get_{name}_{key}": partial(lambda value, *_, **__: value, value) for key, value in values.items()
        }
    functions["model_parallel_is_initialized"] = functions["sequence_parallel_is_initialized"] = lambda: True
    functions["is_pipeline_first_stage"] = functions["is_pipeline_last_stage"] = lambda *_: True
    return Functions(**functions)


def _given(value: Any, *_: Any, **__: Any) -> Any:
    return value


@torch.no_grad()
def draw_weights(model: nn.Module, ep_size: int) -> None:
    """Weights by their names; parts of those that are cut, and of whole ones other ones on each tensor rank."""
    rank = dist.get_rank()
    tensor_rank = rank % TENSOR_SIZE
    for owner_name, owner in model.named_modules():
        for name, parameter in owner.named_parameters(prefix=owner_name, recurse=False):
            is_expert = "deepspeed_experts" in name
            seed = crc32(name.encode()) + (1000 * (rank % ep_size) if is_expert else 0)
            shape, dim = list(parameter.shape), getattr(parameter, "partition_dim", -1)
            is_whole = getattr(owner, "is_expert_without_slicing", True)
            if is_whole and not is_expert and isinstance(owner, ParallelLinear):
                seed += 7 * tensor_rank  # drawn inside of Megatron's tracker, which differs between tensor ranks
            if not is_whole and dim >= 0:
                shape[dim] *= TENSOR_SIZE
            value = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 4
            parameter.copy_(value if is_whole or dim < 0 else value.chunk(TENSOR_SIZE, dim)[tensor_rank])
