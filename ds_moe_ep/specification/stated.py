"""Statements of the specification's document, and the job and hardware that it describes, as values.

These are the only numbers of it that are typed in, each with its section; what follows from them, in derived.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_moe_ep.config.knobs import SPECIFICATION, Layout, MoEConfig
from ds_moe_ep.config.training import Training

Pair = tuple[float, float]  # TP8/PP2 and EP16, the baseline and the proposal


@dataclass(frozen=True, kw_only=True)
class Stated:
    """The numbers that the document states, in its own units."""

    expert_mb: float = 537.0  # 2.1
    base_memory_gb: float = 5.4  # 2.1
    micro_batches: int = 4  # 2.1
    ep16_memory_mb: float = 668.0  # 3.1
    expert_tokens: int = 640_000  # 3.1
    distribution_ms: float = 26.2  # 3.2; the aggregation as much
    expert_ms: float = 5.0  # 3.2
    hidden: float = 0.80  # 3.2
    tps: Pair = (120_000, 450_000)  # 4.1
    batches_per_s: Pair = (11.7, 43.9)  # 4.1
    utilization_percent: tuple[Pair, Pair] = ((60, 70), (95, 98))  # 4.1
    gain_percent: float = 50.8  # 4.1
    ratio: float = 3.75  # 4.1
    tpot_ms: Pair = (8.3, 2.2)  # 4.2
    base_pieces_ms: tuple[float, ...] = (2.1, 4.1, 2.1)  # 4.2: compute, communication, queueing
    ep16_pieces_ms: tuple[float, ...] = (0.31, 0.44, 0.0)  # 4.2
    r2: tuple[float, ...] = (0.97, 0.96, 0.94, 0.99)  # 4.3, in the order of records.names.LAWS
    max_connections: int = 1  # 5.1


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The hardware that the document names (section 1.2); the peak is of NVIDIA's data sheet, dense FP16."""

    num_gpus: int = 16
    gpus_per_node: int = 4
    memory_bytes: float = 80e9
    peak_flops: float = 989e12
    node_bytes_per_s: float = 400e9  # NVLink, as the document counts it
    link_bytes_per_s: float = 200e9  # one InfiniBand link

    @property
    def far_share(self) -> float:
        """The share of a GPU's destinations that lie on other nodes."""
        return (self.num_gpus - self.gpus_per_node) / self.num_gpus


STATED, HARDWARE = Stated(), Hardware()
BATCH_SEQUENCES = 1024
MODEL = SPECIFICATION
EP16 = MoEConfig(num_experts=16, ep_size=16)
BATCH_TOKENS = BATCH_SEQUENCES * MODEL.sequence_length
EXPERT_TOKENS = BATCH_TOKENS // EP16.num_experts
TRAINING = Training(
    world_size=HARDWARE.num_gpus,
    ep_size=16,
    micro_batch=1,
    accumulation=BATCH_SEQUENCES // HARDWARE.num_gpus,
    precision="fp16",
    gradient_precision="fp16",
    zero_stage=1,
    optimizer="Adam",
    optimizer_states=2,
    offload=False,
    bucket_elements=500_000_000,  # DeepSpeed's default
)
BASELINE = Layout(tp_size=8, pp_size=2)
