"""`plan` in a few lines: the answers of one job, and of two whose batches differ."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from ds_moe_ep.cli.main import main
from ds_moe_ep.simulate.cluster.cluster import Cluster, load_cluster
from ds_moe_ep.simulate.plan.plan import compare, make_plan
from ds_moe_ep.simulate.plan.tables import print_all
from ds_moe_ep.simulate.plan.values import plan_values

EP16, TP8_PP2, CLUSTER = "ep16", "tp8_pp2", "h100_4x4"


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return load_cluster(CLUSTER)


def test_the_answers_of_one_job_are_eight_lines(capsys: pytest.CaptureFixture[str], cluster: Cluster) -> None:
    plan = make_plan(EP16, cluster)
    assert main(["plan", "--config", EP16, "--cluster", CLUSTER]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and "fits" in lines[0] and "--verbose" in lines[-1]
    assert max(map(len, lines)) <= 80
    told = "\n".join(lines)
    for expected in (
        plan.prediction.tps.text(digits=3),
        plan.bounds[0].title,
        plan.others[0].title,
        "hidden",
        "attention: blocks of queries",
        "micro-batches of up to 5 sequences; 4 divides the batch",
    ):
        assert expected in told
    written = io.StringIO()
    print_all([plan], None, Console(file=written, width=80))
    changes = [change for other in plan.others for change in other.title.split(" and ")]
    assert changes and all(change in written.getvalue() for change in changes), "no name is cut"
    assert "\u2026" not in written.getvalue()


def test_a_comparison_warns_of_other_batches_first_and_tells_the_ratio_at_equal_ones(
    capsys: pytest.CaptureFixture[str], cluster: Cluster
) -> None:
    comparison = compare(make_plan(EP16, cluster), make_plan(TP8_PP2, cluster))
    assert comparison.same_batch is not None
    assert main(["plan", "--config", EP16, "--cluster", CLUSTER, "--compare", TP8_PP2]) == 0
    printed = capsys.readouterr().out
    assert "warning: the batches differ (1,024 and 32 sequences)" in printed.splitlines()[1]
    ratios = [quantity.text(digits=3) for quantity in (comparison.same_batch, comparison.ratio)]
    for plan in (comparison.ours, comparison.theirs):
        assert f"times with {plan.others[0].title.split(' and ')[0]}" in " ".join(printed.split())
    assert 0 < printed.index("With 1,024 in both, ") < printed.index(ratios[0]) < printed.index(ratios[1])
    assert main(["plan", "--config", EP16, "--cluster", CLUSTER, "--compare", EP16]) == 0
    assert "warning" not in capsys.readouterr().out


def test_a_plan_names_the_attention_that_runs(cluster: Cluster) -> None:
    plan = make_plan(EP16, cluster, mode="forward")
    assert plan.attention == plan_values(plan)["attention"] == "blocks"
    setup = plan.job.setup
    narrow = replace(setup, model=replace(setup.model, num_heads=64))
    on_host = replace(setup, cluster=replace(cluster, computes_on="host"))
    paths = [replace(plan, job=replace(plan.job, setup=other)).attention for other in (narrow, on_host)]
    assert paths == ["flash", "torch"]
