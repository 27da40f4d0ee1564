"""From a ds_config and a cluster to the job that is simulated, with notes where it is not as its file has it."""

from __future__ import annotations

import json

import pytest

from ds_moe_ep.simulate.cluster.cluster import Cluster, load_cluster
from ds_moe_ep.simulate.job.job import read_job
from tests.policy.sources import ROOT

EP16 = ROOT / "ds_configs" / "ep16.json"


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return load_cluster(ROOT / "ds_configs" / "clusters" / "h100_4x4.json")


def test_more_nodes_keep_the_batch_and_accumulate_less(cluster: Cluster) -> None:
    job = read_job(EP16, cluster.with_nodes(8))
    assert (job.setup.training.batch, job.setup.training.accumulation) == (1024, 32)
    assert job.notes == ("gradient_accumulation_steps is 32, not 64: the batch stays 1,024 sequences",)
    assert read_job(EP16, cluster).notes == ()


def test_what_is_not_simulated_is_said(cluster: Cluster) -> None:
    ds_config = json.loads(EP16.read_text(encoding="utf-8")) | {"use_data_before_expert_parallelism": True}
    ds_config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    offload, order = read_job(ds_config, cluster.with_nodes(8)).notes[1:]
    assert "without the host" in offload and "consecutive ranks" in order
    assert len(read_job(ds_config, cluster).notes) == 1, "one group of experts has no order"
    ds_config["moe_ep"]["capacity_factor"] = 1.25
    assert "drops nothing here" in read_job(ds_config, cluster).notes[-1]
