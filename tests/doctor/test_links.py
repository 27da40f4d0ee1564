"""Verdicts on links, from made-up measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from ds_moe_ep.comm.launcher import launched
from ds_moe_ep.doctor.links.outcome import LinksOutcome, Presence, TriedLink, outcome_from
from ds_moe_ep.doctor.links.verdicts import judge_links, pairs_to_try, reaches
from ds_moe_ep.doctor.verdicts import worst
from ds_moe_ep.errors import EngineError
from tests.doctor.machines import named

WORLD = (tuple(range(8)),)
HOSTS = {rank: f"node{rank // 4}" for rank in range(8)}
NEAR, FAR = (10.0, 200.0), (5.0, 20.0)  # us, GB/s


def outcome(
    hosts: Mapping[int, str] = HOSTS,
    odd: Mapping[tuple[int, int], tuple[float, float]] | None = None,
    near: tuple[float, float] = NEAR,
    far: tuple[float, float] = FAR,
) -> LinksOutcome:
    """Eight ranks on two hosts, all well; `odd` changes single links."""
    classes = reaches(WORLD, 4, hosts)
    values = {pair: near if reach == "near" else far for pair, reach in classes.items()}
    links = tuple(TriedLink(*pair, *value) for pair, value in {**values, **(odd or {})}.items())
    up = {rank: Presence(host=host, has_gpu=True, versions={"torch": "2.13.0"}) for rank, host in hosts.items()}
    return LinksOutcome(backend="nccl", world_size=8, up=up, links=links)


@pytest.mark.parametrize("node_size", [0, 4])
def test_links_as_the_topology_says_are_well(node_size: int) -> None:
    verdicts = judge_links(outcome(), WORLD, node_size)
    assert worst(verdicts) == "ok"
    assert named(verdicts, "near links").found.startswith("12 pairs: 10 us for a byte, 200 GB/s")
    assert named(verdicts, "far links").found.startswith("16 pairs: 5 us for a byte, 20.0 GB/s")
    assert "10.0 times the rate" in named(verdicts, "topology").found


def test_near_links_that_are_slower_than_far_ones_are_a_warning() -> None:
    verdict = named(judge_links(outcome(near=FAR, far=NEAR), WORLD, 4), "topology")
    assert (verdict.status, "NVLink" in verdict.fix) == ("warning", True)


def test_links_that_are_alike_are_a_note() -> None:
    assert named(judge_links(outcome(near=FAR), WORLD, 4), "topology").status == "note"


@pytest.mark.parametrize("slow", [(5.0, 5.0), (50.0, 20.0)])
def test_a_pair_that_is_much_slower_than_its_class_is_named(slow: tuple[float, float]) -> None:
    verdict = named(judge_links(outcome(odd={(1, 6): slow}), WORLD, 4), "far links")
    assert verdict.status == "warning"
    assert "ranks 1-6" in verdict.found
    assert named(judge_links(outcome(odd={(1, 6): (6.0, 12.0)}), WORLD, 4), "far links").status == "ok"


def test_a_rank_whose_links_are_all_slow_is_named() -> None:
    slow = {(rank, 6): (5.0, 1.0) for rank in range(4)}
    verdict = named(judge_links(outcome(odd=slow), WORLD, 4), "far links")
    assert verdict.fix.startswith("look at rank 6's host")


def test_ranks_that_share_a_host_and_its_cores_get_no_verdict_on_a_pair_and_are_told_so_once() -> None:
    shared = replace(outcome(dict.fromkeys(range(8), "node0"), odd={(1, 6): (500.0, 0.1)}, far=NEAR), backend="gloo")
    verdicts = judge_links(shared, WORLD, 4)
    assert [verdict.status for verdict in verdicts if verdict.name in ("near links", "far links")] == ["ok", "ok"]
    assert worst(verdicts) == "note"
    assert sum("no pair can be judged here" in verdict.found for verdict in verdicts) == 1
    assert not [verdict for verdict in verdicts if verdict.name == "topology"]
    on_gpus = judge_links(replace(shared, backend="nccl"), WORLD, 4)  # each rank has a device of its own
    assert named(on_gpus, "far links").status == "warning"
    assert not [verdict for verdict in on_gpus if verdict.name == "pairs"]


def test_links_of_one_host_that_were_shaped_still_show_their_classes() -> None:
    shaped = replace(outcome(dict.fromkeys(range(8), "node0")), backend="gloo")
    assert "10.0 times the rate" in named(judge_links(shaped, WORLD, 4), "topology").found


@pytest.mark.parametrize(
    ("hosts", "node_size", "status", "found"),
    [
        (dict.fromkeys(range(8), "node0"), 4, "note", "nominal"),
        (dict.fromkeys(range(8), "node0"), 0, "ok", "node0 8"),
        (HOSTS, 8, "warning", "ranks 0 to 7 are on several hosts"),
        (HOSTS, 2, "note", "a host has 4 ranks"),
        ({rank: f"node{rank % 2}" for rank in range(8)}, 0, "warning", "uneven or scattered"),
        ({rank: "node0" if rank < 5 else "node1" for rank in range(8)}, 0, "warning", "node0 5, node1 3"),
        ({rank: f"node{rank}" for rank in range(8)}, 0, "ok", "node0 1"),
    ],
)
def test_hosts_are_held_against_node_size(hosts: dict[int, str], node_size: int, status: str, found: str) -> None:
    verdict = named(judge_links(outcome(hosts), WORLD, node_size), "hosts")
    assert verdict.status == status
    assert found in verdict.found


def test_ranks_that_did_not_come_up_are_named() -> None:
    there = outcome()
    up = {rank: presence for rank, presence in there.up.items() if rank not in (2, 5)}
    (verdict,) = judge_links(replace(there, up=up, links=(), waited_s=60, failed={5: "it died"}), WORLD, 4)
    assert verdict.status == "problem"
    assert verdict.found == "ranks 2, 5 of 8 did not come up in 60 s; rank 5: it died"


def test_of_failed_ranks_the_cause_is_told_and_not_its_echo() -> None:
    failed = {0: "RuntimeError: Connection closed by peer", 3: "OutOfMemoryError: 2 GB"}
    verdict = named(judge_links(replace(outcome(), failed=failed), WORLD, 4), "transfers")
    assert (verdict.status, verdict.found) == ("problem", "rank 3 failed: OutOfMemoryError: 2 GB")
    gone = replace(outcome(), failed={0: "RuntimeError: Connection closed by peer"}, silent=(3,))
    assert named(judge_links(gone, WORLD, 4), "transfers").found.startswith("rank 3 ended or stopped without a word; ")


def test_ranks_that_hang_are_named_with_the_pair_at_which_they_stand() -> None:
    verdict = named(judge_links(replace(outcome(), silent=(0, 3, 5), hung=(3, 5)), WORLD, 4), "transfers")
    assert verdict.status == "problem"
    assert verdict.found.startswith("ranks 0, 3, 5 did not end in time: the trial hangs between ranks 3 and 5")


def test_ranks_with_other_releases_or_variables_or_without_a_gpu_are_named() -> None:
    there = outcome()
    odd = Presence(host="node1", versions={"torch": "2.12.0"}, variables={"NCCL_NTHREADS": "512"})
    other = replace(there, up={**there.up, 6: odd})
    verdicts = judge_links(other, WORLD, 4)
    assert named(verdicts, "releases").found == "torch is 2.13.0 on rank 0, 2.12.0 on rank 6"
    assert named(verdicts, "variables").found == "NCCL_NTHREADS is not there on rank 0, 512 on rank 6"
    assert "mpirun -x NCCL_NTHREADS" in named(verdicts, "variables").fix
    assert named(verdicts, "devices").found.startswith("rank 6 of 8 have no GPU")


@pytest.mark.parametrize(
    ("groups", "node_size", "near"),
    [
        (((0, 1, 2, 3), (4, 5, 6, 7)), 2, {(0, 1), (2, 3), (4, 5), (6, 7)}),
        (((0, 2, 4, 6), (1, 3, 5, 7)), 4, {(0, 2), (4, 6), (1, 3), (5, 7)}),
        (((0, 1), (2, 3), (4, 5), (6, 7)), 1, set()),
    ],
)
def test_pairs_lie_in_one_expert_group_and_are_near_on_one_node(
    groups: Sequence[Sequence[int]], node_size: int, near: set[tuple[int, int]]
) -> None:
    classes = reaches(groups, node_size, HOSTS)
    assert {pair for pair, reach in classes.items() if reach == "near"} == near
    assert len(classes) == sum(len(group) * (len(group) - 1) // 2 for group in groups)


def test_of_many_pairs_some_of_each_class_are_tried() -> None:
    classes = reaches((range(64),), 8, dict.fromkeys(range(64), "x"))
    chosen = pairs_to_try(classes, 128)
    assert len(set(chosen)) == len(chosen) <= 128
    assert {classes[pair] for pair in chosen} == {"near", "far"}
    assert {rank for pair in chosen for rank in pair} == set(range(64))
    assert len(pairs_to_try(reaches(WORLD, 4, HOSTS), 128)) == 28


def test_an_outcome_survives_the_way_to_another_process() -> None:
    there = replace(outcome(), failed={3: "x"}, silent=(1, 2), hung=(0, 1), stuck=True)
    assert outcome_from(there.to_json()) == there


def test_the_launchers_world_is_read_from_its_variables() -> None:
    assert launched({"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert launched({}) is None
    meeting = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
    torchrun = {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    world = launched({**torchrun, **meeting})
    assert world is not None
    assert (world.rank, world.size, world.local_size, world.serves_store) == (0, 8, 4, False)
    mpi = {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    world = launched({**mpi, **meeting})
    assert world is not None
    assert (world.rank, world.local_rank, world.address, world.port) == (5, 1, "node1", 29500)
    with pytest.raises(EngineError, match=r"MASTER_ADDR=None.*mpirun -x"):
        launched(mpi)
