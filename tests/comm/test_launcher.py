"""Where launchers have put a process: the variables of deepspeed and torchrun, and those of mpirun."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ds_moe_ep.comm.launcher import World, launched
from ds_moe_ep.errors import EngineError

MEETING = {"MASTER_ADDR": "host", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", **MEETING}
THERE = World(
    rank=3, size=4, local_rank=1, local_size=2, address="host", port=29500, serves_store=False, wants_gpu=True
)


def test_torchrun_and_mpirun_say_the_same_and_the_first_names_win() -> None:
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    mpirun = {f"OMPI_COMM_WORLD_{name}": value for name, value in zip(names, "3412", strict=True)}
    assert launched(TORCHRUN) == launched({**mpirun, **MEETING}) == THERE
    others = {f"OMPI_COMM_WORLD_{name}": "9" for name in names}
    assert launched({**others, **TORCHRUN}) == THERE


def test_outside_of_a_launcher_and_in_a_world_of_one_there_is_no_world() -> None:
    assert launched(MEETING) is None
    for change in ({"RANK": ""}, {"WORLD_SIZE": ""}, {"RANK": "none"}, {"RANK": "0", "WORLD_SIZE": "1"}):
        assert launched({**TORCHRUN, **change}) is None
    assert launched({**TORCHRUN, "RANK": "1", "WORLD_SIZE": "2"}) is not None


def test_what_a_launcher_leaves_out_is_the_first_place_of_a_host_of_unknown_size() -> None:
    bare = {name: TORCHRUN[name] for name in ("RANK", "WORLD_SIZE", *MEETING)}
    assert launched(bare) == replace(THERE, local_rank=0, local_size=None)
    assert launched({**TORCHRUN, "DS_ACCELERATOR": "cpu"}) == replace(THERE, wants_gpu=False)


def test_rank_0_serves_the_store_unless_torchruns_agent_does() -> None:
    first = {**TORCHRUN, "RANK": "0"}
    assert launched(first) == replace(THERE, rank=0, serves_store=True)
    assert launched({**first, "TORCHELASTIC_USE_AGENT_STORE": "True"}) == replace(THERE, rank=0)
    assert launched({**first, "TORCHELASTIC_USE_AGENT_STORE": "False"}) == replace(THERE, rank=0, serves_store=True)


@pytest.mark.parametrize("lacks", list(MEETING))
def test_a_rank_without_a_meeting_place_is_refused(lacks: str) -> None:
    with pytest.raises(EngineError, match=f"{lacks}=None.*rank 3 of 4 does not know where to meet"):
        launched({name: value for name, value in TORCHRUN.items() if name != lacks})
