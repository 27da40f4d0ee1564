"""One product for all experts of a rank, against the float64 reference and against a product per expert."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ds_moe_ep.comm.lanes import make_lanes
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.kernels.grouped import lie_together
from ds_moe_ep.kernels.permute import RowMaps
from ds_moe_ep.moe.agreement import NO_CALL
from ds_moe_ep.moe.dispatch_plan import DispatchPlan
from ds_moe_ep.moe.experts import GeluMLP, SwiGLU
from ds_moe_ep.moe.grouped import choice
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.moe.tuner import AutotuneRun
from ds_moe_ep.schedule.benchmark import SERIAL
from tests.moe.layer_cases import LayerCase, OddExpert, case_data
from tests.moe.layer_runs import TAMPERS, Links, config
from tests.moe.replica_cases import connected, hosted_case, pin, replicas_of
from tests.moe.test_parity import compare
from tests.ranks import RankPool

KINDS = ("gelu", "gelu_bias", "swiglu", "swiglu_bias", "swiglu_odd")
D, F, E = 16, 32, 6


def grouped_cases(are_all: bool = False) -> list[LayerCase]:
    """All combinations, or every two of kind, schedule and routing, with experts that get all rows, one or none."""
    knobs = {"grouped_products": "on", "ep_size": 4, "num_experts": 12, "top_k": 2, "node_size": 2}
    cases = [
        LayerCase(name=f"{kind}, {schedule}, {dtype}, capacity={factor}", expert=kind, dtype=dtype, rows=(20,) * 4,
                  config=config(**knobs, schedule=schedule, capacity_factor=factor))
        for i, kind in enumerate(KINDS)
        for j, schedule in enumerate(("serial", "peers", "chunks"))
        for k, (factor, dtype) in enumerate(((None, torch.float32), (1.0, torch.float32), (None, torch.bfloat16)))
        if are_all or (i + j + k) % 3 == 0
    ]  # fmt: skip
    uneven = config(**knobs, row_cuts=3, depth=1)
    for kind in ("gelu", "swiglu_bias"):
        cases.append(LayerCase(name=f"few rows, {kind}", config=uneven, rows=(3, 0, 9, 1), expert=kind))
        cases.append(LayerCase(name=f"one draws, {kind}", config=uneven, rows=(24,) * 4, expert=kind, skew=3.0))
        cases.append(LayerCase(name=f"masked, {kind}", config=uneven, rows=(24,) * 4, expert=kind, masked=True))
        cases.append(LayerCase(name=f"shared, {kind}", config=uneven, rows=(24,) * 4, expert=kind, shared=True))
    return cases


@pytest.mark.parametrize("are_all", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_grouped_products_equal_the_reference_on_four_ranks(pool: RankPool, are_all: bool) -> None:
    assert compare(pool, grouped_cases(are_all)) == {}


@pytest.mark.parametrize("tamper", TAMPERS[:1])
def test_damage_is_seen_through_grouped_products(pool: RankPool, tamper: str) -> None:
    case = next(case for case in grouped_cases() if case.config.schedule == "peers" and case.dtype == torch.float32)
    assert set(compare(pool, [case], tamper)) == {case.name}


class CountProducts(TorchDispatchMode):
    """Counts matrix products by their op."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if name in ("mm", "addmm", "addmm_", "bmm", "_grouped_mm"):
            self.seen[name] = self.seen.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def layer_of(kind: type[nn.Module] = GeluMLP, bias: bool = False, **knobs: Any) -> ExpertParallel:
    torch.manual_seed(0)
    given: dict[str, Any] = {"num_experts": E, "top_k": 2, "grouped_products": "on", **knobs}
    layer = ExpertParallel(D, kind(D, F, bias=bias), MoEConfig(**given))
    layer.experts.lay_together()
    return layer


def tokens(num_tokens: int = 40) -> Tensor:
    return torch.randn(num_tokens, D, generator=torch.Generator().manual_seed(1)).requires_grad_()


def gradients(layer: ExpertParallel, x_TD: Tensor, y_TD: Tensor) -> list[Tensor]:
    wanted = [x_TD, *(each for each in layer.parameters() if each.requires_grad)]
    return list(torch.autograd.grad(y_TD.square().sum(), wanted))


@pytest.mark.parametrize("kind", [GeluMLP, SwiGLU])
def test_a_pass_makes_one_product_per_matrix(kind: type[nn.Module]) -> None:
    num_matrices = 2 if kind is GeluMLP else 3
    x_TD = tokens()
    products = {}
    for grouped in ("on", "off"):
        layer = layer_of(kind, grouped_products=grouped)
        with CountProducts() as forward:
            y_TD, *_ = layer(x_TD)
        with CountProducts() as backward:
            gradients(layer, x_TD, y_TD)
        products[grouped] = forward.seen, backward.seen
    assert [seen.get("_grouped_mm") for seen in products["on"]] == [num_matrices, 2 * num_matrices]
    assert products["off"][0]["mm"] - products["on"][0].get("mm", 0) == num_matrices * E
    assert not any("_grouped_mm" in seen for seen in products["off"])


@pytest.mark.parametrize("schedule", ["serial", "chunks"])
@pytest.mark.parametrize(("kind", "bias"), [(GeluMLP, True), (SwiGLU, False)])
@pytest.mark.parametrize("is_reentrant", [True, False])
def test_recomputation_and_a_retained_graph_give_the_same_gradients(
    kind: type[nn.Module], bias: bool, schedule: str, is_reentrant: bool
) -> None:
    layer, x_TD = layer_of(kind, bias, schedule=schedule), tokens()
    plain = gradients(layer, x_TD, layer(x_TD)[0])
    y_TD, *_ = torch.utils.checkpoint.checkpoint(layer, x_TD, use_reentrant=is_reentrant)
    wanted = [x_TD, *layer.parameters()]
    y_TD.square().sum().backward()
    again = [each.grad for each in wanted]
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True) if other is not None)
    y_TD, *_ = layer(x_TD)
    for _ in range(2):
        twice = torch.autograd.grad(y_TD.square().sum(), wanted, retain_graph=True)
        assert all(torch.equal(one, other) for one, other in zip(plain, twice, strict=True))


def test_frozen_matrices_get_no_gradient_and_experts_without_rows_get_zeros() -> None:
    layer, x_TD = layer_of(top_k=1), tokens(2)  # two tokens: most experts have no row
    for expert in layer.experts.deepspeed_experts:
        expert.fc1.weight.requires_grad_(False)
    layer(x_TD)[0].sum().backward()
    used = {int(index) for index in layer.last_counts_E.nonzero()}
    for index, expert in enumerate(layer.experts.deepspeed_experts):
        assert expert.fc1.weight.grad is None
        assert bool(expert.fc2.weight.grad.any()) == (index in used)
    nothing, *_ = layer(x_TD[:0])
    nothing.sum().backward()
    assert nothing.shape == (0, D)


def test_weights_that_lie_apart_give_the_same_results() -> None:
    x_TD, layer = tokens(), layer_of(SwiGLU, bias=True)
    together = gradients(layer, x_TD, layer(x_TD)[0])
    layer.float()  # no change of type: memory stays
    for parameter in layer.experts.parameters():
        parameter.data = parameter.data.clone()
    assert lie_together([expert.up.weight for expert in layer.experts.deepspeed_experts]) is None
    apart = gradients(layer, x_TD, layer(x_TD)[0])
    assert all(torch.equal(one, other) for one, other in zip(together, apart, strict=True))


@contextmanager
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    choice.say_once.cache_clear()
    lines: list[str] = []
    with caplog.at_level(logging.INFO, logger=choice.__name__):
        yield lines
    lines += [record.getMessage() for record in caplog.records if record.name == choice.__name__]


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"grouped_products": "on"}, "one for all of a rank"),
        ({"grouped_products": "auto"}, "rows are on the CPU"),
        ({"grouped_products": "auto", "bit_equal": True}, "sums over blocks of rows"),
        ({"grouped_products": "off"}, None),
    ],
)
def test_the_log_says_once_how_products_are_made_and_why(
    knobs: dict[str, Any], said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    layer = layer_of(**knobs)
    with logged(caplog) as lines:
        layer(tokens()), layer(tokens())
    assert len(lines) == (said is not None)
    assert said is None or said in lines[0]


def test_a_device_without_the_kernel_and_large_products_are_left_to_the_loop() -> None:
    why = choice._why_by_weights
    layer = layer_of()
    known = layer.experts.known()
    assert known is not None
    few, many = (MoEConfig(num_experts=E) for _ in range(2))
    assert why(few, *known, 4, 4 * E * 1000) == ""
    assert "fills the device" in why(many, *known, 4, 4 * E * choice.LARGE_PRODUCT // F + 100)
    assert why(many, *known, 1, 4 * E * choice.LARGE_PRODUCT // F + 100) == ""  # nothing to bring together
    layer.double()
    known = layer.experts.known()
    assert known is not None and "equal distances" in why(few, *known, 4, 100)


def test_what_cannot_be_grouped_is_refused_where_it_is_demanded() -> None:
    with pytest.raises(ConfigError, match="bit_equal"):
        MoEConfig(bit_equal=True, grouped_products="on")
    layer = ExpertParallel(D, OddExpert(), MoEConfig(num_experts=E, grouped_products="on"))
    with pytest.raises(ConfigError, match=r'grouped_products="on": the experts are modules of unknown form'):
        layer(tokens())


def products_with_copies(grouped: str) -> tuple[list[dict[str, int]], int]:
    """Products forward and backward of a pass with two copies on this rank, beside two experts; and all copies."""
    case = hosted_case("products", num_experts=8, replicas=2, schedule="serial", grouped_products=grouped, top_k=3)
    layer = connected(case, Links())
    pin(layer, (7, 2), (6, 0), (1, 7), (0, 3))
    data, rank = case_data(case), dist.get_rank()
    with CountProducts() as forward:
        y_TD, *_ = layer(data.inputs[rank].clone().requires_grad_())
    with CountProducts() as backward:
        y_TD.sum().backward()
    rows = {"_grouped_mm": 0, "bmm": 0, "mm": 0}
    return [rows | forward.seen, rows | backward.seen], len(replicas_of(layer).placement.copies)


def test_own_experts_and_the_copies_in_slots_are_a_product_each(pool: RankPool) -> None:
    """A GELU expert has two matrices: forward a product with each, backward two."""
    found = {how: pool.run(4, products_with_copies, how) for how in ("on", "off")}
    for (on, copies), (off, _) in zip(found["on"], found["off"], strict=True):
        assert copies == 8
        grouped = [seen["_grouped_mm"] + seen["bmm"] for seen in on]
        assert grouped[0] <= 2 * 2 and grouped[1] <= 2 * 2 * 2, on
        assert grouped[0] >= 2 and not any(seen["_grouped_mm"] for seen in off)
        fewer = [many["mm"] - few["mm"] for many, few in zip(off, on, strict=True)]
        assert fewer == [2 * 4, 2 * 2 * 4], (on, off)


def test_passes_and_the_tuner_group_the_rank_s_own_experts_and_copies_by_themselves() -> None:
    layer = layer_of()
    dispatcher, maps = layer.dispatcher, RowMaps(torch.arange(2), torch.arange(2).view(2, 1))
    layer(tokens())
    transport, lanes = dispatcher.checked_connection().transport, make_lanes(torch.device("cpu"), 1)
    for num_places in (E, E + 1):
        rows_L = ((2,) * num_places,)
        plan, rows_ND = DispatchPlan(maps, rows_L, rows_L), torch.zeros(2 * num_places, D)
        run = AutotuneRun(layer.config, rows_ND, plan, layer.experts, transport, Torus(1, 1), lanes)
        contexts = run._context_of(SERIAL), dispatcher._context(rows_ND, plan, layer.experts, NO_CALL, None)
        sizes = [[len(grouping.rows_L) for grouping in context.layout.groupings] for context in contexts]
        assert sizes == [[E] if num_places == E else [E, 1]] * 2
