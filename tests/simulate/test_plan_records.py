"""Records and spans of a plan: the types of measured runs, by names that the report knows, and told apart from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_moe_ep.cli.main import main
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.records.names import KINDS, environment_title
from ds_moe_ep.records.record import Record, read_records
from ds_moe_ep.report.findings import read_findings, spans_path
from ds_moe_ep.report.known_names import environment_order, is_known, place_of
from ds_moe_ep.report.write import write_report
from ds_moe_ep.schedule.spans import accounts, read_spans, write_trace
from ds_moe_ep.simulate.cluster.cluster import load_cluster
from ds_moe_ep.simulate.plan.plan import Comparison, Plan, compare, make_plan
from ds_moe_ep.simulate.plan.records import REPEATED, comparison_records, plan_records, plan_spans
from ds_moe_ep.simulate.step.source import PredictionSource, slug, source_of

CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
EP16, TP8_PP2 = str(CONFIGS / "ep16.json"), str(CONFIGS / "tp8_pp2.json")
CLUSTER = str(CONFIGS / "clusters" / "h100_4x4.json")
BED = "simulated_h100_4x4"


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    cluster = load_cluster(CLUSTER)
    return compare(make_plan(EP16, cluster), make_plan(TP8_PP2, cluster))


@pytest.fixture(scope="module")
def source(comparison: Comparison) -> PredictionSource:
    return source_of(load_cluster(CLUSTER), CLUSTER, ["plan"])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records as the command writes them."""
    path = tmp_path_factory.mktemp("plan") / "plan.jsonl"
    trace = str(path.with_name("trace.json"))
    job = ["--config", EP16, "--cluster", CLUSTER, "--compare", TP8_PP2]
    assert main(["plan", *job, "--out", str(path), "--trace", trace]) == 0
    return path


def by_what(records: list[Record], system: str) -> dict[str, Record]:
    start = f"system.{BED}.training.{system}."
    return {record.name.removeprefix(start): record for record in records if record.name.startswith(start)}


def test_every_record_has_a_name_that_the_report_knows_and_is_called_simulated(written: Path) -> None:
    records = list(read_records(written))
    assert [record.name for record in records if not is_known(record.name)] == []
    assert len({record.name for record in records}) == len(records)
    for record in records:
        assert record.emulated
        assert record.n == 1
        assert record.hardware == "simulated: the specification's 4 nodes of 4 H100 (4 x 4 devices)"
        assert "not measured" in record.notes
        assert place_of(record.name) == "simulated h100_4x4"
    assert "not measured" in environment_title(BED)
    assert environment_order("traffic130") < environment_order(BED) < environment_order(f"{BED}_8_nodes")


def test_records_hold_the_numbers_of_the_plan(comparison: Comparison, source: PredictionSource) -> None:
    records = list(comparison_records(comparison, source))
    ours, plan = by_what(records, "ep16"), comparison.ours
    assert ours["tps"].value == plan.prediction.tps.value
    assert ours["tps"].spread == (plan.prediction.tps.low, plan.prediction.tps.high)
    assert ours["step"].value == pytest.approx(plan.prediction.step.step_us / 1e3)
    broken = [record.value for what, record in ours.items() if what.startswith("breakdown.")]
    assert sum(broken) == pytest.approx(ours["step"].value)
    assert ours["ratio_to_tp8_pp2"].value == comparison.ratio.value
    assert ours["ratio_to_tp8_pp2"].value * by_what(records, "tp8_pp2")["ratio_to_ep16"].value == pytest.approx(1)
    serial = by_what(records, "ep16_serial")
    assert serial["hidden"].value < ours["hidden"].value
    assert serial["tps"].value * ours["ratio_to_ep16_serial"].value == pytest.approx(ours["tps"].value)
    for kind in KINDS:
        assert ours[f"memory.{kind}"].value == getattr(plan.fit.memory, kind)


def test_a_plan_of_forward_passes_has_no_memory_of_training(source: PredictionSource) -> None:
    plan = make_plan(EP16, load_cluster(CLUSTER), mode="forward")
    names = [record.name for record in plan_records(plan, source)]
    assert names
    assert all(".forward." in name and ".memory." not in name for name in names)


def test_two_jobs_of_one_name_cannot_share_a_file(comparison: Comparison, source: PredictionSource) -> None:
    with pytest.raises(ConfigError, match="both jobs are EP16 overlapped"):
        list(comparison_records(compare(comparison.ours, comparison.ours), source))


def test_other_nodes_are_another_bed(comparison: Comparison) -> None:
    assert source_of(load_cluster(CLUSTER), CLUSTER, ["typed"], 8).environment == "simulated_h100_4x4_8_nodes"
    assert [slug(text) for text in ("My Cluster-2.v3", "...", "a")] == ["my_cluster_2_v3", "cluster", "a"]


def test_spans_account_for_what_the_plan_says_is_hidden(comparison: Comparison, written: Path) -> None:
    """The spans are of one micro-batch: their exposed traffic is the step's over its micro-batches."""
    plan: Plan = comparison.ours
    spans = list(read_spans(spans_path(written)))
    assert spans == plan_spans(plan)
    rows = [span for span in spans if span.tags.layer.startswith("ep16/") and span.tags.phase]
    told = accounts(rows)
    total = next(overlap for tags, overlap in told.items() if (tags.layer, tags.phase, tags.peers) == ("", "", ""))
    times = plan.job.setup.training.accumulation
    assert times * total.total_us == pytest.approx(plan.prediction.step.traffic_us, rel=1e-6)
    assert times * total.exposed_us == pytest.approx(plan.prediction.step.exposed_us, rel=1e-6)


def test_a_pass_that_is_repeated_is_no_part_of_the_forward_pass(comparison: Comparison) -> None:
    spans = [span for span in plan_spans(comparison.ours) if span.tags.layer == "ep16/layers.0"]
    forward, repeated, backward = (
        [span for span in spans if span.tags.phase == phase] for phase in ("forward", REPEATED, "backward")
    )
    assert [span.name for span in forward] == [span.name for span in repeated]
    assert max(span.stop_us for span in forward) < min(span.start_us for span in repeated)
    assert max(span.stop_us for span in repeated) <= min(span.start_us for span in backward)
    assert {span.name.split()[0] for span in backward} == {"dispatch", "compute", "combine", "weights"}


def test_a_trace_is_a_process_a_rank_with_every_lane(comparison: Comparison, written: Path, tmp_path: Path) -> None:
    events = json.loads(written.with_name("trace.json").read_text(encoding="utf-8"))["traceEvents"]
    lanes = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"compute", "dispatch", "combine"} <= lanes
    write_trace(tmp_path / "pipeline.json", comparison.theirs.prediction.step.spans)
    events = json.loads((tmp_path / "pipeline.json").read_text(encoding="utf-8"))["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}  # a stage stands for its tensor group


def test_the_report_shows_what_was_simulated_and_calls_it_so(written: Path, tmp_path: Path) -> None:
    files = write_report([written], tmp_path)
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "layer `layers.0`" in page
    assert {"throughput.png", "latency.png", "memory.png", "timeline.png"} <= {path.name for path in files}
    assert "simulated on h100_4x4, not measured" in page
    assert "TP8/PP2 \u2192 EP16 serial" in page
    findings = read_findings([written])
    assert findings.environments == (BED,)
    assert findings.num_others == 0
    assert findings.num_replaced == 0
