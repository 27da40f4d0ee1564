"""The systems benchmark: its arithmetic and records, eight real engines that agree, and emulated devices."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from ds_moe_ep.bench.candidates.even import even_embedding, even_gate, even_windows
from ds_moe_ep.bench.harness.collector import Collector
from ds_moe_ep.bench.harness.processes import Finding, arriving, free_port, started_ranks
from ds_moe_ep.bench.systems import command as systems
from ds_moe_ep.bench.systems.findings import derive, metric, summary_tables
from ds_moe_ep.bench.systems.plan import (
    BURST_BYTES,
    EMULATED_MODEL,
    EXPERT_SHARE,
    OVERLAPPED,
    SEEN,
    Cut,
    SystemsPlan,
    link_mbit,
)
from ds_moe_ep.bench.systems.ranks import run_systems_rank
from ds_moe_ep.bench.testbed import Environment
from ds_moe_ep.config.knobs import Layout, MoEConfig
from ds_moe_ep.records.names import PARTS, SYSTEMS
from ds_moe_ep.records.provenance import Provenance
from ds_moe_ep.records.record import Record
from ds_moe_ep.report.known_names import is_known
from ds_moe_ep.schedule.shaping import HEADERS
from tests.ranks import PRELOAD, _fork_server

SOURCE = Provenance(command="python -m bench", commit="abc", hardware="2 cores")
EMULATED = SystemsPlan(
    device="emulated", model=EMULATED_MODEL, num_sequences=128, environments=(Environment("traffic30", 80.0),)
)
SMALL_WORLD = SystemsPlan(
    environments=(Environment("loopback", None),),
    model=replace(EMULATED_MODEL, num_layers=2, sequence_length=32),
    ep_size=4,
    cuts={
        "tp8_pp2": Cut(layout=Layout(tp_size=2, pp_size=2)),
        "pp2_ep8": Cut(layout=Layout(pp_size=2), ep_size=2),
        "tp2_ep8": Cut(layout=Layout(tp_size=2), ep_size=2),
        "tp2_pp2_ep4": Cut(layout=Layout(tp_size=2, pp_size=2), ep_size=2),
    },
    num_sequences=16,
    rounds=2,
    warm_ups=1,
    num_nodes=1,
    ranks_per_node=4,
)


def test_the_link_follows_from_the_ratio_of_traffic_to_compute() -> None:
    # 1,024 tokens of 256 bytes per rank, 4 ranks per node, 3 of 4 rows leave it; 16 exchanges in 8 s of compute.
    exchange_bytes = 4 * 1024 * 256 * 3 / 4 * HEADERS - BURST_BYTES
    seconds = 16 * exchange_bytes * SEEN * 8 / (link_mbit(EMULATED, 0.3) * 1e6)
    assert seconds == pytest.approx(0.3 * 8.0)


def test_an_emulated_device_computes_what_the_plan_says() -> None:
    tokens_of_rank, forward = 1024, 8.0 / 3
    assert 1e-6 * EMULATED.token_us * tokens_of_rank * 4 == pytest.approx(forward)


def test_all_systems_train_the_same_batch_and_only_stages_cut_it() -> None:
    configs = {name: EMULATED.ds_config(name) for name in SYSTEMS}
    assert {config["train_batch_size"] for config in configs.values()} == {128}
    assert configs["tp8_pp2"]["train_micro_batch_size_per_gpu"] == 32
    assert configs["tp8_pp2"]["gradient_accumulation_steps"] == 4
    assert configs["ep16"]["train_micro_batch_size_per_gpu"] == 8
    assert configs["pp2_ep8"]["train_micro_batch_size_per_gpu"] == 128 // 8 // 4
    assert configs["tp2_ep8"]["train_micro_batch_size_per_gpu"] == 128 // 8, "no stage, no micro-batches"
    assert len({str(config["optimizer"]) for config in configs.values()}) == 1


def test_even_tokens_reach_every_expert_equally_often_through_a_real_router() -> None:
    from ds_moe_ep.moe.router import Router

    gate = Router(64, MoEConfig(num_experts=16))
    with torch.no_grad():
        gate.wg.weight.copy_(even_gate(16, 64))
    ids_BS = even_windows(3, 128, 256, seed=0)[:, :-1]
    x_TD = torch.nn.functional.layer_norm(even_embedding(256, 16, 64)[ids_BS.flatten()], (64,))
    chosen = gate(x_TD).expert_ids_TK.flatten()
    assert torch.equal(chosen, ids_BS.flatten() % 16)
    assert torch.bincount(chosen, minlength=16).tolist() == [24] * 16
    gate.wg.weight.data.copy_(torch.randn(16, 64, generator=torch.Generator().manual_seed(0)))
    assert torch.bincount(gate(x_TD).expert_ids_TK.flatten(), minlength=16).tolist() != [24] * 16


def test_experts_have_their_share_of_the_specifications_arithmetic() -> None:
    D, F, S = 8192, 32768, 10_000  # products of an expert over those of attention's projections and scores, and them
    assert pytest.approx(4 * D * F / (4 * D * F + 8 * D * D + 2 * S * D), rel=1e-3) == EXPERT_SHARE


def records_of_rounds() -> dict[str, Record]:
    found = Collector(SOURCE, partial(metric, EMULATED), partial(derive, EMULATED))
    steps_s = {"tp8_pp2": (30.0, 33.0), "ep16": (10.0, 11.0), "ep16_serial": (12.0, 11.0)}
    for index in range(2):
        steps = {f"system.traffic30.training.{name}.step": (1e3 * s[index],) for name, s in steps_s.items()}
        found.add(Finding(samples=steps | {"system.traffic30.traffic.ratio": (0.3,)}))
    return {record.name: record for record in found.records()}


def test_records_compare_systems_within_a_round() -> None:
    records, of = records_of_rounds(), "system.traffic30.training"
    assert records[f"{of}.ep16.ratio_to_tp8_pp2"].value == pytest.approx(3.0)
    assert records[f"{of}.ep16.ratio_to_ep16_serial"].value == pytest.approx((1.2 + 1.0) / 2)
    assert records[f"{of}.tp8_pp2.ratio_to_ep16"].value == pytest.approx(1 / 3)
    assert f"{of}.ep16.ratio_to_native_ep16" not in records, "it did not run"
    assert records["system.traffic30.traffic.compute"].value == 8000
    assert records["system.traffic30.traffic.link"].value == 80
    assert all(record.emulated for record in records.values())


def test_the_table_has_a_row_per_system_and_every_ratio() -> None:
    (table,) = summary_tables(records_of_rounds().values())
    assert len(table.rows) == 3
    assert "links on which EP16's traffic takes 0.3" in table.title


def run_small_world(plan: SystemsPlan) -> list[Finding]:
    plan = replace(plan, port=free_port())
    _fork_server()  # the tests' own: ranks need not import by themselves
    with started_ranks(run_systems_rank, plan, plan.num_ranks, PRELOAD) as (processes, inbox):
        return list(arriving(processes, inbox))


@pytest.mark.slow
def test_eight_engines_in_one_world_train_alike_and_account_for_their_time() -> None:
    findings = run_small_world(SMALL_WORLD)
    values = {name: values[-1] for finding in findings for name, values in finding.samples.items()}
    of = "system.loopback.training"
    losses = {name: values[f"{of}.{name}.loss.step0003"] for name in SYSTEMS}
    first = {name: values[f"{of}.{name}.loss.step0001"] for name in SYSTEMS}
    # The same weights, tokens and mathematics: up to the rounding of sums, the balance loss' scope and a z-loss.
    for name in ("ep16_serial", "native_ep16", *SMALL_WORLD.cuts):
        assert first[name] == pytest.approx(first["ep16"], abs=1e-4), name
        assert losses[name] == pytest.approx(losses["ep16"], abs=2e-2), name
    assert losses["autoep_ep16"] == pytest.approx(losses["ep16"], abs=0.5), "SwiGLU experts, no auxiliary loss"
    assert all(losses[name] < first[name] - 0.3 for name in SYSTEMS), "they learn"
    last = next(f.samples for f in reversed(findings) if f.samples)
    tokens = SMALL_WORLD.tokens_of_step
    for name in SYSTEMS:
        parts_ms = sum(last[f"{of}.{name}.breakdown.{part}"][0] for part in PARTS)
        (step_ms,), (tps,), (tpot_us,) = (last[f"{of}.{name}.{what}"] for what in ("step", "tps", "tpot"))
        assert parts_ms == pytest.approx(last[f"{of}.{name}.mean_step"][0], rel=1e-6)
        assert tps == pytest.approx(1e3 * tokens / step_ms) and tpot_us == pytest.approx(1e3 * step_ms / tokens)
    assert values[f"{of}.tp8_pp2.breakdown.tensor_traffic"] > 0
    assert values[f"{of}.tp8_pp2.breakdown.pipeline"] > 0
    for name in ("ep16", "pp2_ep8"):
        assert values[f"{of}.{name}.breakdown.tensor_traffic"] == 0, "the control: it has no tensor group"
    assert values[f"{of}.tp2_ep8.breakdown.tensor_traffic"] > 0 and values[f"{of}.pp2_ep8.breakdown.pipeline"] > 0
    assert all(0 <= values[f"{of}.{name}.hidden"] <= 100 for name in OVERLAPPED), "each records its experts' rows"
    assert values[f"{of}.native_ep16.breakdown.experts_traffic"] > 0
    assert values[f"{of}.ep16_serial.hidden"] == pytest.approx(0, abs=1) and f"{of}.native_ep16.hidden" not in values
    assert [f.text for f in findings if f.kind == "span" and "ep16/" in f.text], "a timeline of one layer"
    for name in SYSTEMS:
        rows = [value for key, value in values.items() if key.startswith(f"{of}.{name}.load.step0001.layer0")]
        assert sum(rows) == tokens, name
    assert {name for name in values if metric(SMALL_WORLD, name) and not is_known(name)} == set()


@pytest.mark.slow
def test_emulated_devices_are_as_busy_as_the_plan_says_in_every_system() -> None:
    plan = replace(
        SMALL_WORLD,
        systems=("ep16_serial", "ep16", "native_ep16", "tp8_pp2", "tp2_pp2_ep4"),  # AutoEP's needs an expert per rank
        modes=("training",),
        device="emulated",
        schedule="peers",
        step_compute_s=0.3,
        rounds=1,
    )
    findings = run_small_world(plan)
    (samples,) = (f.samples for f in findings if f.samples)
    of = "system.loopback.training"
    for name in plan.systems:
        (busy_percent,), (compute_ms,) = (samples[f"{of}.{name}.{what}"] for what in ("busy", "breakdown.compute"))
        assert compute_ms == pytest.approx(300, rel=1e-3)
        assert 0 < busy_percent <= 100
    assert samples[f"{of}.tp8_pp2.step"][0] > 300 * 5 / 4, "the bubble of 4 micro-batches in 2 stages"
    assert "system.loopback.traffic.ratio" in samples and not [name for name in samples if "loss" in name]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--systems", "ep17"], "--systems=ep17: did you mean 'ep16'"),
        (["--warm-ups", "0"], "--warm-ups=0"),
        (["--device", "emulated", "--traffic", "many"], "bench.traffic='many'"),
        (["--sequences", "65"], "bench.sequences=65"),
        (["--device", "emulated", "--memory"], "bench.memory with device='emulated'"),
    ],
)
def test_what_cannot_be_compared_is_refused_by_name(
    words: list[str], problem: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert systems.main([*words, "--out", str(tmp_path / "x.jsonl")]) == 2
    assert problem in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [], "nothing was written"
