"""Parallelisms that change the tokens of a rank: what their keys mean, and where experts do not go along.

DeepSpeed 0.19 takes `data_parallel_size` and `sequence_parallel_size` together as the shape of a mesh of ranks, as it
does `mesh_param` of `deepspeed.initialize`, and counts the batch over the first. Alone neither makes groups:
`sequence_parallel_size` only divides the number of ranks that the batch is counted with, beside an mpu that makes them,
and `data_parallel_size` is read by nobody.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ds_moe_ep.errors import ConfigError

CUT_EXPERTS_RULE = (
    "an expert is whole on its rank, and tensor ranks share its tokens, not its weights; leave experts and the gate "
    "out of the cut (tensor_parallel.partition_config, enable_expert_tensor_parallelism=False)"
)
MESH_RULE = (
    "DeepSpeed averages gradients over the data-parallel ranks of its mesh alone, so that the weights of sequence "
    "ranks part, dense ones too"
)
MESH_FIX = "pass mpu=deepspeed.runtime.sequence_parallel.parallel_state_sp, whose gradients are summed, in its place"
STAGES_RULE = "stages are run by DeepSpeed's pipeline engine alone, which makes the layer's groups in each of them"
FIX = "set it to 1, and give the ranks to ep_size"


Partition = Literal["column", "row", "skip"]
# What DeepSpeed's own plans cut of a transformer; it has none for the package's model, and needs `partition_config`
USUAL: tuple[tuple[str, Partition], ...] = (
    (r".*attention\.qkv\.weight$", "column"),
    (r".*attention\.out\.weight$", "row"),
)

MEGATRONS: tuple[tuple[str, Partition], ...] = (
    *USUAL,
    (r".*shared\.(fc1|gate|up)\.weight$", "column"),
    (r".*shared\.(fc2|down)\.weight$", "row"),
    (r"(embedding|head)\.weight$", "column"),
)


@dataclass(frozen=True, kw_only=True)
class DenseCut:
    """Tensor ranks of the dense part, and the matrices of which each has a part, by patterns of their names."""

    size: int = 1
    patterns: tuple[tuple[str, Partition], ...] = ()
    source: Literal["", "partition_config", "mpu"] = ""  # of the patterns; by default the usual ones

    def shares(self, name: str) -> int:
        """Ranks that share the weight or bias of this name; a row's bias is whole on each."""
        weight = re.sub("bias$", "weight", name)
        found = next((how for pattern, how in self.patterns if re.match(pattern, weight)), "skip")
        return self.size if found == "column" or (found == "row" and weight == name) else 1


UNCUT = DenseCut()


def read_dense_cut(ds_config: Mapping[str, Any], world_size: int | None = None) -> DenseCut:
    """AutoTP's cut of the dense part. Raises ConfigError where its size does not divide a world, or for no patterns."""
    size = read_tensor_size(ds_config, world_size)
    if size == 1:
        return UNCUT
    plan = ds_config["tensor_parallel"].get("partition_config")
    if not isinstance(plan, Mapping) or not plan.get("layer_specs"):
        return DenseCut(size=size, patterns=USUAL)
    path = "tensor_parallel.partition_config.layer_specs"
    try:
        specs = [(str(each), spec["partition_type"]) for spec in plan["layer_specs"] for each in spec["patterns"]]
        for pattern, _ in specs:
            re.compile(pattern)
    except (TypeError, KeyError, re.error) as error:
        raise ConfigError(f"{path}: no list of patterns with a partition_type each ({error}); write it so") from None
    return DenseCut(size=size, patterns=tuple(specs), source="partition_config")


def cut_of_mpu(ds_config: Mapping[str, Any], size: int, world_size: int | None = None) -> DenseCut:
    """Megatron's cut of the dense part over the tensor ranks of an mpu: attention, shared expert, embedding, head.

    Raises ConfigError where the ds_config has AutoTP's cut, or the size does not divide a world.
    """
    if (own := read_tensor_size(ds_config)) > 1:
        raise ConfigError(
            f"tensor_ranks={size} with tensor_parallel.autotp_size={own}: an mpu or AutoTP cuts the dense part, "
            "not twice; leave one out"
        )
    if world_size is not None and world_size % size:
        raise ConfigError(
            f"tensor_ranks={size}: does not divide the world of {world_size} ranks; take a size that does"
        )
    return DenseCut(size=size, patterns=MEGATRONS, source="mpu")


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


def read_sequence_size(ds_config: Mapping[str, Any], world_size: int | None = None) -> int:
    """Ranks that share a sequence, by whose number DeepSpeed divides the world to count the batch; 1 without the key.

    Raises ConfigError where it makes a mesh, or does not divide a world.
    """
    size, copies = ds_config.get("sequence_parallel_size"), ds_config.get("data_parallel_size")
    _check_size("sequence_parallel_size", size, 1)
    if size is None or size == 1:
        if size == 1 and copies is not None and copies != (world_size or copies):
            raise ConfigError(
                f"data_parallel_size={copies!r} with sequence_parallel_size=1: DeepSpeed makes a mesh of the two "
                f"sizes, which must hold the {world_size} ranks; set it to {world_size}, or remove both keys"
            )
        return 1
    if copies is not None:
        raise ConfigError(f"data_parallel_size={copies!r} with sequence_parallel_size={size}: {MESH_RULE}; {MESH_FIX}")
    if world_size is not None and world_size % size:
        raise ConfigError(
            f"sequence_parallel_size={size}: does not divide the world of {world_size} ranks; take a size that does"
        )
    return int(size)


def _check_size(path: str, value: Any, least: int) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ConfigError(f"{path}={value!r}: needs a number of ranks; set it to 1, or remove it")


def refuse_mesh(mesh_param: Sequence[int] | None) -> None:
    """Raises ConfigError for a mesh (data-parallel size, sequence-parallel size) whose ranks share sequences."""
    if mesh_param and mesh_param[1] > 1:
        raise ConfigError(f"mesh_param={tuple(mesh_param)}: {MESH_RULE}; {MESH_FIX}")


def refuse_key_alone(ds_config: Mapping[str, Any]) -> None:
    """Raises ConfigError for a size of sequence parallelism for which nobody makes groups."""
    size = read_sequence_size(ds_config)
    if size > 1:
        raise ConfigError(
            f"sequence_parallel_size={size} without an mpu: it makes no groups, and only counts the batch over fewer "
            "ranks; pass mpu=deepspeed.runtime.sequence_parallel.parallel_state_sp, or remove it"
        )
