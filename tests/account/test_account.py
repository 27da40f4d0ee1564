"""Bounds on what a layer asks of a device beside its products, counted at the specification's sizes."""

from __future__ import annotations

import ast
import inspect
from dataclasses import replace

import pytest
import torch

from ds_moe_ep.config.topology import Torus
from tests.account.counting import Account
from tests.account.kernels import stand_ins
from tests.account.layer import Sizes, count
from tests.account.summary import (
    DEEPSEEK,
    DEEPSEEK_EP8,
    EP8,
    QWEN3,
    REPOSITORY,
    SPECIFICATION,
    TOP_2,
    figures,
    num_pieces,
)


@pytest.mark.parametrize("schedule", ["serial", "peers", "chunks"])
def test_weight_gradients_cost_no_memory_beside_one_product_each(schedule: str) -> None:
    found = figures(replace(SPECIFICATION, schedule=schedule))
    assert (found.weight_gradient_gb, found.weight_products) == (0, 2)


def test_sums_of_several_products_cost_one_cast_at_their_end() -> None:
    found = figures(replace(SPECIFICATION, knobs={"weight_blocks": 4}))
    parameters = 2 * SPECIFICATION.width * SPECIFICATION.expert_width
    assert found.weight_products == 2 * 4
    assert found.weight_gradient_gb == pytest.approx(parameters * (4 + 2) / 1e9)


@pytest.mark.parametrize(("schedule", "percent"), [("serial", 98), ("peers", 94), ("chunks", 95)])
def test_a_pieces_rows_are_two_products_which_are_large_enough(schedule: str, percent: int) -> None:
    sizes = replace(SPECIFICATION, schedule=schedule)
    found = figures(sizes)
    assert found.forward_products == 2 * num_pieces(sizes)
    assert round(found.efficiency_percent) >= percent


def test_bit_equal_schedules_pay_with_smaller_products() -> None:
    """The control: rows stacked by source are cut into a run per peer."""
    found = figures(replace(SPECIFICATION, knobs={"bit_equal": True}))
    assert found.forward_products == 22
    assert round(found.efficiency_percent) == 88
    assert found.weight_gradient_gb > 3


@pytest.mark.parametrize(("sizes", "most_ms"), [(SPECIFICATION, 3.5), (TOP_2, 5.0)], ids=["k=1", "k=2"])
@pytest.mark.parametrize("is_reentrant", [False, True])
def test_a_layer_spends_little_time_on_memory_beside_its_products(
    sizes: Sizes, most_ms: float, is_reentrant: bool
) -> None:
    assert figures(replace(sizes, is_reentrant=is_reentrant)).memory_ms <= most_ms


def test_the_peak_of_a_layer_fits_beside_its_states() -> None:
    assert figures(SPECIFICATION).peak_gb <= 6.3


def test_the_kernels_of_the_account_take_what_the_real_ones_take() -> None:
    for name, stand in stand_ins(Account()).items():
        path = REPOSITORY / (name.replace(".", "/") + ".py")
        if not path.exists():
            continue
        real = {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        for function, replaced in vars(stand).items():
            assert [a.arg for a in real[function].args.args] == list(inspect.signature(replaced).parameters), function


LARGE = 2**22  # bytes: more than the places of all rows take, less than the rows of any piece


@pytest.mark.parametrize(("sizes", "schedule"), [(QWEN3, "peers"), (DEEPSEEK_EP8, "serial")])
def test_rows_of_many_experts_move_in_one_launch_each_way_and_piece(sizes: Sizes, schedule: str) -> None:
    sizes = replace(sizes, schedule=schedule, knobs={"grouped_products": "off"})
    account, pieces = count(sizes), num_pieces(sizes)
    moves = [launch for launch in account.forward if launch.op in ("index_copy_", "index_select")]
    assert len([launch for launch in moves if launch.written_bytes > LARGE]) == 2 * pieces
    num_local = sizes.num_experts // sizes.torus.size
    products = [launch for launch in account.forward if launch.where == "experts" and launch.product]
    # The two near halves are cuts of messages in the order of experts: each has half of the experts, whole.
    num_parts = {"serial": 1, "peers": sizes.torus.num_nodes}[schedule]
    assert len(products) == 3 * num_parts * num_local
    weights = [launch for launch in account.backward if launch.where == "weight gradients"]
    assert len(weights) == 3 * num_local and all(launch.product for launch in weights)


@pytest.mark.parametrize(
    ("sizes", "schedule"), [(QWEN3, "peers"), (DEEPSEEK, "peers"), (DEEPSEEK_EP8, "peers"), (DEEPSEEK, "serial")]
)
def test_many_experts_are_one_product_per_matrix_and_piece(sizes: Sizes, schedule: str) -> None:
    sizes = replace(sizes, schedule=schedule)
    account, pieces = count(sizes), num_pieces(sizes)
    for launches in (account.forward, account.recomputed):
        assert len([launch for launch in launches if launch.where == "experts" and launch.product]) == 3 * pieces
    backward = [launch for launch in account.backward if launch.where == "input gradients" and launch.product]
    assert len(backward) == 3 * pieces
    weights = [launch for launch in account.backward if launch.where == "weight gradients"]
    assert len([launch for launch in weights if launch.product]) == 3
    # To bring tokens, results' gradients and three kinds of hidden rows by expert; nothing where there is one piece.
    assert len(weights) == 3 + (pieces > 1) * (2 + 3 * pieces)
    assert len(account.all) <= {"serial": 122, "peers": 233}[schedule]


@pytest.mark.parametrize(("schedule", "products", "launches"), [("serial", 3, 122), ("peers", 9, 189)])
def test_a_layer_of_64_experts_on_8_ranks_is_few_launches(schedule: str, products: int, launches: int) -> None:
    """By default 3 products per piece, and about half of the launches that a product per expert would make."""
    sizes = replace(EP8, schedule=schedule)
    found, looped = figures(sizes), figures(replace(sizes, knobs={"grouped_products": "off"}))
    assert (found.forward_products, found.weight_products) == (products, 3)
    assert found.launches <= launches and looped.launches > 1.7 * launches
    assert looped.forward_products > 5 * products


def test_other_types_without_a_kernel_and_weights_apart_are_looped() -> None:
    """The control: by default half-precision numbers that torch does not group are a product per expert."""
    sizes = replace(QWEN3, schedule="serial", dtype=torch.float16)
    assert figures(sizes).forward_products == 3 * 8


def test_a_residual_is_read_once_where_results_are_summed() -> None:
    alone, inside, outside = (
        sum(launch.read_bytes + launch.written_bytes for launch in count(replace(TOP_2, residual=where)).forward)
        for where in ("", "inside", "outside")
    )
    assert inside - alone == TOP_2.token_bytes
    assert outside - alone == 3 * TOP_2.token_bytes


@pytest.mark.parametrize(("top_k", "percent"), [(2, 23.3), (4, 51.9), (8, 75.0)])
def test_far_bytes_fall_by_the_copies_in_one_exchange_with_copies_and_in_four_with_sums(
    top_k: int, percent: float
) -> None:
    """16 experts on two nodes. Routes and weights behind a copy are 4 bytes per choice each: 0.4 % of it at k=8."""
    sizes = replace(SPECIFICATION, top_k=top_k, torus=Torus(2, 8))
    rows, copies, sums = (
        count(replace(sizes, knobs={} if kind == "off" else {"two_level": kind})) for kind in ("off", "copies", "sums")
    )
    exchanges = [f"{phase} {lane}" for phase in ("forward", "backward") for lane in ("dispatch", "combine")]
    fewer = {
        kind: [100 * (1 - found.far_bytes[each] / rows.far_bytes[each]) for each in exchanges]
        for kind, found in (("copies", copies), ("sums", sums))
    }
    assert fewer["copies"] == pytest.approx([percent, 0, 0, 0], abs=0.25)
    assert fewer["sums"] == pytest.approx([percent] * 4, abs=0.25)
    near = [lane for lane in (*copies.far_bytes, *sums.far_bytes) if lane not in exchanges]
    assert near and not any({**copies.far_bytes, **sums.far_bytes}[lane] for lane in near)


def test_copies_cost_a_layer_little_memory_traffic_beside_what_it_has() -> None:
    """A gather of copies at home, and one of rows at the relay: two launches per far node that move rows, each way."""
    sizes = replace(TOP_2, torus=Torus(2, 8))
    rows, copies = (figures(replace(sizes, knobs=knobs)) for knobs in ({}, {"two_level": "copies"}))
    assert copies.forward_products == rows.forward_products
    assert copies.memory_ms - rows.memory_ms < 1.0
    assert copies.launches - rows.launches < 100
