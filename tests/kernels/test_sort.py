"""The sort of choices by expert, plain and by Triton's interpreter, against Python's own stable sort."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ds_moe_ep.kernels.sort import sort_choices
from tests.kernels.interpreter import under_interpreter

CASES = [(0, 2, 4), (1, 1, 1), (7, 1, 3), (300, 2, 16), (129, 8, 33), (700, 1, 70)]  # tokens, choices, experts


def check(ids_TK: Tensor, is_used_TK: Tensor | None, num_experts: int, use_triton: bool) -> None:
    sorted_choices = sort_choices(ids_TK, is_used_TK, num_experts, use_triton)
    is_used = [True] * ids_TK.numel() if is_used_TK is None else is_used_TK.flatten().tolist()
    keys = [e if used else num_experts for e, used in zip(ids_TK.flatten().tolist(), is_used, strict=True)]
    expected = sorted(range(len(keys)), key=keys.__getitem__)
    assert sorted_choices.choice_of_row_N.tolist() == expected
    row_of_choice = sorted_choices.row_of_choice_TK
    assert row_of_choice.shape == ids_TK.shape and row_of_choice.dtype == torch.int64
    assert row_of_choice.flatten()[torch.tensor(expected, dtype=torch.int64)].tolist() == list(range(len(keys)))
    assert sorted_choices.count_E.tolist() == [keys.count(e) for e in range(num_experts)]


def ways(num_tokens: int, num_choices: int, num_experts: int) -> list[tuple[Tensor, Tensor | None]]:
    """Even and uneven choices, all to one expert, and some or none of them used."""
    generator = torch.Generator().manual_seed(num_tokens)
    shape = (num_tokens, num_choices)
    ids_TK = torch.randint(num_experts, shape, generator=generator)
    some_TK = torch.rand(shape, generator=generator) < 0.6
    one_TK = torch.full(shape, num_experts - 1)
    return [(ids_TK, None), (ids_TK, some_TK), (one_TK, None), (one_TK, some_TK), (ids_TK, torch.zeros_like(some_TK))]


@pytest.mark.parametrize(("num_tokens", "num_choices", "num_experts"), CASES)
def test_plain_torch_sorts_as_python_does(num_tokens: int, num_choices: int, num_experts: int) -> None:
    for ids_TK, is_used_TK in ways(num_tokens, num_choices, num_experts):
        check(ids_TK, is_used_TK, num_experts, use_triton=False)


@pytest.mark.parametrize(("num_tokens", "num_choices", "num_experts"), CASES)
@under_interpreter
def test_the_kernels_sort_as_python_does(num_tokens: int, num_choices: int, num_experts: int) -> None:
    for ids_TK, is_used_TK in ways(num_tokens, num_choices, num_experts):
        check(ids_TK, is_used_TK, num_experts, use_triton=True)
    if num_tokens == 300:
        with pytest.raises(AssertionError):  # a mask that is not given is no mask
            sorted_choices = sort_choices(ids_TK, None, num_experts, True)
            assert sorted_choices.count_E.sum() == 0


@under_interpreter
def test_ids_that_are_no_contiguous_tensor_are_sorted_as_they_read() -> None:
    ids_KT = torch.randint(5, (2, 40), generator=torch.Generator().manual_seed(0))
    check(ids_KT.t(), (ids_KT.t() != 2), 5, use_triton=True)
    check(ids_KT.t(), torch.ones(40, 1, dtype=torch.bool).expand(40, 2), 5, use_triton=True)
