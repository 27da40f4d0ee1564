"""A simulated layer spends what the layer's own code does: bytes, products and their efficiency, as the account counts.

The simulator tells each part of a layer to one method, `LayerCosts.spend`; what is told there is compared with the
launches of the real code on meta tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from ds_moe_ep.config.knobs import ModelConfig
from ds_moe_ep.kernels import attention as blocked
from ds_moe_ep.kernels import traffic
from ds_moe_ep.model import attention as model_attention
from ds_moe_ep.model.attention import CausalAttention
from ds_moe_ep.schedule.program import START, Program
from ds_moe_ep.simulate.step.costs import LayerCosts, Product
from ds_moe_ep.simulate.step.ep_step import EpJob
from tests.account.counting import Account, Launch
from tests.account.layer import Sizes, count
from tests.account.summary import DEEPSEEK_EP8, QWEN3, SPECIFICATION, TOP_2, efficiency_percent
from tests.simulate.jobs_for_tests import cluster, setup

CASES = {
    "serial": replace(SPECIFICATION, schedule="serial"),
    "peers": SPECIFICATION,
    "chunks": replace(SPECIFICATION, schedule="chunks"),
    "peers of k=2": TOP_2,
    "four blocks of weight gradients": replace(SPECIFICATION, knobs={"weight_blocks": 4}),
    "equal bits": replace(SPECIFICATION, knobs={"bit_equal": True}),
    "swiglu": replace(SPECIFICATION, expert="swiglu"),
    "8 experts per GPU": QWEN3,
    "8 experts per GPU, one by one": replace(QWEN3, knobs={"grouped_products": "off"}),
    "8 experts per GPU, serial": replace(QWEN3, schedule="serial"),
    "32 experts per GPU": DEEPSEEK_EP8,
}
OF_THE_LAYER = {  # parts of the simulated layer that are no attention, norm or residual
    "gate", "sort", "permute", "unpermute", "own rows", "moves", "experts", "input gradients", "weight gradients",
    "sum of gradients",
}  # fmt: skip


@dataclass(frozen=True)
class Recorded(LayerCosts):
    """Costs that keep what they are told."""

    told: dict[str, list[tuple[Sequence[Product], float]]] = field(default_factory=dict)

    def spend(
        self, part: str, products: Any = (), num_bytes: float = 0, num_launches: float = 0, attention_flops: float = 0
    ) -> float:
        self.told.setdefault(part, []).append((tuple(products), num_bytes))
        return super().spend(part, products, num_bytes, num_launches, attention_flops)

    def memory_bytes(self, parts: set[str]) -> float:
        """Bytes beside products; of the gate all, whose kernels multiply on the way."""
        gate = sum(each.count * each.num_bytes for products, _ in self.told.get("gate", []) for each in products)
        return gate + sum(moved for part in parts for _, moved in self.told.get(part, []))

    def products(self, part: str) -> list[Product]:
        return [each for products, _ in self.told.get(part, []) for each in products]


def simulated(sizes: Sizes, phase: str) -> Recorded:
    """What one layer of these sizes is told to spend in a pass."""
    model = ModelConfig(
        num_layers=1, hidden_size=sizes.width, num_heads=sizes.width // 512, expert_width=sizes.expert_width,
        expert=sizes.expert, sequence_length=sizes.num_tokens, recompute=True,
    )  # fmt: skip
    on = cluster(sizes.torus.num_nodes, sizes.torus.node_size)
    knobs = {"depth": 1, **sizes.knobs}
    job = setup(on, model, num_experts=sizes.num_experts, top_k=sizes.top_k, schedule=sizes.schedule, **knobs)
    precision: Any = {torch.float16: "fp16", torch.bfloat16: "bf16"}[sizes.dtype]
    job = replace(job, training=replace(job.training, micro_batch=1, precision=precision))
    parts = EpJob(job)
    costs = Recorded(job.model, job.moe, on.device, precision)
    parts.__dict__["costs"] = costs
    program = Program()
    getattr(parts, phase)(program, START, "layer")
    return costs


def counted_bytes(launches: Sequence[Launch]) -> int:
    """Bytes of what is no product, and of the gate's kernels."""
    beside = (each for each in launches if each.product is None or each.op.startswith("gate"))
    return sum(each.read_bytes + each.written_bytes for each in beside)


def of(launches: Sequence[Launch], where: str) -> list[Launch]:
    return [each for each in launches if each.where == where and each.product]


def assert_same_products(told: Sequence[Product], counted: Sequence[Launch]) -> None:
    assert sum(each.count for each in told) == pytest.approx(len(counted), rel=0.1)
    assert sum(each.count * each.flops for each in told) == pytest.approx(sum(c.flops for c in counted), rel=0.1)


def efficiency(products: Sequence[Product], half_rows: float = 128.0) -> float:
    ideal = sum(each.count * each.flops for each in products)
    return 100 * ideal / sum(each.count * each.flops * (1 + half_rows / each.rows) for each in products)


def assert_alike(sizes: Sizes) -> None:
    account = count(replace(sizes, residual="inside"))
    forward, backward = simulated(sizes, "forward"), simulated(sizes, "backward")
    for costs, launches in (
        (forward, account.forward),
        (forward, account.recomputed),
        (backward, account.backward),
    ):
        assert costs.memory_bytes(OF_THE_LAYER) == pytest.approx(counted_bytes(launches), rel=0.1)
    assert_same_products(forward.products("experts"), of(account.forward, "experts"))
    assert_same_products(backward.products("input gradients"), of(account.backward, "input gradients"))
    assert_same_products(backward.products("weight gradients"), of(account.backward, "weight gradients"))
    looped = count(replace(sizes, knobs={**sizes.knobs, "grouped_products": "off"}))  # the rows of each expert
    expected = efficiency_percent(of(looped.forward, "experts"))
    assert efficiency(forward.products("experts")) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
def test_a_simulated_layer_spends_what_its_code_does(sizes: Sizes) -> None:
    assert_alike(sizes)


WRONG = {
    "unpermute forward": lambda s: traffic.LeastTraffic(6 * s.token_bytes, 1),
    "unpermute backward": lambda s: traffic.LeastTraffic(10 * s.token_bytes, 1),
    "gelu": lambda s: traffic.LeastTraffic(3 * s.hidden_bytes, 1),
    "gelu backward, active rows kept": lambda s: traffic.LeastTraffic(4 * s.hidden_bytes, 1),
}


@pytest.mark.parametrize("operation", WRONG)
def test_one_wrong_cost_is_noticed(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    monkeypatch.setitem(traffic.TRAFFIC, operation, WRONG[operation])
    with pytest.raises(AssertionError):
        assert_alike(SPECIFICATION)


def test_a_piece_in_other_runs_would_be_noticed() -> None:
    account, other = count(SPECIFICATION), simulated(CASES["equal bits"], "forward")
    with pytest.raises(AssertionError):
        assert_same_products(other.products("experts"), of(account.forward, "experts"))


def attention_account(num_tokens: int, width: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Launch], int]:
    """All launches of attention by blocks, forward and backward, and how many are forward."""
    account = Account()

    def product(left: Tensor, right: Tensor, factor: float = 1.0) -> Tensor:
        out = left.new_empty(*left.shape[:2], right.shape[2], dtype=torch.float32)
        account.kernel("scores", [left, right], [out], (len(left) * left.shape[1], left.shape[2], right.shape[2]))
        return out

    def add_product(total: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> None:
        sizes = len(left) * left.shape[1], left.shape[2], right.shape[2]
        account.kernel("sums", [left, right, total], [total], sizes)

    monkeypatch.setattr(blocked, "_product", product)
    monkeypatch.setattr(blocked, "_add_product", add_product)
    monkeypatch.setattr(model_attention, "attention_path", lambda head_size, device_type: "blocks")
    with account, torch.device("meta"):
        layer = CausalAttention(width, width // 512).half()
        x_BSD = torch.empty(1, num_tokens, width, dtype=torch.float16, requires_grad=True)
        query, key, value = layer.qkv(x_BSD).unflatten(-1, (-1, 3, 512)).transpose(1, 2).unbind(3)
        account.launches.clear()
        out = blocked.blockwise_causal_attention(query, key, value).transpose(1, 2).flatten(2)
        num_forward = len(account.launches)
        torch.autograd.grad(out, [query, key, value], torch.empty_like(out))
    return account.launches, num_forward


@pytest.mark.parametrize(("num_tokens", "width"), [(10_000, 8192), (4096, 2048)])
def test_simulated_attention_by_blocks_spends_what_its_code_does(
    num_tokens: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches, num_forward = attention_account(num_tokens, width, monkeypatch)
    sizes = replace(SPECIFICATION, num_tokens=num_tokens, width=width)
    for phase, counted in (("forward", launches[:num_forward]), ("backward", launches[num_forward:])):
        costs = simulated(sizes, phase)
        assert costs.path == "blocks"
        moved = sum(num_bytes for _, num_bytes in costs.told["scores"])
        assert moved == pytest.approx(counted_bytes(counted), rel=0.1)
        told, products = costs.products("scores"), [each for each in counted if each.product]
        assert sum(each.count for each in told) == len(products)
        flops = sum(each.flops for each in products)
        assert sum(each.count * each.flops for each in told) == pytest.approx(flops, rel=0.1)


def test_plain_torch_is_told_where_no_kernel_runs() -> None:
    plain = replace(SPECIFICATION, knobs={"kernels": "torch"})
    told, least = (simulated(sizes, "forward").memory_bytes({"unpermute"}) for sizes in (plain, SPECIFICATION))
    assert told > 1.5 * least
