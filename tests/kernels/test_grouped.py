"""Grouped products against a product per expert in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ds_moe_ep.kernels import grouped
from ds_moe_ep.kernels.grouped import Groups, grouped_rows, grouped_sums, grouped_weights, lie_together

ROWS = {
    "uneven": (5, 1, 7, 3),
    "one row each": (1, 1, 1, 1),
    "empty ones": (0, 4, 0, 0, 9, 0),
    "all to one": (0, 0, 13),
    "equal": (6, 6, 6),
    "equal, some empty": (0, 5, 5, 0),
    "none": (0, 0),
    "one expert": (8,),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
CPU = torch.device("cpu")


def exact(x_nI: Tensor, w_LIO: Tensor, rows_L: tuple[int, ...]) -> Tensor:
    parts = zip(x_nI.double().split(list(rows_L)), w_LIO.double(), strict=True)
    return torch.cat([x @ w for x, w in parts])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows_L", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("width", [16, 12])  # 12 half-precision numbers are no multiple of 16 bytes
def test_grouped_products_equal_a_product_per_expert(rows_L: tuple[int, ...], dtype: torch.dtype, width: int) -> None:
    check(rows_L, dtype, width, CPU)


def check(rows_L: tuple[int, ...], dtype: torch.dtype, width: int, device: torch.device) -> None:
    torch.manual_seed(len(rows_L))
    num_rows, groups = sum(rows_L), Groups.of(rows_L, device)
    x_nI, dy_nO = torch.randn(num_rows, width).to(dtype), torch.randn(num_rows, 24).to(dtype)
    w_LOI = torch.randn(len(rows_L), 24, width).to(dtype)
    y_nO = grouped_rows(x_nI, w_LOI.transpose(1, 2), groups)
    close(y_nO, exact(x_nI, w_LOI.transpose(1, 2), rows_L), dtype)
    close(grouped_rows(dy_nO, w_LOI, groups), exact(dy_nO, w_LOI, rows_L), dtype)
    parts = zip(dy_nO.double().split(list(rows_L)), x_nI.double().split(list(rows_L)), strict=True)
    close(grouped_weights(dy_nO, x_nI, groups), torch.stack([dy.t() @ x for dy, x in parts]), dtype)
    sums = torch.stack([dy.sum(0) for dy in dy_nO.double().split(list(rows_L))])
    close(grouped_sums(dy_nO, groups), sums, dtype)
    assert groups.expert_of_row().tolist() == [e for e, rows in enumerate(rows_L) for _ in range(rows)]


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype and found.shape == expected.shape
    if expected.numel():
        assert float((found.double() - expected).abs().max()) <= TOLERANCE[dtype] * float(
            expected.abs().max().clamp(min=1e-30)
        )


def test_ends_that_are_off_by_one_row_are_seen() -> None:
    x_nI, w_LIO = torch.randn(16, 16), torch.randn(4, 16, 24)
    shifted = grouped_rows(x_nI, w_LIO, Groups.of((5, 2, 6, 3), CPU))
    assert float((shifted - exact(x_nI, w_LIO, (5, 1, 7, 3))).abs().max()) > 0.1


@pytest.mark.parametrize("rows_L", [(5, 1, 7, 3), (4, 4, 4, 4)])
def test_many_experts_are_one_product(rows_L: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x_nI, w_LIO = torch.randn(16, 16), torch.randn(4, 16, 24)
    monkeypatch.setattr(torch, "mm", None)  # nothing is multiplied expert by expert
    grouped_rows(x_nI, w_LIO, Groups.of(rows_L, CPU))
    grouped_weights(torch.randn(16, 24), x_nI, Groups.of(rows_L, CPU))
    monkeypatch.setattr(grouped, "is_one_kernel", lambda rows: False)
    if rows_L != (4, 4, 4, 4):
        with pytest.raises(TypeError):
            grouped_rows(x_nI, w_LIO, Groups.of(rows_L, CPU))


def test_matrices_at_equal_distances_in_one_memory_are_one_tensor() -> None:
    flat = torch.arange(3 * 40.0)
    views = [flat[40 * i : 40 * i + 32].view(4, 8) for i in range(3)]
    together = lie_together(views)
    assert together is not None and together.data_ptr() == flat.data_ptr()
    assert torch.equal(together, torch.stack(views))


@pytest.mark.parametrize(
    "views",
    [
        lambda flat: [flat[:32].view(4, 8).clone() for _ in range(2)],
        lambda flat: [flat[0:32].view(4, 8), flat[40:72].view(4, 8), flat[84:116].view(4, 8)],
        lambda flat: [flat[0:32].view(4, 8), flat[0:32].view(4, 8)],
        lambda flat: [flat[0:32].view(4, 8), flat[33:65].view(4, 8)],
        lambda flat: [flat[1:33].view(4, 8), flat[41:73].view(4, 8)],
        lambda flat: [flat[0:32].view(8, 4).t(), flat[40:72].view(8, 4).t()],
        lambda flat: [flat[0:20].view(4, 5), flat[20:40].view(4, 5)],
    ],
    ids=["copies", "other distances", "one twice", "no multiple of 16 bytes", "no aligned start", "turned", "odd rows"],
)
def test_matrices_that_lie_otherwise_are_not(views: object) -> None:
    assert lie_together(views(torch.arange(120.0))) is None  # type: ignore[operator]
