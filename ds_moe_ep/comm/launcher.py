"""Place of this process in a launched job, from the variables of deepspeed, torchrun and mpirun. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ds_moe_ep.errors import EngineError

# The names that launchers give a number: deepspeed and torchrun first, then Open MPI.
RANK = ("RANK", "OMPI_COMM_WORLD_RANK")
SIZE = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE")
LOCAL_RANK = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
LOCAL_SIZE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE")


@dataclass(frozen=True, kw_only=True)
class World:
    """Place of this process among the ranks."""

    rank: int
    size: int
    local_rank: int
    local_size: int | None  # None where the launcher does not say
    address: str
    port: int
    serves_store: bool
    wants_gpu: bool


def launched(environment: Mapping[str, str]) -> World | None:
    """The world that a launcher has put this process into; None outside of one, and in a world of one.

    Raises EngineError where the launcher says a rank and no meeting place.
    """
    rank, size = _number(environment, RANK), _number(environment, SIZE)
    if rank is None or size is None or size == 1:
        return None
    address, port = environment.get("MASTER_ADDR"), _number(environment, ("MASTER_PORT",))
    if address is None or port is None:
        raise EngineError(
            f"MASTER_ADDR={address!r}, MASTER_PORT={port!r}: rank {rank} of {size} does not know where to meet the "
            "others; give both to every rank (mpirun -x MASTER_ADDR=host -x MASTER_PORT=29500)"
        )
    return World(
        rank=rank,
        size=size,
        local_rank=_number(environment, LOCAL_RANK) or 0,
        local_size=_number(environment, LOCAL_SIZE),
        address=address,
        port=port,
        serves_store=rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        wants_gpu=environment.get("DS_ACCELERATOR") != "cpu",
    )


def _number(environment: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    return next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), None)
