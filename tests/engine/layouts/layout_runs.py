"""`TensorModel` in any layout of 8 ranks: tensor ranks, pipeline stages, sequence ranks, and data-parallel ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from ds_moe_ep.config.knobs import MoEConfig
from tests.engine.layouts.tensor_models import TENSOR_SIZE, Dense, TensorJob, TensorModel, mpu_of
from tests.engine.layouts.tensor_runs import (
    Trained,
    experts_of,
    give_weights,
    make_layer,
    parameter_groups,
    routed,
)
from tests.moe.layer_cases import D
from tests.moe.replica_cases import copies_in, let_rows_count_alone

LAYOUT_RANKS, NUM_STAGES, SEQUENCE_SIZE = 8, 2, 2
LOSS_SCALE = 64.0
TRAFFIC: dict[str, dict[str, Any]] = {  # how rows move; an expert group is two nodes
    "peers": {},
    "row cuts": {"row_cuts": 2},
    "chunks": {"schedule": "chunks", "chunks": 3},
    "copies per node": {"two_level": "copies"},
    "sums at nodes": {"two_level": "sums"},
    "copies of experts": {"replicas": 1},
}


@dataclass(frozen=True, kw_only=True)
class LayoutJob(TensorJob):
    """Two steps, or in 16 bits one, on 8 ranks."""

    bounds: ClassVar[dict[str, float]] = {"fp32": 1e-4, "bf16": 0.08, "fp16": 0.02}
    rates: ClassVar[dict[str, float]] = {"fp32": 0.5, "bf16": 2.0**20, "fp16": 2.0**11}  # fp16 ends at 65504

    tp_size: int = 1
    pp_size: int = 1
    sp_size: int = 1
    precision: str = "fp32"
    traffic: str = "peers"  # of `TRAFFIC`
    forgets_half: bool = False  # in the reference: no sum over a half of the copies

    def batches(self) -> list[Tensor]:
        return [x[: len(x) // 2] if self.forgets_half else x for x in super().batches()]

    @property
    def num_copies(self) -> int:
        return LAYOUT_RANKS // self.tp_size // self.pp_size

    @property
    def moves(self) -> dict[str, Any]:
        """The knobs of the traffic."""
        return {"schedule": "peers", "node_size": max(1, self.ep_size // 2)} | TRAFFIC[self.traffic]

    @property
    def config(self) -> MoEConfig:
        return replace(super().config, **self.moves)

    @property
    def rate(self) -> float:
        return self.rates[self.precision]

    @property
    def steps(self) -> int:
        return 2 if self.precision == "fp32" else 1

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    @property
    def bound(self) -> float:
        return self.bounds[self.precision]

    def ds_config(self, keys: dict[str, Any]) -> dict[str, Any]:
        sixteen = {"enabled": True} | ({"loss_scale": LOSS_SCALE} if self.precision == "fp16" else {})
        shared = {"sequence_parallel_size": self.sp_size} if self.sp_size > 1 else {}
        if self.kind == "hooked":
            shared["moe_ep"] = {"attach": True, **self.moves}
        config = super().ds_config({} if self.precision == "fp32" else {self.precision: sixteen}) | shared | keys
        return config if self.clipping else config | {"gradient_clipping": 0.0}


class StageLayer(nn.Module):
    """A dense layer and experts between tokens whose last column is the balance losses in equal parts."""

    def __init__(self, job: TensorJob, index: int, grid: Any) -> None:
        super().__init__()
        self.enter = nn.Linear(D, D) if index == 0 else nn.Identity()
        self.dense, self.layer = Dense(grid), make_layer(job)

    def forward(self, packed: Tensor) -> Tensor:
        balance = self.of_layers_before(packed)
        hidden = self.enter(packed[:, :D])
        hidden = hidden + self.dense(hidden)
        output, l_aux, _ = self.layer(functional.layer_norm(hidden, (D,)))
        column = ((balance + l_aux) / len(hidden)).to(hidden.dtype).expand(len(hidden), 1)
        return torch.cat((hidden + output, column), dim=1)

    @staticmethod
    def of_layers_before(packed: Tensor) -> Tensor:
        """The balance losses so far."""
        return packed[:, D:].sum()


def whole_name(name: str) -> str:
    """The name in `TensorModel` of a parameter of the pipeline."""
    index, part, rest = name.split(".", 2)
    return f"enter.{rest}" if part == "enter" else f"{'layers' if part == 'layer' else part}.{index}.{rest}"


def make_stages(job: LayoutJob) -> Any:
    """The model as a pipeline of two stages, each with a layer of experts. Collective."""
    from deepspeed.pipe import LayerSpec, PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    grid = SimpleNamespace(tensor_group=None) if job.tp_size > 1 else None

    def loss_of(packed: Tensor, _: Tensor) -> Tensor:
        return packed[:, :D].square().mean() + job.aux_weight * packed[:, D:].sum()

    net = PipelineModule(
        [LayerSpec(StageLayer, job, index, grid) for index in range(NUM_STAGES)],
        topology=PipeModelDataParallelTopology(num_pp=NUM_STAGES, num_mp=job.tp_size, num_dp=job.num_copies),
        loss_fn=loss_of,
        partition_method="uniform",
        activation_checkpoint_interval=int(job.recompute),
    )
    if grid is not None:
        grid.tensor_group = net.mpu().get_slice_parallel_group()
    give_weights(net, job, whole_name)
    return net


def run_job(job: LayoutJob) -> Trained:
    """The job on this rank: the losses of its steps, and the moves of its own parameters."""
    from ds_moe_ep.engine.layouts.known_groups import forget_groups
    from ds_moe_ep.model.initialize import global_name

    engine, before = make_engine(job)
    rename = whole_name if job.pp_size > 1 else str
    let_rows_count_alone(engine.module)
    with routed(engine, job, 0) if job.pp_size == 1 else nullcontext() as record:
        losses, norms = (train_stages if job.pp_size > 1 else train)(engine, job)
    hosted = copies_in(engine.module)
    forget_groups()
    index = job.expert_index(dist.get_rank())
    moves = {
        global_name(rename(name), index): parameter.detach().float() - before[name].to(job.dtype).float()
        for name, parameter in engine.module.named_parameters()
    }
    return Trained(losses, norms, moves, {} if record is None else experts_of(record), num_hosted=hosted)


def make_engine(job: LayoutJob) -> tuple[Any, dict[str, Tensor]]:
    """The job's engine, and its first weights. Collective."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    import ds_moe_ep

    ds_moe_ep.init_distributed()
    get_accelerator().is_fp16_supported = lambda: True  # slow on a CPU, and right
    if job.pp_size > 1:
        model, mpu = make_stages(job), None
    else:
        mpu = mpu_of_job(job)
        model = TensorModel(job, lambda _: make_layer(job), mpu if job.tp_size > 1 else None)
        give_weights(model, job)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(parameter_groups(model), lr=job.rate)
    door = deepspeed.initialize if job.kind == "native" else ds_moe_ep.initialize
    return door(model=model, optimizer=optimizer, mpu=mpu, config=job.ds_config({}))[0], before


def mpu_of_job(job: LayoutJob) -> Any:
    """The groups that the job's engine is given; None of data-parallel ranks alone."""
    from deepspeed.runtime.sequence_parallel import parallel_state_sp as unit

    if job.tp_size > 1:
        return mpu_of(TENSOR_SIZE)
    if job.sp_size == 1:
        return None
    if unit._SEQUENCE_PARALLEL_GROUP is None:
        unit.initialize_sequence_parallel(SEQUENCE_SIZE)
    return unit


def train(engine: Any, job: LayoutJob) -> tuple[list[float], list[float]]:
    copy = dist.get_rank() // job.tp_size
    losses, norms = [], []
    for number, x in enumerate(job.batches(), 1):
        loss = engine(x[copy].to(job.dtype))
        engine.backward(loss / (1 if job.fault == "parts of losses as whole ones" else job.sp_size))
        engine.step()
        total = loss.detach().float().clone()
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
        if job.clipping and number % job.accumulation == 0:
            norms.append(float(engine.get_global_grad_norm()))
    return losses, norms


def train_stages(engine: Any, job: LayoutJob) -> tuple[list[float], list[float]]:
    """The mean losses of micro-batches; without norms, of which each stage without ZeRO has its own."""
    copy, losses, batches = engine.grid.get_data_parallel_rank(), [], iter(job.batches())

    def mine() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(job.accumulation):
            x = next(batches)[copy].to(job.dtype)
            yield torch.cat((x, x.new_zeros(len(x), 1)), dim=1), x

    for _ in range(job.steps):
        losses.append(float(engine.train_batch(mine())))
    return losses, []


def run_jobs(jobs: Sequence[LayoutJob]) -> list[Trained]:
    return [run_job(job) for job in jobs]


def merged(job: LayoutJob, by_rank: Sequence[Trained]) -> Trained:
    """All ranks' moves as one device would make them; those that several ranks have must be equal."""
    per_stage = LAYOUT_RANKS // job.pp_size
    whole: dict[str, Tensor] = {}
    for first in range(0, LAYOUT_RANKS, per_stage):
        parts = [result.moves for result in by_rank[first : first + per_stage]]
        for name in {name: None for moves in parts for name in moves}:
            holders = [moves[name] for moves in parts if name in moves]
            if name.startswith("dense.") and job.tp_size > 1:
                shares = [holders[share :: job.tp_size] for share in range(job.tp_size)]
                assert all(torch.equal(each[0], other) for each in shares for other in each), name
                whole[name] = torch.cat([each[0] for each in shares], 0 if ".up." in name else 1)
                continue
            assert all(torch.equal(holders[0], other) for other in holders), f"ranks' {name} differ"
            whole[name] = holders[0]
    return Trained(by_rank[0].losses, by_rank[0].norms, whole, num_hosted=by_rank[0].num_hosted)


def as_the_ranks_tell(job: LayoutJob, expected: Trained) -> Trained:
    """The run of one device with the losses and norms that a pipeline has."""
    if job.pp_size == 1:
        return expected if job.clipping else Trained(expected.losses, [], expected.moves)
    size = job.accumulation
    losses = [sum(expected.losses[i : i + size]) / size for i in range(0, len(expected.losses), size)]
    return Trained(losses, [], expected.moves)
