"""When products are grouped by default: where that is the faster way on a device, as far as the choice can know it.

Times are modelled by hand for an H100: 132 multiprocessors, a tile of 128 x 256 numbers each at a time, 620 TFLOP/s and
2.7 TB/s together, 3 us per launch. A product takes whole rounds of tiles; grouped ones share their last round, and pay
for rows by expert, and for the sum of a SwiGLU's two gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.kernels.permute import RowMaps
from ds_moe_ep.moe.dispatch_plan import DispatchPlan
from ds_moe_ep.moe.experts import Experts, GeluMLP, SwiGLU
from ds_moe_ep.moe.grouped import choice
from ds_moe_ep.schedule.build import Schedule, backward_schedule, forward_schedule

TILE_S_PER_COLUMN = 2 * 128 * 256 * 132 / 620e12  # per number of the inner dimension
BYTES_PER_S, LAUNCH_S = 2.7e12, 3e-6


@dataclass(frozen=True, kw_only=True)
class Case:
    """A rank of `num_nodes` nodes of 4 under groups of peers, and the rows that its experts get in all."""

    width: int
    expert_width: int
    num_local: int
    num_rows: int
    expert: str = "swiglu"
    num_nodes: int = 2
    dtype: torch.dtype = torch.bfloat16
    padded: bool = False
    apart: bool = False
    knobs: dict[str, Any] = field(default_factory=dict)

    @property
    def torus(self) -> Torus:
        return Torus(self.num_nodes, 4)

    @property
    def config(self) -> MoEConfig:
        size = self.torus.size
        given: dict[str, Any] = {"schedule": "peers", **self.knobs}
        return MoEConfig(num_experts=self.num_local * size, ep_size=size, node_size=4, **given)

    @property
    def schedules(self) -> tuple[Schedule, Schedule]:
        return forward_schedule(self.config, self.torus), backward_schedule(self.config, self.torus)

    def is_grouped(self) -> bool:
        """The choice for its sizes, on tensors that are no memory."""
        kind = {"gelu": GeluMLP, "swiglu": SwiGLU}[self.expert]
        with torch.device("meta"):
            experts = Experts(kind(self.width, self.expert_width), self.num_local).to(self.dtype)
            if not self.apart:
                experts.lay_together()
            rows_ND = torch.empty(8, self.width, dtype=self.dtype)
        each = self.num_rows // (self.num_local * self.torus.size)
        rows_PL = ((each,) * self.num_local,) * self.torus.size
        numbers = torch.arange(2)
        maps = RowMaps(numbers, numbers.view(2, 1), numbers > 0 if self.padded else None)
        plan = DispatchPlan(maps, rows_PL, rows_PL)
        return choice.grouped_experts(self.config, experts, self.schedules, rows_ND, plan) == (self.num_local,)

    def seconds(self, is_grouped: bool) -> float:
        """Forward, forward again and backward, by hand."""
        pieces, matrices = len(self.schedules[0].pieces), 3 if self.expert == "swiglu" else 2
        rows, D, F = ceil(self.num_rows / (self.num_local * pieces)), self.width, self.expert_width

        def products(height: int, width: int, inner: int, times: int) -> float:
            tiles = ceil(height / 128) * ceil(width / 256)
            together, launches = (tiles * self.num_local, 1) if is_grouped else (tiles, self.num_local)
            return times * launches * (ceil(together / 132) * inner * TILE_S_PER_COLUMN + LAUNCH_S)

        wide, narrow = 2 * (matrices - 1) + 1, 2 + matrices - 1  # whose rows come out as wide as experts, or as tokens
        found = pieces * (products(rows, F, D, wide) + products(rows, D, F, narrow))
        found += products(F, D, rows * pieces, matrices)
        moved = (pieces > 1) * 2 * (2 * D + matrices * F) + (matrices == 3) * 3 * D
        return found + is_grouped * moved * self.num_rows * self.dtype.itemsize / BYTES_PER_S


MODELS = {
    "Qwen3-30B-A3B, EP8": Case(width=2048, expert_width=768, num_local=16, num_rows=65_536),
    "Qwen3-235B-A22B, EP16": Case(width=4096, expert_width=1536, num_local=8, num_rows=65_536, num_nodes=4),
    "DeepSeek-V3, EP16": Case(width=7168, expert_width=2048, num_local=16, num_rows=65_536, num_nodes=4),
    "DeepSeek-V3, EP8": Case(width=7168, expert_width=2048, num_local=32, num_rows=65_536),
    "the same, one piece": Case(
        width=7168, expert_width=2048, num_local=32, num_rows=65_536, knobs={"schedule": "serial"}
    ),
    "OLMoE-1B-7B, EP8": Case(width=2048, expert_width=1024, num_local=8, num_rows=32_768),
    "Mixtral-8x7B, two per GPU": Case(width=4096, expert_width=14_336, num_local=2, num_rows=16_384),
    "the same, half the tokens": Case(width=4096, expert_width=14_336, num_local=2, num_rows=8192),
    "wide GELU experts": Case(width=8192, expert_width=32_768, num_local=2, num_rows=10_000, expert="gelu"),
}
LOOPED = {"Mixtral-8x7B, two per GPU", "wide GELU experts"}


@pytest.mark.parametrize("name", MODELS)
def test_the_choice_is_the_faster_way_or_nearly_as_fast(name: str) -> None:
    """It looks at hidden rows alone: products as narrow as tokens may have a round less when grouped, which is 4 %."""
    case = MODELS[name]
    taken = case.is_grouped()
    assert taken == (name not in LOOPED)
    assert case.seconds(taken) <= 1.05 * case.seconds(not taken)


def test_one_product_per_expert_for_all_of_them_would_be_slower() -> None:
    """The control: large ones are as fast one by one, and of the many small ones each leaves most of a device idle."""
    over = {name: case.seconds(is_grouped=False) / case.seconds(is_grouped=True) for name, case in MODELS.items()}
    assert max(over.values()) > 2
    assert {name for name, ratio in over.items() if ratio < 1.05} == LOOPED


QWEN3 = MODELS["Qwen3-30B-A3B, EP8"]
ASIDE: Sequence[tuple[str, Case, bool]] = (
    ("types that torch does not group", replace(QWEN3, dtype=torch.float16), False),
    ("the same with a capacity, a batched product", replace(QWEN3, dtype=torch.float16, padded=True), True),
    ("weights that lie apart", replace(QWEN3, apart=True), False),
    ("the same where it is demanded", replace(QWEN3, apart=True, knobs={"grouped_products": "on"}), True),
    ("switched off", replace(QWEN3, knobs={"grouped_products": "off"}), False),
    ("sums of weight gradients over blocks", replace(QWEN3, knobs={"weight_blocks": 4}), False),
    ("equal bits", replace(QWEN3, knobs={"bit_equal": True}), False),
    ("one expert", replace(QWEN3, num_local=1), False),
)  # fmt: skip


@pytest.mark.parametrize(("why", "case", "expected"), ASIDE, ids=[why for why, *_ in ASIDE])
def test_other_reasons_come_before_the_sizes(why: str, case: Case, expected: bool) -> None:
    assert case.is_grouped() == expected


def test_on_the_cpu_products_are_made_one_by_one() -> None:
    rows_ND: Tensor = torch.empty(8, 16, dtype=torch.bfloat16)
    plan = DispatchPlan(RowMaps(torch.arange(2), torch.arange(2).view(2, 1)), ((4, 4),), ((4, 4),))
    config = MoEConfig(num_experts=2)
    schedules = forward_schedule(config, Torus(1, 1)), backward_schedule(config, Torus(1, 1))
    experts = Experts(SwiGLU(16, 32), 2).bfloat16()
    experts.lay_together()
    assert choice.grouped_experts(config, experts, schedules, rows_ND, plan) == ()
    demanded = replace(config, grouped_products="on")
    assert choice.grouped_experts(demanded, experts, schedules, rows_ND, plan) == (2,)
