"""Jobs whose ranks share sequences (AutoTP, an mpu, Ulysses): bytes by hand, and layouts that are simulated apart."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from ds_moe_ep.check.config import Budget, check_config
from ds_moe_ep.cli.main import main
from ds_moe_ep.config.knobs import Layout, ModelConfig
from ds_moe_ep.config.parallel_keys import MEGATRONS, USUAL, DenseCut
from ds_moe_ep.config.section import load_ds_config
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.names import title_of
from ds_moe_ep.schedule.build import forward_schedule
from ds_moe_ep.simulate.cluster.cluster import Cluster, Device, load_cluster
from ds_moe_ep.simulate.job.fit import fit_memory
from ds_moe_ep.simulate.job.job import read_job
from ds_moe_ep.simulate.layouts.search import search_layouts
from ds_moe_ep.simulate.layouts.tables import print_search
from ds_moe_ep.simulate.plan.plan import make_plan
from ds_moe_ep.simulate.step.ep_step import EpJob, ep_step
from ds_moe_ep.simulate.step.predict import simulate_step
from ds_moe_ep.simulate.step.setup import Setup, Step
from ds_moe_ep.simulate.step.shares import Collectives, early_shares
from tests.simulate.jobs_for_tests import FREE, MODEL, cluster, setup, slow_link

H100 = load_cluster("h100_4x4")
FAST = Device(memory_bytes=80e9, peak_fp16=math.inf, peak_bf16=math.inf, peak_fp32=math.inf)
T, D, L, B = 2 * MODEL.sequence_length, MODEL.hidden_size, MODEL.num_layers, 2  # tokens of a group, fp16


def cut(size: int, patterns: Any = USUAL, source: Any = "") -> DenseCut:
    return DenseCut(size=size, patterns=patterns, source=source)


def sharing(job: Setup, **training: Any) -> Setup:
    """The job with ranks that share sequences."""
    return replace(job, training=replace(job.training, **training))


def on_one_node(ranks: int = 4, **knobs: Any) -> Setup:
    """A job whose time is bytes inside of a node over 10 bytes per microsecond, all rings."""
    knobs = {"schedule": "serial", **knobs}
    on = cluster(1, ranks, device=FAST, near=slow_link(10.0))
    return replace(setup(on, **knobs), algorithm="ring")


# bytes by hand


def test_an_attention_that_autotp_cuts_and_tokens_that_its_ranks_share_cost_their_bytes() -> None:
    """Per layer: an all-reduce of u forward and one backward, a gather of u forward, and of u and weights backward."""
    step = ep_step(sharing(on_one_node(), dense_cut=cut(2)))
    u = T * D * B
    all_reduces, gathers = 2 * (2 * u / 2), u / 2 + (4 * T + u) / 2
    assert step.parts_us["tensor_traffic"] == pytest.approx(L * (all_reduces + gathers) / 10)
    one_fewer = sharing(on_one_node(), dense_cut=cut(2, patterns=()))
    without = ep_step(one_fewer).parts_us["tensor_traffic"]
    assert without == pytest.approx(L * gathers / 10), "the control: no width is cut, and no all-reduce is made"


def test_a_rank_of_a_tensor_group_sends_its_part_of_the_rows() -> None:
    whole, shared = on_one_node(), sharing(on_one_node(), dense_cut=cut(2))
    assert EpJob(shared).tokens == T // 2 == EpJob(whole).tokens // 2
    assert ep_step(shared).traffic_us == pytest.approx(ep_step(whole).traffic_us / 2)


def test_what_an_mpu_cuts_beside_the_attention_costs_its_all_reduces() -> None:
    """Shared expert: u both ways, per layer. Embedding and head: u each; the loss: three numbers per token in fp32."""
    model = replace(MODEL, shared_expert_width=64)
    by_mpu, by_autotp = (
        ep_step(sharing(replace(on_one_node(), model=model), dense_cut=cut(2, patterns, source)))
        for patterns, source in ((MEGATRONS, "mpu"), (USUAL, ""))
    )
    u = T * D * B
    more = L * 2 * u + 2 * u + 3 * 4 * T  # rings of two ranks pass as many bytes as there are
    found = by_mpu.parts_us["tensor_traffic"] - by_autotp.parts_us["tensor_traffic"]
    assert found == pytest.approx(more / 10)


def test_a_head_that_autotp_cuts_gathers_its_logits() -> None:
    patterns = (*USUAL, (r"head\.weight$", "column"))
    found, without = (
        ep_step(sharing(on_one_node(), dense_cut=cut(2, each, "partition_config"))) for each in (patterns, USUAL)
    )
    more = T * MODEL.vocab_size * B / 2 + T * D * B  # logits forward, the gradient of the tokens backward
    assert found.parts_us["tensor_traffic"] - without.parts_us["tensor_traffic"] == pytest.approx(more / 10)


@pytest.mark.parametrize(("sequences", "nodes"), [(2, 1), (4, 1), (4, 2)])
def test_sequence_ranks_exchange_heads_over_the_links_that_they_use(sequences: int, nodes: int) -> None:
    """Four all-to-alls forward and four backward, of a rank's own tokens: near and far peers' parts at once."""
    node = 4 // nodes
    on = cluster(nodes, node, device=FAST, near=slow_link(10.0), far=slow_link(10.0, shared_by=node))
    job = sharing(setup(on, schedule="serial"), sequence_ranks=sequences)
    own = T // sequences * D * B
    near, far = own * (node - 1) / sequences, own * (sequences - node) / sequences
    each_us = max((own / 2 if nodes == 1 and sequences == 2 else near) / 10, far / (10 / node))
    step = ep_step(job)
    assert step.parts_us["sequence_traffic"] == pytest.approx(L * 8 * each_us)
    assert "tensor_traffic" not in step.parts_us and "sequence_traffic" not in ep_step(setup(on)).parts_us


def test_sequence_ranks_compute_no_more_and_no_less_than_the_group_without_them() -> None:
    on = replace(H100, num_nodes=1)
    whole = setup(on, replace(MODEL, hidden_size=4096, num_heads=8, sequence_length=1024))  # attention by blocks
    shared = sharing(whole, sequence_ranks=2, micro_batch=2 * whole.training.micro_batch)
    found, expected = (EpJob(each).costs.attention(each.micro_batch_tokens) for each in (shared, whole))
    assert whole.micro_batch_tokens == shared.micro_batch_tokens
    assert found == pytest.approx(expected, rel=0.05)
    alone = replace(shared, training=replace(shared.training, sequence_ranks=1))
    assert EpJob(alone).costs.attention(alone.micro_batch_tokens) > 1.5 * expected, "the control: nobody shares"


# the gather beside the combines


def test_a_part_of_the_tokens_is_complete_before_the_last_combine() -> None:
    """With S equal pieces (1 - 1/S)^k of them: the figures of docs/layouts.md for S = 4."""
    job = on_one_node(ranks=16, schedule="chunks", chunks=4, num_experts=16, row_cuts=1)
    schedule = forward_schedule(job.moe, EpJob(job).torus)
    for top_k, percent in ((1, 75), (2, 56), (8, 10)):
        found = early_shares(schedule, top_k)
        assert sum(found) == pytest.approx(1) and round(100 * sum(found[:-1])) == percent
    serial = forward_schedule(replace(job.moe, schedule="serial"), EpJob(job).torus)
    assert early_shares(serial, 1) == (1.0,), "the control: one piece, and nothing comes early"


def gathers_of(job: Setup) -> Step:
    return ep_step(sharing(replace(job, mode="forward"), dense_cut=cut(2, patterns=())))


def test_results_are_gathered_under_the_experts_that_are_left() -> None:
    """Near bytes are the gathers' alone here: of slow experts all but the last piece's tokens are hidden."""
    on = cluster(4, 2, near=slow_link(100.0), far=FREE)
    pieces, serial = (gathers_of(setup(on, schedule=s, chunks=4 if s == "chunks" else 2)) for s in ("chunks", "serial"))
    blocking_us = L * T * D * B / 2 / 100
    assert serial.parts_us["tensor_traffic"] >= blocking_us * (1 - 1e-9)
    early = sum(early_shares(EpJob(pieces.setup).layer.schedules[0], 1)[:-1])
    assert pieces.parts_us["tensor_traffic"] <= blocking_us * (1 - early) * 1.05
    apart = gathers_of(setup(on, schedule="chunks", chunks=4, ep_size=1, num_experts=8))
    assert apart.parts_us["tensor_traffic"] == pytest.approx(blocking_us), "groups apart: behind the pass"


def test_gradients_of_tokens_are_gathered_under_the_weight_gradients() -> None:
    """Near bytes are the gathers' alone: those behind the last combine, too, are hidden; weights' gradients are not."""
    on = cluster(4, 2, near=slow_link(100.0), far=FREE)
    job = sharing(setup(on, schedule="chunks", chunks=4), dense_cut=cut(2, patterns=()))
    both, forward = (ep_step(replace(job, mode=mode)).parts_us["tensor_traffic"] for mode in ("training", "forward"))
    weights_us = L * 4 * T / 2 / 100
    told_us = L * 2 * 8 * (T // 2 + 4) / 2 / 100  # of the way back, with those of the results
    assert both - forward <= weights_us + told_us * 1.05
    apart = sharing(setup(on, schedule="serial"), dense_cut=cut(2, patterns=()))
    both, forward = (ep_step(replace(apart, mode=mode)).parts_us["tensor_traffic"] for mode in ("training", "forward"))
    assert both - forward == pytest.approx(weights_us + L * T * D * B / 2 / 100), "the control: behind the pass"


def test_gathers_share_their_link_with_the_rows_beside_them() -> None:
    """Both inside of one node: together they take no less than all bytes over the link."""
    job = sharing(replace(on_one_node(schedule="chunks", chunks=2), mode="forward"), dense_cut=cut(2))
    rows = 2 * (T // 2) * D * B * 3 / 4  # there and back
    assert ep_step(job).step_us * 10 >= L * (rows + T * D * B / 2 + T * D * B)
    free = replace(job.cluster, near=FREE)
    assert ep_step(replace(job, cluster=free)).step_us == 0.0, "the control"


# against the layouts, which another program simulates


def both_ways(schedule: str, model: ModelConfig | None = None) -> tuple[Step, Step]:
    """TP2/EP8 by AutoTP in a plain engine, and by the layout in DeepSpeed's pipeline engine, of one batch."""
    whole = read_job("ep8", replace(H100, num_nodes=4)).setup
    moe = replace(whole.moe, schedule=schedule)
    whole = replace(whole, moe=moe, model=model or whole.model)
    training = replace(whole.training, zero_stage=1, micro_batch=2, accumulation=8)
    shared = replace(training, dense_cut=cut(2))
    return (
        simulate_step(replace(whole, training=shared)),
        simulate_step(replace(whole, training=replace(training, layout=Layout(tp_size=2)))),
    )


@pytest.mark.parametrize("schedule", ["serial", "peers"])
def test_autotp_takes_as_long_as_the_layout_of_its_sizes(schedule: str) -> None:
    by_autotp, by_layout = both_ways(schedule)
    assert by_autotp.setup.training.batch == by_layout.setup.training.batch
    assert by_autotp.step_us == pytest.approx(by_layout.step_us, rel=1e-6)
    for part in ("tensor_traffic", "experts_traffic"):
        assert by_autotp.parts_us[part] == pytest.approx(by_layout.parts_us[part], rel=1e-6)
    alone = simulate_step(replace(by_autotp.setup, training=replace(by_autotp.setup.training, dense_cut=DenseCut())))
    assert abs(alone.tps / by_autotp.tps - 1) > 0.01, "the control: another job"


def test_an_mpu_is_autotp_but_for_what_it_cuts_beside_the_attention() -> None:
    keys = {**load_ds_config("ep8"), "tensor_parallel": {"autotp_size": 2}}
    by_autotp = read_job(keys, H100).setup
    by_mpu = read_job("ep8", H100, tensor_ranks=2).setup
    assert by_mpu.training.dense_cut.source == "mpu" and by_mpu.training.batch == by_autotp.training.batch * 2

    def layer_us(job: Setup) -> dict[str, float]:
        same = replace(job, training=replace(job.training, micro_batch=4, accumulation=1))
        spans = [span for span in ep_step(same).spans if span.tags.layer == "layers.1"]
        return {f"{span.name}, {span.tags.phase}": span.stop_us - span.start_us for span in spans}

    assert layer_us(by_mpu) == pytest.approx(layer_us(by_autotp), rel=1e-6)
    assert layer_us(by_mpu) != pytest.approx(layer_us(read_job("ep8", H100).setup), rel=1e-6), "the control"


# the commands


@pytest.mark.parametrize(
    ("keys", "tensor_ranks"),
    [({"tensor_parallel": {"autotp_size": 2}}, 1), ({"sequence_parallel_size": 2}, 1), ({}, 2)],
)
def test_plan_and_check_config_size_a_rank_alike(keys: dict[str, Any], tensor_ranks: int) -> None:
    values = {**load_ds_config("ep8"), **keys, "gradient_accumulation_steps": None}
    job = read_job(values, H100, tensor_ranks=tensor_ranks)
    check = check_config(values, 16, Budget(), tensor_ranks)
    assert check.details is not None and fit_memory(job.setup).memory == check.details.memory
    assert any("share each copy's sequences" in note or "2 tensor ranks" in note for note in job.notes)


CUT = {"layer_specs": [{"patterns": [r".*attention\.qkv\.weight$"], "partition_type": "column"}]}
EXPERTS = {"layer_specs": [{"patterns": [r".*deepspeed_experts.*"], "partition_type": "column"}]}
EMBEDDING = {"layer_specs": [{"patterns": ["embedding.weight"], "partition_type": "column"}]}


@pytest.mark.parametrize(
    ("changes", "tensor_ranks", "words"),
    [
        ({"sequence_parallel_size": 2, "data_parallel_size": 8}, 1, "parallel_state_sp"),
        ({"sequence_parallel_size": 2}, 2, "no mpu of DeepSpeed's has both"),
        ({"tensor_parallel": {"autotp_size": 2}}, 2, "an mpu or AutoTP cuts the dense part"),
        ({"tensor_parallel": {"autotp_size": 2, "partition_config": CUT}}, 1, "some matrices of attention"),
        ({"tensor_parallel": {"autotp_size": 2, "partition_config": EXPERTS}}, 1, "an expert is whole on its rank"),
        ({"tensor_parallel": {"autotp_size": 2, "partition_config": EMBEDDING}}, 1, "cuts the embedding"),
        ({"tensor_parallel": {"autotp_size": 3}}, 1, "does not divide the world"),
        ({"moe_ep": {"layout": {"tp_size": 2}}}, 2, "a layout has tensor ranks of its own"),
        ({"moe_ep": {"sequence_parallel": True}}, 2, "tokens that come cut are not simulated"),
        ({"moe_ep": {"model": {"name": "specification", "num_heads": 1}}}, 2, "num_heads=1, and unequal parts"),
        (
            {"sequence_parallel_size": 2, "moe_ep": {"model": {"name": "specification", "num_heads": 1}}},
            1,
            "heads shared unequally are not simulated",
        ),
    ],
)
def test_what_is_not_simulated_is_refused_by_name(changes: dict[str, Any], tensor_ranks: int, words: str) -> None:
    values = load_ds_config("ep8")
    values = {**values, **changes, "moe_ep": {**values["moe_ep"], **changes.get("moe_ep", {})}}
    with pytest.raises(ConfigError, match=words):
        read_job(values, H100, tensor_ranks=tensor_ranks)


def small_bed() -> Cluster:
    return replace(H100, num_nodes=2, node_size=2)


def test_a_search_keeps_the_ranks_that_share_sequences() -> None:
    found = search_layouts(read_job("ep4_cpu", small_bed(), tensor_ranks=2), most=3)
    assert {each.system for each in found.found} == {"tp2_ep1", "tp2_ep2", "tp2_ep4"}
    batches = {each.training.batch for each in found.found}
    assert batches == {found.job.setup.training.batch}
    printed = Console(record=True, width=80, file=io.StringIO())
    print_search(found, printed)
    assert "TP2/EP4" in printed.export_text()
    assert title_of("sp2_ep4") == "SP2/EP4"


def test_the_command_tells_a_job_of_tensor_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--config", "ep8", "--cluster", "h100_4x4", "--tensor-ranks", "2", "--forward"]
    assert main([*words, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert min(values["parts"]["tensor_traffic_ms"]) > 0
    assert main([*words, "--sweep", "ep=1,2"]) != 0
    assert "2 ranks share each copy's sequences" in " ".join(capsys.readouterr().err.split())


def test_a_plan_of_sequence_ranks_tells_their_part() -> None:
    plan = make_plan({**load_ds_config("ep8_cpu"), "sequence_parallel_size": 2}, replace(H100, num_nodes=2))
    assert plan.system.startswith("sp2_ep8") and plan.title.startswith("SP2/EP8")
    part = next(quantity for quantity in plan.quantities if quantity.name == "breakdown.sequence_traffic")
    assert part.title == "sequence-parallel all-to-all" and part.value > 0


def test_unequal_loads_beside_tensor_ranks_simulate_each_rank() -> None:
    on = cluster(2, 4, near=slow_link(50.0), far=slow_link(40.0, shared_by=4))
    even, one = (
        ep_step(sharing(setup(on, loads=loads, schedule="peers"), dense_cut=cut(2))) for loads in ((1.0,) * 8, ())
    )
    assert even.step_us == pytest.approx(one.step_us, rel=1e-6)
    skewed = ep_step(sharing(setup(on, loads=(2.5,) + (5.5 / 7,) * 7, schedule="peers"), dense_cut=cut(2)))
    assert skewed.step_us > 1.05 * one.step_us
    assert isinstance(EpJob(skewed.setup).collectives, Collectives)
