"""Plan of one run of the systems benchmark; the same values on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ds_moe_ep.bench.testbed import Environment, TestBed
from ds_moe_ep.config.knobs import SMALL, SPECIFICATION, Layout, ModelConfig, MoEConfig
from ds_moe_ep.config.training import WHOLE
from ds_moe_ep.records.names import BASELINE, SYSTEMS
from ds_moe_ep.schedule.shaping import HEADERS
from ds_moe_ep.sizing.footprint import expert_share

BURST_BYTES = 64e3  # of each exchange, which the link's bucket lets pass at once
SEEN = 0.87  # of the time that a node's link needs for an exchange, the mean rank waits: some have their rows earlier
EXPERT_SHARE = expert_share(SPECIFICATION, MoEConfig(num_experts=16))  # the rest is attention
EMULATED_MODEL = replace(SMALL, hidden_size=64, num_heads=8)
OPTIMIZER: dict[str, Any] = {"lr": 0.003, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.01, "torch_adam": True}
ROUTING = MoEConfig(num_experts=16, aux_loss_weight=0.02, z_loss_weight=0.001)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A model that DeepSpeed's pipeline engine trains: ranks that share widths and layers, and a stage's experts."""

    layout: Layout
    ep_size: int = 1


CUTS: Mapping[str, Cut] = {
    BASELINE: Cut(layout=Layout(tp_size=8, pp_size=2)),
    "pp2_ep8": Cut(layout=Layout(pp_size=2), ep_size=8),
    "tp2_ep8": Cut(layout=Layout(tp_size=2), ep_size=8),
    "tp2_pp2_ep4": Cut(layout=Layout(tp_size=2, pp_size=2), ep_size=4),
}
OVERLAPPED = ("ep16", *(name for name, cut in CUTS.items() if cut.ep_size > 1))
OURS = (*OVERLAPPED, "ep16_serial")  # systems with layers of this package that share experts over ranks


@dataclass(frozen=True, kw_only=True)
class SystemsPlan:
    """One run: systems, environments, modes, and the model that all of them train."""

    systems: tuple[str, ...] = tuple(SYSTEMS)
    modes: tuple[str, ...] = ("training", "forward")
    environments: tuple[Environment, ...] = (Environment("loopback", None),)
    device: Literal["cpu", "cuda", "emulated"] = "cpu"  # what computes; an emulated device waits
    measure: Literal["time", "memory"] = "time"
    model: ModelConfig = SMALL
    schedule: str = "auto"  # of the systems OVERLAPPED
    ep_size: int = 16  # of the systems that are not cut
    cuts: Mapping[str, Cut] = field(default_factory=lambda: dict(CUTS))
    num_sequences: int = 64  # of one step, over all ranks
    micro_batches: int = 4  # of systems with stages
    step_compute_s: float = 8.0  # what an emulated device computes in one step of training
    rounds: int = 100
    warm_ups: int = 10
    num_nodes: int = 4
    ranks_per_node: int = 4
    port: int = 29500
    testbed: TestBed | None = None
    seed: int = 0

    @property
    def is_emulated(self) -> bool:
        return self.device == "emulated"

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node

    @property
    def tokens_of_step(self) -> int:
        return self.num_sequences * self.model.sequence_length

    @property
    def token_us(self) -> float:
        """Time of an emulated device for one token in one layer, forward: a third of a step is forward."""
        of_rank = self.tokens_of_step / self.num_ranks * self.model.num_layers
        return 1e6 * self.step_compute_s / 3 / of_rank

    def prefix(self, environment: str, mode: str, system: str) -> str:
        """The beginning of the names of a system's Records."""
        return f"system.{environment}.{mode}.{system}"

    def moe(self, system: str) -> MoEConfig:
        """The routing and the schedule of a system."""
        ep_size = self.cuts[system].ep_size if system in self.cuts else self.ep_size
        if ep_size == 1:
            return ROUTING
        node_size = self.ranks_per_node if self.num_nodes > 1 else 0
        schedule: Any = self.schedule if system in OVERLAPPED else "serial"
        cuts = 2 if schedule == "peers" else 1
        return replace(ROUTING, ep_size=ep_size, node_size=node_size, schedule=schedule, row_cuts=cuts)

    def ds_config(self, system: str) -> dict[str, Any]:
        """The ds_config of a system: the same batch and optimizer for all, micro-batches for stages alone."""
        layout = self.cuts[system].layout if system in self.cuts else WHOLE
        copies = self.num_ranks // layout.size
        accumulation = self.micro_batches if layout.pp_size > 1 else 1
        optimizer = {**OPTIMIZER, "lr": 1e-12} if self.is_emulated else OPTIMIZER  # keeps the routes
        return {
            "train_batch_size": self.num_sequences,
            "train_micro_batch_size_per_gpu": self.num_sequences // copies // accumulation,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 1.0,
            "steps_per_print": 1_000_000,
            "zero_optimization": {"stage": 1, "reduce_bucket_size": 4_000_000, "allgather_bucket_size": 4_000_000},
            "fp16": {"enabled": self.device == "cuda"},
            "optimizer": {"type": "Adam", "params": optimizer},
        }


def link_mbit(plan: SystemsPlan, ratio: float) -> float:
    """The link over which the experts' traffic of a training step takes `ratio` times its emulated compute.

    Four exchanges per layer: dispatch and combine, forward and backward. Of a rank's rows (N-1)/N leave its node.
    """
    rows_of_node = plan.tokens_of_step / plan.num_nodes * (plan.num_nodes - 1) / plan.num_nodes
    exchange_bytes = rows_of_node * plan.model.hidden_size * 4 * HEADERS - BURST_BYTES
    return 4 * plan.model.num_layers * exchange_bytes * SEEN * 8 / (ratio * plan.step_compute_s) / 1e6
