"""The kernels as a GPU runs them, by the checks that their interpreter passes; and what no CPU can hold or run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ds_moe_ep.kernels.attention import blockwise_causal_attention
from ds_moe_ep.kernels.choose import why_no_triton
from ds_moe_ep.kernels.permute import RowMaps, permute, unpermute
from tests.kernels import (
    test_activation,
    test_attention,
    test_compiled_permute,
    test_gate,
    test_grouped,
    test_rotary,
    test_sort,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HALVES_AND_FULL = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


def on_device(maps: RowMaps) -> RowMaps:
    masks = [None if mask is None else mask.cuda() for mask in (maps.is_padding_N, maps.is_dropped_TK)]
    return RowMaps(maps.choice_of_row_N.cuda(), maps.row_of_choice_TK.cuda(), *masks)


def test_the_kernels_run_here() -> None:
    assert why_no_triton("cuda") == ""


@HALVES_AND_FULL
def test_activations_equal_autograd(dtype: torch.dtype) -> None:
    with torch.device("cuda"):
        for shape in [*test_activation.SHAPES, (1000, 4096)]:
            for approximate in ("none", "tanh"):
                test_activation.check_gelu(shape, dtype, approximate, use_triton=None)
            test_activation.check_swiglu(shape, dtype, use_triton=None)


@HALVES_AND_FULL
@pytest.mark.parametrize("kind", test_compiled_permute.MAPS)
@pytest.mark.parametrize(
    ("num_tokens", "width", "num_choices"), [(5, 8, 1), (7, 1, 2), (300, 1031, 8), (1000, 8192, 2)]
)
def test_rows_leave_and_come_back_as_in_float64(
    num_tokens: int, width: int, num_choices: int, kind: str, dtype: torch.dtype
) -> None:
    maps = on_device(test_compiled_permute.MAPS[kind](num_tokens, num_choices, seed=1))
    with torch.device("cuda"):
        torch.manual_seed(0)
        x_TD, weights_TK = torch.randn(num_tokens, width).to(dtype), torch.rand(num_tokens, num_choices)
        added = [torch.randn(num_tokens, width).to(dtype) for _ in range(2)]
        ours = test_compiled_permute.there_and_back(x_TD, weights_TK, added, maps, use_triton=True)
        wide = x_TD.double(), weights_TK.double(), [each.double() for each in added]
        exact = test_compiled_permute.there_and_back(*wide, maps, use_triton=False)
        ours += test_compiled_permute.sent_and_summed(x_TD, weights_TK, maps, use_triton=True)
        exact += test_compiled_permute.sent_and_summed(*wide[:2], maps, use_triton=False)
    for one, other in zip(ours, exact, strict=True):
        bound = 4 * test_compiled_permute.TOLERANCE[dtype] * float(other.abs().max().clamp(min=1))
        torch.testing.assert_close(one.double(), other, rtol=0, atol=bound)


@pytest.mark.parametrize(("num_tokens", "num_choices", "num_experts"), [*test_sort.CASES, (20_000, 8, 256)])
def test_choices_are_sorted_as_python_does(num_tokens: int, num_choices: int, num_experts: int) -> None:
    for ids_TK, is_used_TK in test_sort.ways(num_tokens, num_choices, num_experts):
        used = None if is_used_TK is None else is_used_TK.cuda()
        test_sort.check(ids_TK.cuda(), used, num_experts, use_triton=True)


@HALVES_AND_FULL
def test_logits_equal_a_linear_layer(dtype: torch.dtype) -> None:
    with torch.device("cuda"):
        for shape in [*test_gate.SHAPES, (1000, 8192, 16), (600, 64, 300)]:
            test_gate.check_logits(shape, dtype, use_triton=True)


@HALVES_AND_FULL
@pytest.mark.parametrize("is_softmax", [True, False])
@pytest.mark.parametrize("num_experts", [3, 16, 64, 256])
def test_routes_equal_torchs_own_operations(num_experts: int, is_softmax: bool, dtype: torch.dtype) -> None:
    check = test_gate.test_routes_and_gradients_equal_torchs_own_operations.__wrapped__  # type: ignore[attr-defined]
    with torch.device("cuda"):
        check((67, 128, num_experts), 2, True, True, True, is_softmax, dtype)


@HALVES_AND_FULL
def test_pairs_turn_as_complex_numbers_do(dtype: torch.dtype) -> None:
    with torch.device("cuda"):
        for shape in test_rotary.SHAPES:
            test_rotary.check(shape, dtype, use_triton=True)


@HALVES_AND_FULL
def test_attention_by_blocks_equals_torchs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("cuda"):
        tensors = test_attention.inputs(300, 512, dtype)
        exact = test_attention.results(test_attention.torchs, [t.detach().double().requires_grad_() for t in tensors])
        monkeypatch.setattr("ds_moe_ep.kernels.attention_path.BLOCK_BYTES", 4 * 6 * 300 * 64)
        ours = test_attention.results(blockwise_causal_attention, tensors)
    bound = {torch.float32: 1e-5, torch.float16: 2**-8, torch.bfloat16: 2**-6}[dtype]
    for one, other in zip(ours, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=bound, atol=bound * float(other.abs().max()))


@pytest.mark.parametrize("rows_L", test_grouped.ROWS.values(), ids=test_grouped.ROWS)
def test_grouped_products_equal_a_product_per_expert(rows_L: tuple[int, ...]) -> None:
    with torch.device("cuda"):
        for dtype in (torch.bfloat16, torch.float16):
            test_grouped.check(rows_L, dtype, 64, torch.device("cuda"))


def test_rows_beyond_two_to_the_31_elements_are_where_they_belong() -> None:
    num_tokens, width, num_choices = 140_000, 8192, 2  # 2.3e9 elements of rows
    order_N = torch.randperm(num_tokens * num_choices, device="cuda")
    maps = RowMaps(order_N, order_N.argsort().view(num_tokens, num_choices))
    x_TD = torch.randn(num_tokens, width, device="cuda", dtype=torch.float16)
    weights_TK = torch.rand(num_tokens, num_choices, device="cuda")
    rows_ND = permute(x_TD, maps)
    assert rows_ND.numel() > 2**31
    far = slice(len(rows_ND) - 1000, None)
    assert torch.equal(rows_ND[far], x_TD[maps.token_of_row_N[far]])
    y_TD = unpermute(rows_ND, weights_TK, maps)
    expected_TD = x_TD[-1000:].float() * weights_TK[-1000:].sum(1, keepdim=True)
    torch.testing.assert_close(y_TD[-1000:].float(), expected_TD, rtol=2**-9, atol=2**-9)
    wrong = replace(maps, row_of_choice_TK=maps.row_of_choice_TK.roll(1, 0))
    assert not torch.equal(unpermute(rows_ND, weights_TK, wrong)[-1000:], y_TD[-1000:])


@HALVES_AND_FULL
def test_a_pass_over_tokens_reaches_a_good_part_of_the_memorys_speed(dtype: torch.dtype) -> None:
    """Unpermute, which reads and writes as much as a copy of two such tensors, takes at most twice as long."""
    maps = on_device(test_compiled_permute.MAPS["dropless"](10_000, 1, seed=0))
    rows_ND = torch.randn(10_000, 8192, device="cuda").to(dtype)
    weights_TK = torch.rand(10_000, 1, device="cuda")
    assert milliseconds(lambda: unpermute(rows_ND, weights_TK, maps)) < 2 * milliseconds(lambda: rows_ND.clone())


def milliseconds(call: object) -> float:
    """The least of some runs."""
    took: list[float] = []
    for _ in range(20):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result: Tensor = call()  # type: ignore[operator]
        stop.record()
        torch.cuda.synchronize()
        took.append(start.elapsed_time(stop))
        del result
    return min(took)
