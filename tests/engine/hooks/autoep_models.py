"""Tiny Hugging Face models with DeepSpeed's AutoEP layers, random weights, in engines on real ranks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

HIDDEN_SIZE, EXPERT_WIDTH, VOCABULARY = 64, 96, 64
BATCH = (2, 24)  # sequences and tokens of one rank in one micro-batch
EXPERT_WEIGHTS = ("w1", "w2", "w3")


@dataclass(frozen=True, kw_only=True)
class AutoEPJob:
    """One training run of a tiny model."""

    preset: str = "mixtral"  # or "qwen3_moe"
    world_size: int = 4
    ep_size: int = 4  # 0: Hugging Face's own blocks, whole on every rank
    stage: int = 0
    bf16: bool = False
    fp16: bool = False  # refused on the CPU: its loss scaling and its optimizers run all the same
    num_experts: int = 8
    top_k: int = 2
    num_layers: int = 2
    checkpointing: str = ""  # or "reentrant", "non-reentrant"
    router_logits: bool = False  # the loss contains Hugging Face's balance loss
    grouped_mm: bool = True
    activation: str = ""  # of AutoEP's experts, where it is not the family's
    score_apply: str = "auto"  # or "pre": weights multiply the rows on their way to the experts; or "post"
    accumulation: int = 1
    clipping: float = 0.0
    frozen: str = ""  # a part of the names of parameters that nobody trains
    steps: int = 3
    seed: int = 3

    @property
    def ds_config(self) -> dict[str, Any]:
        """Adam with a large epsilon: a gradient that is scaled shows, one that is all rounding does not."""
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": BATCH[0],
            "gradient_accumulation_steps": self.accumulation,
            "gradient_clipping": self.clipping,
            "optimizer": {"type": "Adam", "params": {"lr": 0.01, "eps": 1e-2, "weight_decay": 0.0, "torch_adam": True}},
            "zero_optimization": {"stage": self.stage, "reduce_bucket_size": 50000, "allgather_bucket_size": 50000},
            "steps_per_print": 10**9,
        }
        if self.ep_size:
            config["expert_parallel"] = {
                "enabled": True,
                "autoep_size": self.ep_size,
                "preset_model": self.preset,
                "use_grouped_mm": self.grouped_mm,
                "score_apply": self.score_apply,
            }
        if self.bf16:
            config["bf16"] = {"enabled": True}
        if self.fp16:
            config["fp16"] = {"enabled": True, "initial_scale_power": 8}
        return config


def make_model(job: AutoEPJob) -> nn.Module:
    """The whole model as Hugging Face makes it; its first weights depend on the seed alone."""
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": EXPERT_WIDTH,
        "num_hidden_layers": job.num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HIDDEN_SIZE // 4,
        "max_position_embeddings": 4 * BATCH[1],
        "num_experts_per_tok": job.top_k,
        "output_router_logits": job.router_logits,
        "initializer_range": 0.1,  # large enough that the experts weigh in the output
        "use_cache": False,
    }
    torch.manual_seed(job.seed)
    if job.preset == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(num_local_experts=job.num_experts, **sizes))
    else:
        own = {"num_experts": job.num_experts, "moe_intermediate_size": EXPERT_WIDTH, "norm_topk_prob": True}
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**own, **sizes))
    if job.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": job.checkpointing == "reentrant"})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (job.frozen and job.frozen in name))
    return model.train()


def make_engine(job: AutoEPJob, mpu: Any = None) -> Any:
    """The job's model in an engine, its blocks replaced by AutoEP's layers. Collective."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    from ds_moe_ep.engine import seams

    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    seams.init_distributed(dist_backend="gloo", verbose=False)
    if job.fp16:
        get_accelerator().is_fp16_supported = lambda: True  # slow on a CPU, and right
    model = make_model(job)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine = deepspeed.initialize(model=model, config=job.ds_config, model_parameters=trained, mpu=mpu)[0]
    for layer in autoep_layers(engine).values() if job.activation else ():
        layer.experts.activation, layer.experts.activation_limit = job.activation, 0.3  # a bound that some reach
    return engine


def autoep_layers(engine: Any) -> dict[str, nn.Module]:
    """AutoEP's layers of an engine's model, by name."""
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    return {name: m for name, m in engine.module.named_modules() if isinstance(m, AutoEPMoELayer)}


def batches(job: AutoEPJob) -> list[list[Tensor]]:
    """Token ids [ranks, sequences, tokens] of each micro-batch of each step, skewed so that experts' loads differ."""
    generator = torch.Generator().manual_seed(11)

    def draw() -> Tensor:
        skewed = torch.rand(job.world_size, *BATCH, generator=generator) ** 2
        return (skewed * VOCABULARY).long()

    return [[draw() for _ in range(job.accumulation)] for _ in range(job.steps)]


def train_steps(engine: Any, job: AutoEPJob) -> list[float]:
    """The world's mean loss of each step. Collective."""
    rank, losses = dist.get_rank(), []
    for micro_batches in batches(job):
        total = torch.zeros(())
        for ids in micro_batches:
            loss = engine(input_ids=ids[rank], labels=ids[rank]).loss
            engine.backward(scaled(engine, job, loss))
            engine.step()
            total += loss.detach().float() / job.accumulation
        dist.all_reduce(total)
        losses.append(float(total) / job.world_size)
    return losses


def scaled(engine: Any, job: AutoEPJob, loss: Tensor) -> Tensor:
    """The loss for `engine.backward`: DeepSpeed itself does not multiply it with fp16's scale without ZeRO."""
    is_left = job.fp16 and job.stage == 0 and "moe_ep_extensions" not in vars(engine)
    return loss.float() * engine.optimizer.loss_scale if is_left else loss


def named_weights(engine: Any, job: AutoEPJob) -> dict[str, Tensor]:
    """This rank's parameters in fp32, whole under every ZeRO stage; an expert's name has its global index. Collective.

    The blocks of an engine without AutoEP are named and cut as AutoEP does it, so that both can be compared.
    """
    import deepspeed

    weights: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter] if hasattr(parameter, "ds_id") else []):
            weights |= by_expert(name, parameter.detach().float().clone(), job)
    return weights


def by_expert(name: str, weight: Tensor, job: AutoEPJob) -> dict[str, Tensor]:
    """A parameter under its name, or a stack of experts one by one."""
    stem, _, kind = name.rpartition(".")
    if ".experts" not in name:
        return {name.replace(".router.gate.", ".gate."): weight}
    if kind == "gate_up_proj":
        parts = dict(zip(("w1", "w3"), weight.chunk(2, dim=1), strict=True))
    else:
        parts = {"w2" if kind == "down_proj" else kind: weight}
    first = dist.get_rank() % job.ep_size * len(weight) if job.ep_size else 0
    return {f"{stem}.{first + i}.{kind}": w for kind, stack in parts.items() for i, w in enumerate(stack)}


def run_job(job: AutoEPJob, attach: Callable[[Any], Any] | None = None) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and last weights of a job on this rank; `attach` gets the engine before its first step. Collective."""
    engine = make_engine(job)
    if attach is not None:
        attach(engine)
    losses = train_steps(engine, job)
    return losses, named_weights(engine, job)
