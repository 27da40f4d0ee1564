"""A small model around any MoE layer, trained by an engine on real ranks or by plain loops in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_moe_ep.config.knobs import MoEConfig
from tests.engine.native_layers import PlainGelu
from tests.moe.layer_cases import D
from tests.reference import moe_reference

NUM_EXPERTS = 8
BATCH = 12  # tokens of one rank in one micro-batch
AUX_WEIGHT = 0.05
Trained = tuple[list[float], dict[str, Tensor]]  # the losses, and the last weights by global name


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run."""

    layer: str = "ours"  # or "native"
    world_size: int = 4
    ep_size: int = 4
    top_k: int = 2
    capacity_factor: float | None = None
    num_experts: int = NUM_EXPERTS
    num_layers: int = 2
    stage: int = 0
    bf16: bool = False
    fp16: bool = False
    flat: bool = False  # fp16 without ZeRO: one vector of master weights per group, as for DeepSpeed's FusedAdam
    elastic: bool = False  # checkpoints of ZeRO hold states per group, without padding and options
    sums_in: str = ""  # the type in which gradients are summed, where it is not the weights'
    accumulation: int = 1
    clipping: float = 0.0
    steps: int = 3
    seed: int = 3
    schedule: str = "peers"
    bit_equal: bool = False  # schedules give the same bits
    interleaved: bool = False  # the ranks of an expert-parallel group are apart, not consecutive
    door: str = "ds_moe_ep"  # whose initialize is called
    replicas: int | Literal["auto"] = 0
    two_level: str = "off"  # else on nodes of two ranks
    recomputed: bool = False  # the MoE layers, in the backward pass

    @property
    def moe_config(self) -> MoEConfig:
        return MoEConfig(
            num_experts=self.num_experts,
            ep_size=self.ep_size,
            top_k=self.top_k,
            capacity_factor=self.capacity_factor,
            eval_capacity_factor=self.capacity_factor,
            schedule=self.schedule,
            bit_equal=self.bit_equal,
            replicas=self.replicas,
            two_level=self.two_level,
            node_size=0 if self.two_level == "off" else 2,
        )

    def expert_index(self, rank: int) -> Callable[[int], int]:
        """The map from a rank's local experts to global ones."""
        place = rank // (self.world_size // self.ep_size) if self.interleaved else rank % self.ep_size
        num_local = self.num_experts // self.ep_size
        return lambda local: place * num_local + local

    @property
    def ds_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": BATCH,
            "gradient_accumulation_steps": self.accumulation,
            "optimizer": {"type": "Adam", "params": {"lr": 0.03, "eps": 1e-2, "weight_decay": 0.0, "torch_adam": True}},
            "gradient_clipping": self.clipping,
            "zero_optimization": {"stage": self.stage, "reduce_bucket_size": 5000, "allgather_bucket_size": 5000},
            "steps_per_print": 10**9,
        }
        if self.elastic:
            config["zero_optimization"]["elastic_checkpoint"] = True
        if self.interleaved:
            config["use_data_before_expert_parallelism"] = True
        if self.bf16:
            config["bf16"] = {"enabled": True}
        if self.fp16:
            config["fp16"] = {"enabled": True, "initial_scale_power": 8}
        if self.sums_in:
            config["data_types"] = {"grad_accum_dtype": self.sums_in}
        return config


class SmallModel(nn.Module):
    """MoE layers with a norm and a skip each, between two Linears. forward(x, target) gives the loss."""

    def __init__(self, make_layer: Callable[[], nn.Module], recomputed: bool = False, num_layers: int = 2) -> None:
        super().__init__()
        self.recomputed = recomputed
        self.enter = nn.Linear(D, D)
        self.norms = nn.ModuleList(nn.LayerNorm(D) for _ in range(num_layers))
        self.layers = nn.ModuleList(make_layer() for _ in range(num_layers))
        self.leave = nn.Linear(D, D)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        hidden, balance = self.enter(x), x.new_zeros(())
        for norm, layer in zip(self.norms, self.layers, strict=True):
            normed = norm(hidden)
            output, l_aux, _ = checkpoint(layer, normed, use_reentrant=False) if self.recomputed else layer(normed)
            hidden, balance = hidden + output, balance + l_aux
        return ((self.leave(hidden) - target) ** 2).mean() + AUX_WEIGHT * balance


class LoopLayer(nn.Module):
    """The reference as a layer on the concatenated batch of all ranks, with DeepSpeed's parameter names."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job
        self.deepspeed_moe = nn.Module()
        self.deepspeed_moe.gate = nn.Module()
        self.deepspeed_moe.gate.wg = nn.Linear(D, job.num_experts, bias=False)
        self.deepspeed_moe.experts = nn.Module()
        experts = nn.ModuleList(PlainGelu(bias=True) for _ in range(job.num_experts))
        self.deepspeed_moe.experts.deepspeed_experts = experts

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, experts = self.deepspeed_moe.gate.wg.weight, self.deepspeed_moe.experts.deepspeed_experts
        shards = moe_reference(self.job.moe_config, gate, list(experts), x.split(BATCH))
        return torch.cat([s.output_TD for s in shards]), torch.stack([s.l_aux for s in shards]).mean(), None


def make_layer(job: Job) -> nn.Module:
    """Our layer, or DeepSpeed's."""
    if job.layer == "ours":
        from ds_moe_ep import MoE

        return MoE(D, PlainGelu(bias=True), config=job.moe_config)
    from deepspeed.moe.layer import MoE as Native

    return Native(
        D,
        PlainGelu(bias=True),
        num_experts=job.num_experts,
        ep_size=job.ep_size,
        k=job.top_k,
        capacity_factor=job.capacity_factor or 1.0,
        drop_tokens=job.capacity_factor is not None,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )


def make_model(job: Job) -> SmallModel:
    """The model with this rank's part of the first weights, which depend on the seed alone."""
    from ds_moe_ep.model.initialize import init_weights

    model = SmallModel(lambda: make_layer(job), job.recomputed, job.num_layers)
    init_weights(model, job.seed, job.expert_index(dist.get_rank()))
    return model


def batches(job: Job) -> list[list[tuple[Tensor, Tensor]]]:
    """Inputs and targets [ranks, BATCH, D] of each micro-batch of each step."""
    generator = torch.Generator().manual_seed(11)

    def draw() -> Tensor:
        return torch.randn(job.world_size, BATCH, D, generator=generator)

    return [[(draw(), draw()) for _ in range(job.accumulation)] for _ in range(job.steps)]


def make_engine(job: Job, **arguments: Any) -> Any:
    """The job's model in an engine, which takes the arguments. Collective."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    import ds_moe_ep

    deepspeed.init_distributed("gloo")
    if job.fp16:  # refused on the CPU: its loss scaling and its optimizers run all the same
        get_accelerator().is_fp16_supported = lambda: True
    model = make_model(job)
    start = ds_moe_ep.initialize if job.layer == "ours" and job.door == "ds_moe_ep" else deepspeed.initialize
    with pytest.MonkeyPatch.context() as patched:
        if job.flat:  # DeepSpeed's own class runs on a GPU alone; what wraps it does not
            patched.setattr("deepspeed.runtime.engine.FusedAdam", torch.optim.Adam)
        return start(model=model, config=job.ds_config, model_parameters=list(model.parameters()), **arguments)[0]


def train_steps(engine: Any, job: Job, steps: Sequence[list[tuple[Tensor, Tensor]]]) -> list[float]:
    """The world's loss of each step."""
    rank, losses = dist.get_rank(), []
    dtype = torch.bfloat16 if job.bf16 else torch.float16 if job.fp16 else torch.float32
    for micro_batches in steps:
        total = torch.zeros(())
        for x, target in micro_batches:
            loss = engine(x[rank].to(dtype), target[rank].to(dtype))
            engine.backward(loss)
            engine.step()
            total += loss.detach().float() / job.accumulation
        dist.all_reduce(total)
        losses.append(float(total) / job.world_size)
    return losses


def named_weights(model: nn.Module, job: Job) -> dict[str, Tensor]:
    """This rank's parameters by their global names."""
    from ds_moe_ep.model.initialize import global_name

    index = job.expert_index(dist.get_rank())
    return {global_name(name, index): p.detach().float().clone() for name, p in model.named_parameters()}


def run_job(job: Job) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and last weights of a job on this rank."""
    engine = make_engine(job)
    losses = train_steps(engine, job, batches(job))
    return losses, named_weights(engine.module, job)


def run_jobs(jobs: Sequence[Job]) -> list[tuple[list[float], dict[str, Tensor]]]:
    return [run_job(job) for job in jobs]


def reference_job(job: Job, adapt: Callable[[nn.Module], nn.Module] = lambda model: model) -> Trained:
    """The same training in one process and float64: plain loops, torch's Adam, the concatenated batch.

    `adapt` changes the model before its first weights are drawn; what needs no gradient afterwards stays as it is.
    """
    from ds_moe_ep.model.initialize import global_name, init_weights

    model = adapt(SmallModel(lambda: LoopLayer(job), num_layers=job.num_layers))
    init_weights(model, job.seed)
    model.double()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.03, eps=1e-2)
    losses = []
    for micro_batches in batches(job):
        x, target = (torch.cat([pair[i] for pair in micro_batches]).flatten(0, 1).double() for i in range(2))
        loss = model(x, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {global_name(name): p.detach() for name, p in model.named_parameters()}


def merged(by_rank: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """All ranks' weights; replicas must agree bit for bit."""
    whole: dict[str, Tensor] = {}
    for weights in by_rank:
        for name, weight in weights.items():
            assert torch.equal(whole.setdefault(name, weight), weight), f"replicas of {name} differ"
    return whole


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of any weight, over the largest weight of its tensor."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    return max(
        float((found[name].double() - weight.double()).abs().max() / weight.abs().max().clamp(min=1e-2))
        for name, weight in expected.items()
    )
