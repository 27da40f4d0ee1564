"""Parallelisms that change the tokens of a rank: why experts do not go with them, and the keys that ask for them.

DeepSpeed 0.19 takes `data_parallel_size` and `sequence_parallel_size` together as the shape of a mesh of ranks, as it
does `mesh_param` of `deepspeed.initialize`, and counts the batch over the first. Alone neither makes groups:
`sequence_parallel_size` only divides the number of ranks that the batch is counted with, and `data_parallel_size` is
read by nobody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ds_moe_ep.errors import ConfigError

CUT_EXPERTS_RULE = (
    "an expert is whole on its rank, and tensor ranks share its tokens, not its weights; leave experts and the gate "
    "out of the cut (tensor_parallel.partition_config, enable_expert_tensor_parallelism=False)"
)
SEQUENCE_RULE = (
    "DeepSpeed sums the gradients of dense parameters and of experts over different ranks there, and either comes out "
    "wrong"
)
STAGES_RULE = "the layer's groups span the data-parallel world, and stages would wait for each other"
FIX = "set it to 1, and give the ranks to ep_size"


def read_tensor_size(ds_config: Mapping[str, Any], world_size: int | None = None) -> int:
    """Ranks that AutoTP cuts the dense part over; 1 without it. Raises ConfigError where it does not divide a world."""
    section = ds_config.get("tensor_parallel")
    size = section.get("autotp_size") if isinstance(section, Mapping) else None
    _check_size("tensor_parallel.autotp_size", size, 0)
    if world_size is not None and size and world_size % size:
        raise ConfigError(
            f"tensor_parallel.autotp_size={size}: does not divide the world of {world_size} ranks; take a size that "
            "does, or start a multiple of it"
        )
    return size or 1


def refuse_sequence_keys(ds_config: Mapping[str, Any], world_size: int | None = None) -> None:
    """Raises ConfigError for keys of DeepSpeed's under which ranks share sequences.

    With a world's size, also for a `data_parallel_size` that is not it.
    """
    size = ds_config.get("sequence_parallel_size")
    _check_size("sequence_parallel_size", size, 1)
    if size is not None and size > 1:
        raise ConfigError(f"sequence_parallel_size={size}: {SEQUENCE_RULE}; {FIX}")
    copies = ds_config.get("data_parallel_size")
    if "sequence_parallel_size" in ds_config and copies is not None and copies != (world_size or copies):
        raise ConfigError(
            f"data_parallel_size={copies!r} with sequence_parallel_size=1: DeepSpeed makes a mesh of the two sizes, "
            f"which must hold the {world_size} ranks; set it to {world_size}, or remove both keys"
        )


def _check_size(path: str, value: Any, least: int) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ConfigError(f"{path}={value!r}: needs a number of ranks; set it to 1, or remove it")


def refuse_shared_sequences(mesh_param: Sequence[int] | None) -> None:
    """Raises ConfigError for a mesh (data-parallel size, sequence-parallel size) whose ranks share sequences."""
    if mesh_param and mesh_param[1] > 1:
        raise ConfigError(
            f"mesh_param={tuple(mesh_param)}: {SEQUENCE_RULE}; leave it out, and give the ranks to ep_size"
        )
