"""NeMo AutoModel's published runs on H100s (April 2026), foretold in their layouts: `python -m tests.published`.

Nothing is fitted to them. A stage of a pipeline is foretold as a job of its own on its GPUs; the step of the pipeline
is its time with the bubble of 1F1B, by hand: (m + p - 1)/m for m micro-batches in p stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ds_moe_ep.config.attention_shape import AttentionShape
from ds_moe_ep.config.knobs import ModelConfig
from ds_moe_ep.records.quantity import Quantity
from ds_moe_ep.records.render import to_markdown
from ds_moe_ep.records.table import table
from ds_moe_ep.simulate.cluster.cluster import Cluster, load_cluster
from ds_moe_ep.simulate.job.choose import as_auto
from ds_moe_ep.simulate.job.fit import fit_memory
from ds_moe_ep.simulate.job.job import read_job
from ds_moe_ep.simulate.step.predict import predict
from ds_moe_ep.simulate.step.setup import Setup

QWEN3_30B = {
    "num_layers": 48, "hidden_size": 2048, "num_heads": 32, "expert_width": 768, "expert": "swiglu",
    "vocab_size": 151_936, "sequence_length": 4096,
}  # fmt: skip
DEEPSEEK_V3_STAGE = {  # a quarter of 61 layers
    "num_layers": 15, "hidden_size": 7168, "num_heads": 64, "expert_width": 2048, "expert": "swiglu",
    "shared_expert_width": 2048, "vocab_size": 129_280, "sequence_length": 4096,
}  # fmt: skip
ATTENTION = {  # by width of a token: of Qwen3-30B-A3B and of DeepSeek-V3 (their config.json)
    2048: AttentionShape.grouped(2048, num_heads=32, num_key_value_heads=4, head_size=128, has_norms=True),
    7168: AttentionShape.latent(
        7168, num_heads=128, query_rank=1536, key_value_rank=512, plain_size=128, rotated_size=64, value_size=128
    ),
}


@dataclass(frozen=True, kw_only=True)
class PublishedModel(ModelConfig):
    """A model with its own attention, which the package's model does not have."""

    @property
    def attention(self) -> AttentionShape:
        return ATTENTION[self.hidden_size]


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """A run as its publisher tells it, and the part of it that `plan` can express."""

    name: str
    published_s: float  # of a step
    num_gpus: int
    batch: int  # sequences
    model: Mapping[str, Any]
    moe: Mapping[str, Any]
    micro_batch: int
    accumulation: int  # micro-batches of one rank, of those that a pipeline takes together
    stages: int = 1

    @property
    def stage_gpus(self) -> int:
        return self.num_gpus // self.stages

    @property
    def bubble(self) -> float:
        """Time of a step over that of its micro-batches on one stage."""
        return (self.accumulation + self.stages - 1) / self.accumulation

    def setup(self, recompute: bool) -> Setup:
        """One stage on its GPUs, with the schedule that "auto" takes there."""
        model = {**self.model, "recompute": recompute}
        ds_config = {
            "train_batch_size": self.batch,
            "train_micro_batch_size_per_gpu": self.micro_batch,
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 1},
            "optimizer": {"type": "AdamW", "params": {}},
            "moe_ep": {**self.moe, "model": model},
        }
        setup = read_job(ds_config, h100s(self.stage_gpus)).setup
        return as_auto(replace(setup, model=PublishedModel(**vars(setup.model))))

    def step_s(self, recompute: bool) -> Quantity:
        """Seconds of a step."""
        prediction = predict(self.setup(recompute))
        return prediction.estimate(lambda step: 1e-6 * step.step_us * self.bubble, "s")

    def error_percent(self, step: Quantity) -> float:
        """Foretold over published, less one."""
        return 100 * (step.value / self.published_s - 1)


def h100s(num_gpus: int) -> Cluster:
    """Servers of eight H100s with an adapter of 400 Gbit/s per GPU."""
    return load_cluster("h100_2x8").with_nodes(num_gpus // 8)


RUNS = (
    PublishedRun(
        name="Qwen3-30B-A3B, 8 GPUs, EP8", published_s=21.77, num_gpus=8, batch=512,
        model=QWEN3_30B, moe={"num_experts": 128, "ep_size": 8, "top_k": 8}, micro_batch=4, accumulation=16,
    ),
    PublishedRun(
        name="DeepSeek-V3 671B, 256 GPUs, PP4 EP64", published_s=8.18, num_gpus=256, batch=512,
        model=DEEPSEEK_V3_STAGE, moe={"num_experts": 256, "ep_size": 64, "top_k": 8, "score": "sigmoid"},
        micro_batch=1, accumulation=8, stages=4,
    ),
    PublishedRun(
        name="DeepSeek-V3 671B, 1,024 GPUs, PP4 EP64", published_s=37.87, num_gpus=1024, batch=8192,
        model=DEEPSEEK_V3_STAGE, moe={"num_experts": 256, "ep_size": 64, "top_k": 8, "score": "sigmoid"},
        micro_batch=1, accumulation=8, stages=4,
    ),
)  # fmt: skip


def published_table() -> str:
    """The runs, published and foretold, as a Markdown table."""
    rows = []
    for run in RUNS:
        for recompute in (True, False):
            step = run.step_s(recompute)
            fits = "fits" if fit_memory(run.setup(recompute)).fits else "does not fit"
            again = "with" if recompute else "without"
            foretold = step.text(digits=3)
            rows.append((run.name, again, f"{run.published_s:g}", foretold, f"{run.error_percent(step):+.0f} %", fits))
    head = ("run", "recomputation", "published, s per step", "foretold", "error", "memory, by plan's account")
    return to_markdown(table("", head, rows, text_columns=6))


if __name__ == "__main__":
    print(published_table())
