"""The cases route as they say, and layers that compute different things are refused before they are timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

from ds_moe_ep.bench.candidates.cases import (
    CASES,
    FIRST_LOGIT,
    LayerCase,
    expert_ids,
    gate_weight,
    rows_per_expert,
    tokens,
)
from ds_moe_ep.bench.candidates.layers import LayerCandidate, LayerSetup, candidate_of, load_weights
from ds_moe_ep.bench.harness.collector import Collector
from ds_moe_ep.bench.harness.processes import Finding
from ds_moe_ep.bench.layer.command import LayerBenchmark, LayerOptions
from ds_moe_ep.bench.layer.findings import layer_table
from ds_moe_ep.bench.layer.same import LayerOutcome, check_same, outcome_of
from ds_moe_ep.bench.meters.traffic import bytes_leaving
from ds_moe_ep.errors import ConfigError, EngineError
from ds_moe_ep.records.provenance import Provenance
from ds_moe_ep.records.render import to_markdown

SOURCE = Provenance(command="python -m bench", commit="abc", hardware="2 cores")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tokens_lead_the_gate_to_the_stated_experts_with_a_margin(case: LayerCase) -> None:
    logits_TE = tokens(case, rank=2) @ gate_weight(case).t()
    best = logits_TE.topk(case.top_k + 1, dim=1)
    assert torch.equal(best.indices[:, : case.top_k], expert_ids(case, rank=2))
    k = case.top_k  # the choices' logits are the first one's over 1, 2, 3, ...: the last two are the closest
    closest = FIRST_LOGIT / (k * (k - 1)) if k > 1 else FIRST_LOGIT
    assert float((best.values[:, :-1] - best.values[:, 1:]).min()) > 0.9 * closest


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loads_are_what_the_case_is_called(case: LayerCase) -> None:
    ids_TK = expert_ids(case, rank=0)
    rows_E = torch.bincount(ids_TK.flatten(), minlength=case.num_experts)
    fullest_in_means = float(rows_E.max()) * case.num_experts / case.num_rows
    assert int(rows_E.sum()) == case.num_rows
    if case.load != "random":
        assert rows_E.tolist() == rows_per_expert(case)
    expected = {"even": (1.0, 1.0), "random": (1.01, 1.5), "skewed": (4.9, 5.1)}[case.load]
    assert expected[0] <= fullest_in_means <= expected[1]
    assert case.top_k == 1 or bool((ids_TK.sort(1).values.diff(dim=1) > 0).all())


def test_ranks_and_seeds_differ_and_calls_do_not() -> None:
    case = CASES[0]
    assert torch.equal(tokens(case, 1), tokens(case, 1))
    assert not torch.equal(tokens(case, 1), tokens(case, 0))
    assert not torch.equal(tokens(case, 1), tokens(dataclasses.replace(case, seed=1), 1))


class Dense(nn.Module):
    """A layer of the benchmark's shape on one rank, every expert on its tokens."""

    def __init__(self, case: LayerCase) -> None:
        super().__init__()
        self.deepspeed_moe = nn.Module()
        self.deepspeed_moe.gate = nn.Module()
        self.deepspeed_moe.gate.wg = nn.Linear(case.hidden_size, case.num_experts, bias=False)
        self.deepspeed_moe.experts = nn.Module()
        self.deepspeed_moe.experts.deepspeed_experts = nn.ModuleList(
            nn.Sequential(nn.Linear(case.hidden_size, case.width), nn.GELU(), nn.Linear(case.width, case.hidden_size))
            for _ in range(case.num_experts)
        )

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        scores_TE = self.deepspeed_moe.gate.wg(x_TD).softmax(1)
        ids_T = scores_TE.argmax(1)
        y_TD = torch.zeros_like(x_TD)
        for index, expert in enumerate(self.deepspeed_moe.experts.deepspeed_experts):
            y_TD = y_TD + (ids_T == index).unsqueeze(1) * scores_TE[:, index : index + 1] * expert(x_TD)
        counts_E = torch.bincount(ids_T, minlength=scores_TE.shape[1])
        return y_TD, (scores_TE.mean(0) * counts_E / len(x_TD)).sum(), counts_E


SMALL = LayerCase(name="small", top_k=1, load="skewed", hidden_size=16, width=32, num_experts=4, num_tokens=64, skew=2)


def dense() -> LayerCandidate:
    setup = LayerSetup(case=SMALL, rank=0, num_ranks=1, aux_loss_weight=0.01)
    return candidate_of(load_weights(Dense(SMALL), setup), setup)


def outcome(change: Callable[[nn.Module], object] = lambda layer: None) -> LayerOutcome:
    candidate = dense()
    with torch.no_grad():
        change(candidate.layer)
    return outcome_of(candidate)


def test_layers_with_equal_weights_are_the_same_and_leave_no_gradient_behind() -> None:
    assert check_same("small", outcome(), outcome()) == 0.0
    candidate = dense()
    assert {"y", "l_aux", "dx", "dwg", "d0.0", "d3.3"} <= set(outcome_of(candidate).tensors)
    assert all(leaf.grad is None for leaf in (candidate.x_TD, *candidate.layer.parameters()))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("y", lambda layer: layer.deepspeed_moe.experts.deepspeed_experts[3][2].bias.add_(0.01)),
        ("exp_counts", lambda layer: layer.deepspeed_moe.gate.wg.weight.copy_(gate_weight(SMALL).flip(0))),
    ],
)
def test_layers_that_compute_different_things_are_refused(name: str, change: Callable[[nn.Module], object]) -> None:
    with pytest.raises(EngineError, match=rf"bench\.small\.{name}"):
        check_same("small", outcome(change), outcome())


def test_a_lost_gradient_and_a_nan_are_refused() -> None:
    good = outcome()
    lost = dataclasses.replace(good, tensors=good.tensors | {"d1.0": torch.zeros(())})
    with pytest.raises(EngineError, match=r"d1\.0: shapes"):
        check_same("small", lost, good)
    broken = dataclasses.replace(good, tensors=good.tensors | {"dx": good.tensors["dx"] * float("nan")})
    with pytest.raises(EngineError, match="dx"):
        check_same("small", broken, good)


def test_only_bytes_for_other_ranks_count() -> None:
    rows = torch.zeros(8, 4)  # 128 bytes
    assert bytes_leaving("send", 0, 4, ([rows], 1, 0)) == 128
    assert bytes_leaving("alltoall_base", 1, 4, (rows, rows, [], [], None)) == 96
    assert bytes_leaving("alltoall_base", 1, 4, (rows, rows, [2, 2, 2, 2], [1, 5, 2, 0], None)) == 48
    assert bytes_leaving("alltoall_base", 0, 2, (rows, rows[:0], [0, 0], [0, 0], None)) == 0
    assert bytes_leaving("alltoall", 0, 2, ([rows, rows], [rows, rows[:2]])) == 32
    assert bytes_leaving("allreduce", 0, 2, ([rows],)) == 128


def test_a_layer_of_other_experts_has_records_of_its_own() -> None:
    run = LayerBenchmark(LayerOptions(cases=("k1_even", "k2_random"), ranks=4, experts=4))
    assert [(case.name, case.num_experts) for case in run.plan.cases] == [("k1_even_of_4", 4), ("k2_random_of_4", 4)]
    usual = LayerBenchmark(LayerOptions(cases=("k1_even",), ranks=4))
    assert [(case.name, case.num_experts) for case in usual.plan.cases] == [("k1_even", 16)]
    with pytest.raises(ConfigError, match=r"bench\.ranks=3 must divide bench\.experts=16: use --experts 3"):
        LayerBenchmark(LayerOptions(ranks=3))


def test_records_are_of_samples_and_of_ratios_within_a_round() -> None:
    run = LayerBenchmark(LayerOptions(cases=("k1_even",), sides=("native", "serial"), ranks=2))
    found = Collector(SOURCE, run.metric, run.derive, run.summary)
    assert found.records() == []
    for native_ms, serial_ms in ((2000.0, 1000.0), (4000.0, 1000.0)):
        times = {"layer.k1_even.native.time": (native_ms,), "layer.k1_even.serial.time": (serial_ms,)}
        found.add(Finding(samples=times))
    found.add(Finding(samples={"layer.k1_even.serial.bytes": (96_000.0,)}))
    records = found.records()
    assert {record.name: record.value for record in records} == {
        "layer.k1_even.native.time": 3000.0,
        "layer.k1_even.serial.time": 1000.0,
        "layer.k1_even.serial.ratio": 0.375,
        "layer.k1_even.serial.bytes": 96_000.0,
    }
    assert {record.unit for record in records} == {"ms", "ratio", "bytes"} and records[0].n == 2
    table = layer_table(records)
    assert [row[:2] for row in table.rows] == [("k1_even", "native"), ("k1_even", "serial")]
    written = to_markdown(table).replace("\N{EN DASH}", "-")
    assert "| k1_even | serial | 1,000.0 | 0.38 (0.31-0.44) | 0.10 | - |" in written
