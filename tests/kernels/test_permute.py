"""Two gathers and their gradients, against autograd through plain indexing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ds_moe_ep.kernels.permute import RowMaps, permute, unpermute


def dropless_maps(num_tokens: int, num_choices: int, seed: int) -> RowMaps:
    order_N = torch.randperm(num_tokens * num_choices, generator=torch.Generator().manual_seed(seed))
    return RowMaps(order_N, order_N.argsort().view(num_tokens, num_choices))


def padded_maps(num_tokens: int, num_choices: int, seed: int) -> RowMaps:
    """Two rows more than choices, the choices of token 0 dropped."""
    generator = torch.Generator().manual_seed(seed)
    num_rows = num_tokens * num_choices + 2
    row_TK = torch.randperm(num_rows, generator=generator)[: num_tokens * num_choices].view(num_tokens, num_choices)
    is_dropped_TK = torch.zeros_like(row_TK, dtype=torch.bool)
    is_dropped_TK[:1] = True
    choice_of_row_N = torch.zeros(num_rows, dtype=torch.int64)
    is_padding_N = torch.ones(num_rows, dtype=torch.bool)
    kept = row_TK[~is_dropped_TK]
    choice_of_row_N[kept] = torch.arange(num_tokens * num_choices).view_as(row_TK)[~is_dropped_TK]
    is_padding_N[kept] = False
    return RowMaps(choice_of_row_N, row_TK.masked_fill(is_dropped_TK, 0), is_padding_N, is_dropped_TK)


def plain(x_TD: Tensor, weights_TK: Tensor, maps: RowMaps) -> tuple[Tensor, Tensor]:
    """The same by loops over rows and choices."""
    num_choices = weights_TK.shape[1]
    rows = []
    for row, choice in enumerate(maps.choice_of_row_N.tolist()):
        padded = maps.is_padding_N is not None and bool(maps.is_padding_N[row])
        rows.append(x_TD[choice // num_choices] * (0.0 if padded else 1.0))
    rows_ND = torch.stack(rows)
    tokens = []
    for token in range(len(x_TD)):
        terms = [
            rows_ND[maps.row_of_choice_TK[token, k]].square() * weights_TK[token, k]
            for k in range(num_choices)
            if maps.is_dropped_TK is None or not maps.is_dropped_TK[token, k]
        ]
        tokens.append(sum(terms, torch.zeros_like(x_TD[0])))
    return rows_ND, torch.stack(tokens)


@pytest.mark.parametrize("make_maps", [dropless_maps, padded_maps])
@pytest.mark.parametrize("num_choices", [1, 2, 3])
def test_rows_and_gradients_equal_plain_indexing(make_maps: object, num_choices: int) -> None:
    maps = make_maps(5, num_choices, seed=num_choices)  # type: ignore[operator]
    torch.manual_seed(0)
    x_TD, weights_TK = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, num_choices, dtype=torch.float64)
    x_TD[2] = float("nan") if num_choices == 3 else 1.0
    results = []
    for path in ("ours", "plain"):
        x, w = x_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
        if path == "ours":
            y = unpermute(permute(x, maps).square(), w, maps)
        else:
            _, y = plain(x, w, maps)
        y.sum().backward()
        results.append((y.detach(), x.grad, w.grad))
    for ours, theirs in zip(*results, strict=True):
        assert ours is not None and theirs is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13, equal_nan=True)
    wrong = RowMaps(maps.choice_of_row_N.roll(1), maps.row_of_choice_TK, maps.is_padding_N, maps.is_dropped_TK)
    y = unpermute(permute(x_TD, wrong).square(), weights_TK, wrong)
    assert not torch.allclose(y, results[0][0], equal_nan=True)


def test_bf16_rows_are_weighted_and_summed_in_fp32() -> None:
    maps = dropless_maps(64, 4, seed=1)
    torch.manual_seed(1)
    rows_ND, weights_TK = torch.randn(256, 16).bfloat16(), torch.rand(64, 4)
    exact = unpermute(rows_ND.double(), weights_TK.double(), maps)
    assert (
        torch.equal(unpermute(rows_ND, weights_TK, maps), exact.bfloat16())
        or ((unpermute(rows_ND, weights_TK, maps) - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()
    )


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_no_tokens_and_one_token_pass_through(num_tokens: int) -> None:
    maps = dropless_maps(num_tokens, 2, seed=0)
    x_TD = torch.ones(num_tokens, 3, requires_grad=True)
    weights_TK = torch.full((num_tokens, 2), 0.5, requires_grad=True)
    y_TD = unpermute(permute(x_TD, maps), weights_TK, maps)
    y_TD.sum().backward()
    assert torch.equal(y_TD, torch.ones(num_tokens, 3))
    assert x_TD.grad is not None and torch.equal(x_TD.grad, torch.ones(num_tokens, 3))
    assert weights_TK.grad is not None and torch.equal(weights_TK.grad, torch.full((num_tokens, 2), 3.0))


@pytest.mark.parametrize("num_choices", [1, 2])
def test_tokens_that_have_no_row_at_all_yield_zeros_and_get_zero_gradients(num_choices: int) -> None:
    nowhere_TK = torch.zeros(3, num_choices, dtype=torch.int64)
    maps = RowMaps(torch.empty(0, dtype=torch.int64), nowhere_TK, None, torch.ones_like(nowhere_TK, dtype=torch.bool))
    x_TD, weights_TK = torch.ones(3, 2, requires_grad=True), torch.ones(3, num_choices, requires_grad=True)
    y_TD = unpermute(permute(x_TD, maps), weights_TK, maps)
    y_TD.sum().backward()
    assert torch.equal(y_TD, torch.zeros(3, 2))
    assert x_TD.grad is not None and torch.equal(x_TD.grad, torch.zeros(3, 2))
    assert weights_TK.grad is not None and torch.equal(weights_TK.grad, torch.zeros(3, num_choices))


@pytest.mark.parametrize("make_maps", [dropless_maps, padded_maps])
@pytest.mark.parametrize("num_choices", [1, 2, 3])
def test_weighted_rows_equal_plain_indexing(make_maps: object, num_choices: int) -> None:
    maps = make_maps(5, num_choices, seed=num_choices)  # type: ignore[operator]
    torch.manual_seed(0)
    x_TD, weights_TK = torch.randn(5, 3, dtype=torch.float64), torch.rand(5, num_choices, dtype=torch.float64)
    results = []
    for weighted in (True, False):
        x, w = x_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
        weight_of_row_N1 = w.flatten()[maps.choice_of_row_N].unsqueeze(1)
        rows_ND = permute(x, maps, False, w) if weighted else permute(x, maps, False) * weight_of_row_N1
        rows_ND.backward(torch.linspace(1, 2, rows_ND.numel(), dtype=torch.float64).view_as(rows_ND))
        results.append((rows_ND.detach(), x.grad, w.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
