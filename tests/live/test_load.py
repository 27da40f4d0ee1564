"""The figures that follow from a layer's counts, against torch and cases done by hand."""

from __future__ import annotations

import pytest
import torch

from ds_moe_ep.live.load import fullest_over_mean, quantile
from tests.live.sample_runs import layer

COUNTS = [(4, 4, 4, 4), (40, 10, 0, 30), (7, 0, 0, 0), (1, 2, 3, 90)]


@pytest.mark.parametrize("rows_E", COUNTS)
def test_shares_entropy_and_the_fullest_expert_are_those_of_torch(rows_E: tuple[int, ...]) -> None:
    load, counts_E = layer("moe", rows_E), torch.tensor(rows_E, dtype=torch.float64)
    share_E = counts_E / counts_E.sum()
    assert load.share_E == pytest.approx(share_E.tolist())
    entropy_nats = float(torch.distributions.Categorical(share_E).entropy())
    assert load.entropy_bits == pytest.approx(entropy_nats / float(torch.tensor(2.0).log()), abs=1e-6)
    assert load.max_over_mean == pytest.approx(float(counts_E.max() / counts_E.mean()))
    assert load.dead_experts == tuple((counts_E == 0).nonzero().flatten().tolist())


def test_a_layer_without_rows_has_no_share_and_no_division_by_zero() -> None:
    load = layer("moe", (0, 0, 0, 0), num_passes=0)
    assert (load.max_over_mean, load.entropy_bits, load.dropped_percent, load.rows_per_pass(0)) == (0, 0, 0, 0)
    assert load.dead_experts == (0, 1, 2, 3) and fullest_over_mean((0.0, 0.0)) == 1


def test_drops_and_replicas_are_counted_as_they_lie() -> None:
    load = layer("moe", dropped_E=(8, 0, 0, 0), guests_RS=((3, -1), (-1, 0)))
    assert load.dropped_percent == pytest.approx(10) and load.num_replicas == 2 and load.rows_per_pass(0) == 20


@pytest.mark.parametrize("share", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("number", [1, 2, 7, 64])
def test_quantiles_are_those_of_torch(share: float, number: int) -> None:
    values = torch.rand(number, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
    assert quantile(values.tolist(), share) == pytest.approx(float(values.quantile(share)))
