"""Plan of a soak, and its routing workload: when a burst comes, which rank has how many tokens.

All of it follows from (seed, step, rank), so that a run can be done again.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.model.text import fingerprint

SETTLED = 0.25  # of a run: memory and handles are judged by the samples after it
BURST_SHARE = 0.05  # of the steps: all ranks' tokens are alike and visit one expert
EMPTY_SHARE = 0.03  # of the batches of a rank: no token at all
DRIFT_STEPS = 300  # of one turn of the direction that the tokens of a step have in common
METER_EVERY = 20  # steps between two that the overlap meter records, so that recorders are soaked too
OPTIMIZER: dict[str, Any] = {"lr": 0.001, "torch_adam": True}


@dataclass(frozen=True, kw_only=True)
class SoakPlan:
    """One run of the soak; the same on every rank."""

    num_ranks: int = 16
    steps: int = 1000
    sample_every: int = 10
    hash_every: int = 100
    num_tokens: int = 64  # of the mean rank in a step
    hidden_size: int = 64
    expert_width: int = 128
    num_classes: int = 8
    has_caches: bool = True  # torch's own, which fill up first: see ranks.py
    seed: int = 0
    run: int = 1  # counted from 1
    port: int = 29500

    @property
    def prefix(self) -> str:
        """The beginning of the names of the run's samples."""
        return f"soak.run{self.run}"

    @property
    def node_size(self) -> int:
        """Ranks of a virtual node: the largest divisor that leaves at least as many nodes."""
        return max(size for size in range(1, math.isqrt(self.num_ranks) + 1) if self.num_ranks % size == 0)

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.node_size

    def moe(self, layer: int) -> MoEConfig:
        """The first layer has an expert per rank and top-1, the second two experts per rank, top-2 and a bias."""
        of_both: dict[str, Any] = {"ep_size": self.num_ranks, "node_size": self.node_size, "schedule": "peers"}
        if layer == 0:
            return MoEConfig(num_experts=self.num_ranks, aux_loss_weight=0.01, z_loss_weight=0.001, **of_both)
        return MoEConfig(num_experts=2 * self.num_ranks, top_k=2, balance="bias", **of_both)

    def ds_config(self) -> dict[str, Any]:
        """The ds_config of the run."""
        return {
            "train_micro_batch_size_per_gpu": self.num_tokens,
            "gradient_clipping": 1.0,
            "steps_per_print": 1_000_000,
            "zero_optimization": {"stage": 1},
            "optimizer": {"type": "Adam", "params": OPTIMIZER},
            "moe_ep": {"meter_every": METER_EVERY},
        }

    def is_burst(self, step: int) -> bool:
        """True where step `step` is a burst, on every rank."""
        return random.Random(fingerprint(self.seed, "burst", step)).random() < BURST_SHARE

    def tokens_of(self, step: int, rank: int) -> int:
        """Tokens of a rank in a step: none, or from half to one and a half times the mean."""
        draw = random.Random(fingerprint(self.seed, "tokens", step, rank))
        if draw.random() < EMPTY_SHARE:
            return 0
        return draw.randint(self.num_tokens // 2, self.num_tokens + self.num_tokens // 2)

    def samples(self) -> list[int]:
        """The steps after which processes are looked at; the last one is always among them."""
        return marks(self.steps, self.sample_every)

    @property
    def steady_step(self) -> int:
        """The sample from which on handles may not change."""
        return next(step for step in self.samples() if step >= min(100, SETTLED * self.steps))

    def hashes(self) -> list[int]:
        """The steps after which losses and parameters are hashed; the last one is always among them."""
        return marks(self.steps, self.hash_every)


def marks(steps: int, every: int) -> list[int]:
    """Every `every`-th step, counted from 1, and the last one."""
    return sorted({*range(every, steps + 1, every), steps})
