"""Tiny engines of each layout, to be verified on real ranks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from ds_moe_ep.config.knobs import MoEConfig
from tests.engine.hooks import autoep_models
from tests.engine.hooks.autoep_models import AutoEPJob
from tests.engine.small_model import Job, batches, make_engine
from tests.moe.replica_cases import let_rows_count_alone


@dataclass(frozen=True, kw_only=True)
class OwnJob(Job):
    """A job with what the verification looks at besides."""

    balance: Literal["aux_loss", "bias", "none"] = "aux_loss"
    fp16: bool = False
    offload: bool = False  # optimizer states and their steps in host memory
    timeout_s: float = 60.0
    verify_every: int = 0

    @property
    def moe_config(self) -> MoEConfig:
        more = {name: getattr(self, name) for name in ("balance", "timeout_s", "verify_every")}
        return dataclasses.replace(super().moe_config, meter_every=self.verify_every, **more)

    @property
    def ds_config(self) -> dict[str, Any]:
        scaling = {"enabled": True, "initial_scale_power": 6}
        config = {**super().ds_config, **({"fp16": scaling} if self.fp16 else {})}
        if self.offload:
            config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
            config["zero_force_ds_cpu_optimizer"] = False  # which is compiled
        return config


@dataclass(frozen=True, kw_only=True)
class PartitionedJob(AutoEPJob):
    """A job under ZeRO-3, whose partitions are small parameters' too up to a size."""

    stage: int = 3
    ep_size: int = 2
    persistent: int = 0  # numbers of a parameter that every rank keeps whole besides

    @property
    def ds_config(self) -> dict[str, Any]:
        config = super().ds_config
        config["zero_optimization"]["stage3_param_persistence_threshold"] = self.persistent
        return config


@dataclass(frozen=True)
class Layout:
    """One engine and its micro-batches: a job, and whether DeepSpeed's layers get the package's hooks."""

    name: str
    job: Job | AutoEPJob
    hooks: bool = False
    is_saved: bool = True  # DeepSpeed saves a checkpoint of it

    def make(self) -> Any:
        """The engine. Collective."""
        from deepspeed.accelerator import get_accelerator

        import ds_moe_ep

        if getattr(self.job, "fp16", False):
            get_accelerator().is_fp16_supported = lambda: (
                True
            )  # DeepSpeed refuses it on a CPU, which is slow and not wrong
        made = make_engine(self.job) if isinstance(self.job, Job) else autoep_models.make_engine(self.job)
        if self.hooks:
            ds_moe_ep.attach_overlap(made, {"schedule": "peers", "verify_every": 1})
        let_rows_count_alone(made.module)
        return made

    def batches(self) -> list[Any]:
        """This rank's micro-batches, as the model takes them."""
        rank = dist.get_rank()
        if isinstance(self.job, Job):
            dtype = torch.bfloat16 if self.job.bf16 else torch.float32
            dtype = torch.float16 if getattr(self.job, "fp16", False) else dtype
            return [(x[rank].to(dtype), y[rank].to(dtype)) for step in batches(self.job) for x, y in step]
        found = autoep_models.batches(self.job)
        return [{"input_ids": ids[rank], "labels": ids[rank]} for step in found for ids in step]

    def endless(self, engine: Any) -> Iterator[Any]:
        """Its micro-batches again and again."""
        return itertools.cycle(self.batches())

    def step(self, engine: Any, batches: Iterator[Any]) -> None:
        """One step of training."""
        for _ in range(self.job.accumulation):
            batch = next(batches)
            output = engine(**batch) if isinstance(batch, dict) else engine(*batch)
            engine.backward(getattr(output, "loss", output))
            engine.step()


FEW: dict[str, Any] = {"num_experts": 4, "ep_size": 2, "steps": 2}  # experts and batches
AUX = Layout("own", OwnJob(**FEW, accumulation=2, clipping=0.01))
BIAS = Layout("own, bias, fp16, ZeRO 1", OwnJob(**FEW, balance="bias", fp16=True, stage=1))
LAYOUTS = (
    AUX,
    BIAS,
    Layout("own, ZeRO 1, bf16", OwnJob(stage=1, bf16=True, ep_size=4, clipping=0.05)),
    Layout("own, ZeRO 2", OwnJob(**FEW, stage=2, accumulation=2, capacity_factor=1.0, clipping=0.05)),
    Layout("own, ZeRO 2, offload", OwnJob(**FEW, stage=2, offload=True, accumulation=2, clipping=0.05)),
    Layout("own, ZeRO 1, offload, bf16", OwnJob(**FEW, stage=1, offload=True, bf16=True, clipping=0.05)),
    Layout("own, bf16", OwnJob(**FEW, bf16=True, top_k=1, clipping=0.05)),
    Layout("own, ranks apart, replicas", OwnJob(**FEW, interleaved=True, replicas=1, schedule="auto")),
    Layout("own, one rank has all experts", OwnJob(num_experts=4, ep_size=1, steps=2, stage=1)),
    Layout("native", Job(**FEW, layer="native", accumulation=2)),
    Layout("native, ZeRO 2, capacity", Job(**FEW, layer="native", stage=2, bf16=True, capacity_factor=1.0)),
    Layout("native, hooked, ZeRO 1", Job(layer="native", ep_size=4, stage=1, top_k=3, clipping=0.05), hooks=True),
    Layout("AutoEP", AutoEPJob(ep_size=2, stage=1, accumulation=2)),
    Layout(
        "AutoEP, hooked",
        AutoEPJob(stage=2, ep_size=2, preset="qwen3_moe", router_logits=True, clipping=0.05),
        hooks=True,
    ),
    Layout("AutoEP, hooked, bf16", AutoEPJob(stage=1, ep_size=2, bf16=True, score_apply="pre"), hooks=True),
)
OFFLOAD = next(layout for layout in LAYOUTS if layout.name == "own, ZeRO 2, offload")
ZERO_3 = Layout(
    "AutoEP, hooked, ZeRO 3", PartitionedJob(preset="qwen3_moe", router_logits=True, clipping=0.05), hooks=True
)
MORE_ZERO_3 = (
    Layout(
        "AutoEP, hooked, ZeRO 3, bf16",
        PartitionedJob(accumulation=2, bf16=True, persistent=10000),
        hooks=True,
    ),
    Layout("AutoEP, ZeRO 3", PartitionedJob()),
    Layout(
        "AutoEP, hooked, ZeRO 3, experts that nobody trains", PartitionedJob(frozen="experts"), True, is_saved=False
    ),
)
OF_EACH_MAKER = [AUX, next(layout for layout in LAYOUTS if layout.name == "native")]  # AutoEP's are in layouts.py
