import math

import pytest
import torch

from ds_moe_ep.kernels.attention_path import attention_path
from ds_moe_ep.kernels.rotary import Rotation, turn
from ds_moe_ep.model import attention as model_attention
from ds_moe_ep.model.attention import CausalAttention, rotation_of


def plain_attention(attention: CausalAttention, x_SD: torch.Tensor) -> torch.Tensor:
    """One sequence, head by head and token by token, with rotations as complex numbers."""
    num_tokens, width, size = *x_SD.shape, attention.head_size
    weight = attention.qkv.weight.view(-1, 3, size, width)
    heads = []
    for query_w, key_w, value_w in weight:
        query, key, value = (x_SD @ w.T for w in (query_w, key_w, value_w))
        query, key = turned(query), turned(key)
        rows = []
        for i in range(num_tokens):
            scores = torch.stack([query[i] @ key[j] / math.sqrt(size) for j in range(i + 1)])
            rows.append(scores.softmax(0) @ value[: i + 1])
        heads.append(torch.stack(rows))
    return torch.cat(heads, 1) @ attention.out.weight.T


def turned(x_SH: torch.Tensor) -> torch.Tensor:
    half = x_SH.shape[1] // 2
    pairs = torch.complex(x_SH[:, :half], x_SH[:, half:])
    for position in range(len(x_SH)):
        for i in range(half):
            angle = torch.tensor(position * 10_000.0 ** (-i / half), dtype=torch.float64)
            pairs[position, i] *= torch.polar(torch.tensor(1.0, dtype=torch.float64), angle)
    return torch.cat((pairs.real, pairs.imag), 1)


@pytest.mark.parametrize(("num_heads", "num_tokens"), [(1, 1), (2, 7), (8, 12)])
def test_attention_equals_the_sum_written_out(num_heads: int, num_tokens: int) -> None:
    torch.manual_seed(0)
    attention = CausalAttention(32, num_heads).double()
    x_BSD = torch.randn(2, num_tokens, 32, dtype=torch.float64)
    rotation = rotation_of(num_tokens, 32 // num_heads, x_BSD.device)
    expected = torch.stack([plain_attention(attention, x_SD) for x_SD in x_BSD])
    torch.testing.assert_close(attention(x_BSD, rotation), expected, rtol=1e-5, atol=1e-6)  # angles are fp32


def rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    rotated = torch.empty_like(x)
    turn(x, *rotation, rotated)
    return rotated


def test_scores_depend_on_the_distance_of_two_tokens_and_not_on_their_places() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 16, dtype=torch.float64).expand(2, 40, 16)
    rotation = rotation_of(40, 16, query.device)
    scores = rotate(query, rotation) @ rotate(key, rotation).T
    for distance in (1, 5, 20):
        same_distance = scores.diagonal(-distance)
        torch.testing.assert_close(same_distance, same_distance[:1].expand_as(same_distance), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(scores[5, 0], scores[6, 0])


def test_rotation_keeps_fp16_rows_in_fp16_and_their_angles_in_fp32() -> None:
    rotation = rotation_of(5000, 8, torch.device("cpu"))
    assert rotation[0].dtype == torch.float32
    assert rotate(torch.ones(5000, 8, dtype=torch.float16), rotation).dtype == torch.float16
    assert not torch.equal(rotation[0][4096], rotation[0][4097])


def test_qkv_cut_by_rows_and_out_cut_by_columns_sum_to_the_whole_layer() -> None:
    torch.manual_seed(0)
    whole = CausalAttention(32, 4).double()
    x_BSD = torch.randn(2, 6, 32, dtype=torch.float64)
    rotation = rotation_of(6, 8, x_BSD.device)
    total = torch.zeros_like(x_BSD)
    for rank in range(2):
        part = CausalAttention(32, 4).double()
        part.qkv.weight = torch.nn.Parameter(whole.qkv.weight.chunk(2, 0)[rank].clone())
        part.out.weight = torch.nn.Parameter(whole.out.weight.chunk(2, 1)[rank].clone())
        total += part(x_BSD, rotation)
    torch.testing.assert_close(total, whole(x_BSD, rotation))


def test_heads_that_no_flash_kernel_takes_go_by_blocks_on_cuda_and_give_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = [attention_path(512, "cuda"), attention_path(256, "cuda"), attention_path(512, "cpu")]
    assert paths == ["blocks", "flash", "torch"]
    torch.manual_seed(0)
    layer = CausalAttention(64, 2).double()
    x_BSD, rotation = torch.randn(2, 9, 64, dtype=torch.float64), rotation_of(9, 32, torch.device("cpu"))
    expected = layer(x_BSD, rotation)
    monkeypatch.setattr(model_attention, "attention_path", lambda head_size, device_type: "blocks")
    torch.testing.assert_close(layer(x_BSD, rotation), expected)
    monkeypatch.setattr(model_attention, "blockwise_causal_attention", lambda query, key, value: value)
    assert not torch.allclose(layer(x_BSD, rotation), expected)
