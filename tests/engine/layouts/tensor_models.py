"""A model whose dense part is cut over tensor ranks by hand, as Megatron cuts it, and the same model on one device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ds_moe_ep.config.knobs import MoEConfig
from tests.engine.native_layers import PlainGelu
from tests.moe.layer_cases import D, F
from tests.reference import moe_reference

NUM_EXPERTS, TENSOR_SIZE, WORLD = 4, 2, 4
AUX_WEIGHT, RATE, STEPS = 0.05, 0.5, 2
BOUND = 1e-4  # of fp32 beside float64, relative to the largest move of a tensor


@dataclass(frozen=True, kw_only=True)
class TensorJob:
    """Two steps of plain gradient descent on 4 ranks, of which each 2 hold the same tokens.

    In bf16 one step, by so much that a weight's move is its gradient up to rounding.
    """

    bf16_bound: ClassVar[float] = 0.08  # of a gradient of one step, relative to the largest value of a tensor

    kind: str = "ours"  # or "hooked", or "native": DeepSpeed's own
    ep_size: int = 2
    top_k: int = 1
    capacity_factor: float | None = None
    stage: int = 0
    bf16: bool = False
    tokens: int = 7  # of a data-parallel rank, in one step
    clipping: float = 0.0
    accumulation: int = 1
    cuts_tokens: bool = False  # Megatron's sequence parallelism: a tensor rank has its own tokens
    interleaved: bool = False
    residual: bool = False
    shared: bool = False
    recompute: bool = False
    records: bool = False  # its routes are recorded
    replays: bool = False  # routes that no gate chose
    knobs: dict[str, Any] = field(default_factory=dict)
    aux_weight: float = AUX_WEIGHT
    prefix: str = "tensor_model_parallel"  # of the mpu's methods
    through_own_door: bool = False  # ds_moe_ep.initialize, not deepspeed.initialize
    fault: str = ""  # planted in the ranks

    @property
    def config(self) -> MoEConfig:
        return MoEConfig(
            num_experts=NUM_EXPERTS, ep_size=self.ep_size, top_k=self.top_k, capacity_factor=self.capacity_factor,
            min_capacity=1, drop_policy="score" if self.top_k > 2 else "position",
            **({"schedule": "peers"} | self.knobs),
        )  # fmt: skip

    @property
    def rate(self) -> float:
        return 2.0**20 if self.bf16 else RATE

    @property
    def steps(self) -> int:
        return 1 if self.bf16 else STEPS

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def bound(self) -> float:
        """The largest distance from one device in float64."""
        return self.bf16_bound if self.bf16 else BOUND

    def ds_config(self, keys: dict[str, Any]) -> dict[str, Any]:
        zero = {"stage": self.stage, "reduce_bucket_size": 5000, "allgather_bucket_size": 5000}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clipping or 1e9,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": self.bf16},
            "use_data_before_expert_parallelism": self.interleaved,
            "steps_per_print": 10**9,
        }
        return config | keys

    def expert_index(self, rank: int) -> Callable[[int], int]:
        place = rank // (WORLD // self.ep_size) if self.interleaved else rank % self.ep_size
        num_local = NUM_EXPERTS // self.ep_size
        return lambda local: place * num_local + local

    def batches(self) -> list[Tensor]:
        """Tokens [copies, T, D] of each micro-batch."""
        generator = torch.Generator().manual_seed(11)
        shape = (self.num_copies, self.tokens, D)
        return [torch.randn(shape, generator=generator) for _ in range(self.steps * self.accumulation)]

    @property
    def num_copies(self) -> int:
        """Parts of the batch, each of which is routed alone."""
        return WORLD // TENSOR_SIZE

    def drawn_routes(self, layer: int) -> list[Tensor]:
        """Experts [copies, T, K] of each pass through a layer, drawn where the job replays some; else none."""
        generator = torch.Generator().manual_seed(17 + layer)
        shape = (self.num_copies, self.tokens, NUM_EXPERTS)
        passes = range(self.steps * self.accumulation if self.replays else 0)
        return [torch.rand(shape, generator=generator).argsort(-1)[..., : self.top_k] for _ in passes]


class CopyToRanks(torch.autograd.Function):
    """Megatron's f: nothing on the way in, a sum on the way back."""

    @staticmethod
    def forward(context: Any, group: Any, x: Tensor) -> Tensor:
        context.group = group
        return x

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[None, Tensor]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=context.group)
        return None, gradient


class SumOverRanks(torch.autograd.Function):
    """Megatron's g."""

    @staticmethod
    def forward(context: Any, group: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


class SplitTokens(torch.autograd.Function):
    """Into the region in which each tensor rank has its own tokens."""

    @staticmethod
    def forward(context: Any, group: Any, x: Tensor) -> Tensor:
        context.group = group
        return x.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, torch.cat(_from_all(gradient, context.group))


class JoinTokens(torch.autograd.Function):
    """Out of it."""

    @staticmethod
    def forward(context: Any, group: Any, x: Tensor) -> Tensor:
        context.group = group
        return torch.cat(_from_all(x, group))

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[None, Tensor]:
        group = context.group
        return None, gradient.chunk(dist.get_world_size(group))[dist.get_rank(group)]


def _from_all(x: Tensor, group: Any) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts


class Dense(nn.Module):
    """A layer of two matrices, whole, or a column's and a row's part of them on a tensor rank."""

    def __init__(self, grid: Any = None) -> None:
        super().__init__()
        self.grid = grid
        width = F // (1 if grid is None else TENSOR_SIZE)
        self.up, self.down = nn.Linear(D, width, bias=False), nn.Linear(width, D, bias=False)
        for parameter in self.parameters():
            parameter.tensor_model_parallel = grid is not None

    def forward(self, x: Tensor) -> Tensor:
        if self.grid is None:
            return self.down(functional.gelu(self.up(x)))
        group = self.grid.tensor_group
        return SumOverRanks.apply(group, self.down(functional.gelu(self.up(CopyToRanks.apply(group, x)))))


class TensorModel(nn.Module):
    """Dense, experts, dense, experts. forward(x) gives a loss."""

    def __init__(self, job: TensorJob, make_layer: Callable[[int], nn.Module], grid: Any = None) -> None:
        super().__init__()
        self.job, self.grid = job, grid
        self.enter = nn.Linear(D, D)
        self.dense = nn.ModuleList(Dense(grid) for _ in range(2))
        self.layers = nn.ModuleList(make_layer(index) for index in range(2))

    def forward(self, x: Tensor) -> Tensor:
        hidden, balance = self.enter(x), x.new_zeros(())
        for dense, layer in zip(self.dense, self.layers, strict=True):
            hidden = hidden + dense(hidden)
            output, l_aux = self._experts(layer, functional.layer_norm(hidden, (D,)))
            hidden, balance = hidden + output, balance + l_aux
        return hidden.square().mean() + self.job.aux_weight * balance

    def _experts(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.job.recompute and not isinstance(layer, LoopExperts):
            output, l_aux = checkpoint(lambda y: self._on_ranks(layer, y), x, use_reentrant=False)
            return output, l_aux
        return self._on_ranks(layer, x)

    def _on_ranks(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.grid is None or not self.job.cuts_tokens:
            return layer(x)[:2]
        group = self.grid.tensor_group
        output, l_aux, _ = layer(SplitTokens.apply(group, x))
        return JoinTokens.apply(group, output), l_aux


class LoopExperts(nn.Module):
    """The reference of the layer, by plain loops; each copy of the model routes its own tokens."""

    def __init__(self, job: TensorJob, index: int) -> None:
        super().__init__()
        self.job, self.index = job, index
        self.routes: list[Tensor] = []  # [copies, T, K] of each pass so far
        self.gate = nn.Module()
        self.gate.wg = nn.Linear(D, NUM_EXPERTS, bias=False)
        self.experts = nn.Module()
        self.experts.deepspeed_experts = nn.ModuleList(PlainGelu(bias=True) for _ in range(NUM_EXPERTS))
        if job.shared:
            self.shared = PlainGelu(bias=True)
        if job.residual:
            self.mlp, self.coefficient = PlainGelu(bias=True), nn.Linear(D, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, None]:
        experts = list(self.experts.deepspeed_experts)
        drawn = self.job.drawn_routes(self.index)
        routes = drawn[len(self.routes)].tolist() if drawn else None
        shards = moe_reference(self.job.config, self.gate.wg.weight, experts, x.split(self.job.tokens), routes=routes)
        self.routes.append(torch.tensor([shard.choices for shard in shards]))
        output = torch.cat([shard.output_TD for shard in shards])
        if self.job.shared:
            output = output + self.shared(x)
        if self.job.residual:
            share = functional.softmax(self.coefficient(x), dim=-1)
            output = output * share[:, :1] + self.mlp(x) * share[:, 1:]
        return output, torch.stack([shard.l_aux for shard in shards]).mean(), None


def mpu_of(tensor_size: int, prefix: str = "tensor_model_parallel") -> Any:
    """Object that a Megatron client passes, with the method names of one of its generations. Collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    rows = [list(range(first, first + tensor_size)) for first in range(0, world, tensor_size)]
    columns = [list(range(first, world, tensor_size)) for first in range(tensor_size)]
    tensor, data = ([dist.new_group(ranks) for ranks in table] for table in (rows, columns))
    methods: dict[str, Callable[[], Any]] = {
        "data_parallel_rank": lambda: rank // tensor_size,
        "data_parallel_world_size": lambda: world // tensor_size,
        "data_parallel_group": lambda: data[rank % tensor_size],
    }
    for name in {"model_parallel", prefix}:
        methods[f"{name}_rank"] = lambda: rank % tensor_size
        methods[f"{name}_world_size"] = lambda: tensor_size
        methods[f"{name}_group"] = lambda: tensor[rank // tensor_size]
    named = {f"get_{name}": method for name, method in methods.items()}
    return SimpleNamespace(tensor_group=tensor[rank // tensor_size], **named)


def sequence_mpu_of(size: int) -> Any:
    """The same of a Megatron-DeepSpeed client with sequence ranks, who has no tensor ranks. Collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    everyone = list(range(world))
    tables = {
        "model_parallel": [[each] for each in everyone],
        "sequence_parallel": [everyone[first : first + size] for first in range(0, world, size)],
        "data_parallel": [everyone[first::size] for first in range(size)],
        "sequence_data_parallel": [everyone],
    }
    tables["tensor_model_parallel"] = tables["model_parallel"]
    methods: dict[str, Callable[[], Any]] = {}
    for name, table in tables.items():
        made = [(ranks, dist.new_group(ranks)) for ranks in table]
        ranks, group = next((ranks, group) for ranks, group in made if rank in ranks)
        values = {"rank": ranks.index(rank), "world_size": len(ranks), "group": group}
        methods |= {f"get_{name}_{key}": partial(lambda value: value, value) for key, value in values.items()}
    return SimpleNamespace(**methods)
