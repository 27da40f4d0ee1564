"""Triton's permute and unpermute, interpreted, against the plain-torch ones in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ds_moe_ep.kernels.permute import RowMaps, permute, unpermute
from tests.kernels.interpreter import under_interpreter
from tests.kernels.test_permute import dropless_maps, padded_maps

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # one rounding of the result


def all_to_one_expert(num_tokens: int, num_choices: int, seed: int) -> RowMaps:
    """One choice of each token goes to one expert, whose rows lie in token order; the rest is dropped."""
    row_TK = torch.arange(num_tokens).unsqueeze(1).expand(num_tokens, num_choices).contiguous()
    is_dropped_TK = torch.ones_like(row_TK, dtype=torch.bool)
    is_dropped_TK[:, seed % num_choices] = False
    choice_of_row_N = torch.arange(num_tokens) * num_choices + seed % num_choices
    return RowMaps(choice_of_row_N, row_TK.masked_fill(is_dropped_TK, 0), None, is_dropped_TK)


MAPS = {"dropless": dropless_maps, "padded": padded_maps, "one": all_to_one_expert}


def pairs(shapes: list[tuple[int, ...]]) -> list[tuple[tuple[int, ...], str, torch.dtype]]:
    """Every two of shape, maps and type together; all three would be thrice as many and reach no other code."""
    types = list(TOLERANCE)
    return [(shape, kind, types[(i + j) % len(types)]) for i, shape in enumerate(shapes) for j, kind in enumerate(MAPS)]


def there_and_back(
    x_TD: Tensor, weights_TK: Tensor, added: list[Tensor], maps: RowMaps, use_triton: bool
) -> list[Tensor]:
    """The result and all gradients of tokens that leave, are scaled by their row, and come back."""
    leaves = [tensor.clone().requires_grad_() for tensor in (x_TD, weights_TK, *added)]
    x, weights, *others = leaves
    rows_ND = permute(x, maps, use_triton)
    scale_N1 = torch.linspace(0.5, 1.5, len(rows_ND), dtype=torch.float64).unsqueeze(1)
    y_TD = unpermute(rows_ND * scale_N1.to(rows_ND.dtype), weights, maps, others, use_triton)
    y_TD.backward(torch.linspace(-1, 1, y_TD.numel(), dtype=torch.float64).view_as(y_TD).to(y_TD.dtype))
    grads = [leaf.grad for leaf in leaves]
    return [rows_ND.detach(), y_TD.detach(), *(grad for grad in grads if grad is not None)]


@pytest.mark.parametrize(
    ("shape", "kind", "dtype"), pairs([(5, 8, 1, 0), (7, 1, 2, 1), (3, 1031, 8, 0), (4, 2048, 2, 2), (1, 33, 1, 2)])
)
@under_interpreter
def test_results_and_gradients_equal_plain_torch_in_float64(
    shape: tuple[int, int, int, int], kind: str, dtype: torch.dtype
) -> None:
    num_tokens, width, num_choices, num_added = shape
    torch.manual_seed(num_tokens)
    maps = MAPS[kind](num_tokens, num_choices, seed=1)
    x_TD = torch.randn(num_tokens, width).to(dtype)
    added = [torch.randn(num_tokens, width).to(dtype) for _ in range(num_added)]
    weights_TK = torch.rand(num_tokens, num_choices)
    ours = there_and_back(x_TD, weights_TK, added, maps, use_triton=True)
    exact = there_and_back(x_TD.double(), weights_TK.double(), [each.double() for each in added], maps, False)
    assert len(ours) == len(exact) == 4 + num_added
    for one, other in zip(ours, exact, strict=True):
        assert one.dtype in (dtype, torch.float32)
        # Rows are rounded before they are weighted, so that an error is one of the largest value that goes in.
        bound = 4 * TOLERANCE[dtype] * float(other.abs().max().clamp(min=1))
        torch.testing.assert_close(one.double(), other, rtol=0, atol=bound)
    wrong = RowMaps(maps.choice_of_row_N, maps.row_of_choice_TK.flip(0), maps.is_padding_N, maps.is_dropped_TK)
    spoilt = there_and_back(x_TD, weights_TK, added, wrong, use_triton=True)
    assert num_tokens == 1 or width == 1 or not torch.allclose(spoilt[1], ours[1], atol=0.01)


def sent_and_summed(x_TD: Tensor, weights_TK: Tensor, maps: RowMaps, use_triton: bool) -> list[Tensor]:
    """Rows that are weighted on their way out, and the gradients of tokens and weights."""
    x, weights = x_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
    rows_ND = permute(x, maps, use_triton, weights)
    rows_ND.backward(torch.linspace(-1, 1, rows_ND.numel(), dtype=torch.float64).view_as(rows_ND).to(rows_ND.dtype))
    assert x.grad is not None and weights.grad is not None
    return [rows_ND.detach(), x.grad, weights.grad]


@pytest.mark.parametrize(("shape", "kind", "dtype"), pairs([(5, 8, 1), (7, 1, 2), (3, 1031, 8), (4, 2048, 3)]))
@under_interpreter
def test_weighted_rows_and_their_gradients_equal_plain_torch_in_float64(
    shape: tuple[int, int, int], kind: str, dtype: torch.dtype
) -> None:
    num_tokens, width, num_choices = shape
    torch.manual_seed(num_tokens)
    maps = MAPS[kind](num_tokens, num_choices, seed=1)
    x_TD, weights_TK = torch.randn(num_tokens, width).to(dtype), torch.rand(num_tokens, num_choices)
    exact = sent_and_summed(x_TD.double(), weights_TK.double(), maps, False)
    for use_triton in (True, False):
        for one, other in zip(sent_and_summed(x_TD, weights_TK, maps, use_triton), exact, strict=True):
            assert one.dtype in (dtype, torch.float32)
            bound = 4 * TOLERANCE[dtype] * float(other.abs().max().clamp(min=1))
            torch.testing.assert_close(one.double(), other, rtol=0, atol=bound)
    other_weights = sent_and_summed(x_TD, weights_TK + 0.5, maps, True)
    assert not torch.allclose(other_weights[0].double(), exact[0], atol=0.01)


@under_interpreter
def test_weights_without_gradient_read_no_tokens_backward() -> None:
    maps = dropless_maps(3, 2, seed=0)
    x_TD = torch.randn(3, 40, requires_grad=True)
    permute(x_TD, maps, True, torch.full((3, 2), 2.0)).sum().backward()
    assert x_TD.grad is not None and torch.equal(x_TD.grad, torch.full((3, 40), 4.0))


@pytest.mark.parametrize(("num_tokens", "num_rows"), [(0, 0), (0, 3), (3, 0)])
@under_interpreter
def test_no_tokens_or_no_rows_yield_zeros(num_tokens: int, num_rows: int) -> None:
    nowhere_TK = torch.zeros(num_tokens, 2, dtype=torch.int64)
    is_padding_N = torch.ones(num_rows, dtype=torch.bool)
    maps = RowMaps(torch.zeros(num_rows, dtype=torch.int64), nowhere_TK, is_padding_N, nowhere_TK == 0)
    x_TD, weights_TK = torch.ones(num_tokens, 5, requires_grad=True), torch.ones(num_tokens, 2, requires_grad=True)
    rows_ND = permute(x_TD, maps, True)
    assert torch.equal(rows_ND, torch.zeros(num_rows, 5))
    unpermute(rows_ND, weights_TK, maps, (), True).sum().backward()
    assert x_TD.grad is not None and torch.equal(x_TD.grad, torch.zeros(num_tokens, 5))
    assert weights_TK.grad is not None and torch.equal(weights_TK.grad, torch.zeros(num_tokens, 2))
    permute(x_TD, maps, True, weights_TK).sum().backward()
    assert torch.equal(x_TD.grad, torch.zeros(num_tokens, 5))


@under_interpreter
def test_rows_of_dropped_choices_are_never_read() -> None:
    maps = padded_maps(4, 2, seed=3)
    rows_ND = torch.randn(len(maps.choice_of_row_N), 40)
    rows_ND[maps.is_padding_N] = float("nan")
    rows_ND[0] = float("nan") if bool((maps.row_of_choice_TK[1:] != 0).all()) else rows_ND[0]
    y_TD = unpermute(rows_ND, torch.ones(4, 2), maps, (), True)
    assert torch.equal(y_TD[0], torch.zeros(40)) and not y_TD[1:].isnan().any()


@under_interpreter
def test_a_weight_without_gradient_costs_no_dot_products() -> None:
    maps = dropless_maps(3, 2, seed=0)
    rows_ND = torch.randn(6, 40, requires_grad=True)
    unpermute(rows_ND, torch.full((3, 2), 2.0), maps, (), True).sum().backward()
    assert rows_ND.grad is not None and torch.equal(rows_ND.grad, torch.full((6, 40), 2.0))
