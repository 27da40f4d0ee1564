"""The figures of an account: memory beside the products, how well these fill the device, and the peak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.schedule.build import forward_schedule
from ds_moe_ep.simulate.cluster.cluster import load_cluster
from tests.account.counting import Launch
from tests.account.layer import LayerAccount, Sizes, count

REPOSITORY = Path(__file__).resolve().parents[2]
BYTES_PER_MS = 2.7e9  # 2.7 TB/s: what a kernel that only moves memory reaches on an H100
HALF_ROWS = load_cluster(REPOSITORY / "ds_configs/clusters/h100_4x4.json").device.half_rows

SPECIFICATION = Sizes()
TOP_2 = Sizes(top_k=2)
QWEN3 = Sizes(  # 128 experts of 1,536, each token in 8, as Qwen3-235B-A22B; 8 experts per GPU
    num_tokens=8192, width=4096, expert_width=1536, num_experts=128, top_k=8, expert="swiglu", dtype=torch.bfloat16
)
DEEPSEEK = replace(QWEN3, width=7168, expert_width=2048, num_experts=256)  # as DeepSeek-V3; 16 experts per GPU
DEEPSEEK_EP8 = replace(DEEPSEEK, torus=Torus(2, 4))  # 32 experts per GPU
EP8 = replace(QWEN3, num_experts=64, torus=Torus(2, 4))


@dataclass(frozen=True)
class Figures:
    """One layer: forward, forward again, backward."""

    weight_gradient_gb: float  # memory traffic beside the products of weight gradients
    weight_products: int
    forward_products: int  # of the experts
    efficiency_percent: float  # of the experts' forward products, by rows / (rows + half_rows)
    memory_ms: float  # of all launches that are no product
    peak_gb: float
    launches: int


def figures(sizes: Sizes) -> Figures:
    """The figures of one layer of these sizes."""
    account = count(sizes)
    weights = _at(account.backward, "weight gradients")
    forward = [launch for launch in _at(account.forward, "experts") if launch.product]
    return Figures(
        _moved_bytes(weights) / 1e9,
        sum(bool(launch.product) for launch in weights),
        len(forward),
        efficiency_percent(forward),
        _moved_bytes(account.all) / BYTES_PER_MS,
        account.peak_bytes / 1e9,
        len(account.all),
    )


def efficiency_percent(products: Sequence[Launch]) -> float:
    """Ideal over modelled time of products whose rate is rows / (rows + half_rows) of that of a large one."""
    ideal = sum(launch.flops for launch in products)
    modelled = sum(launch.flops * (1 + HALF_ROWS / launch.product[0]) for launch in products if launch.product)
    return 100 * ideal / modelled


def num_pieces(sizes: Sizes) -> int:
    config = MoEConfig(num_experts=sizes.num_experts, ep_size=sizes.torus.size, schedule=sizes.schedule, **sizes.knobs)
    return len(forward_schedule(config, sizes.torus).pieces)


def memory_ms_by_place(account: LayerAccount) -> dict[str, float]:
    """Milliseconds of what is no product, by part of the layer."""
    places = dict.fromkeys(launch.where for launch in account.all)
    return {where: _moved_bytes(_at(account.all, where)) / BYTES_PER_MS for where in places}


def _at(launches: Sequence[Launch], where: str) -> list[Launch]:
    return [launch for launch in launches if launch.where == where]


def _moved_bytes(launches: Sequence[Launch]) -> int:
    return sum(launch.read_bytes + launch.written_bytes for launch in launches if launch.product is None)
