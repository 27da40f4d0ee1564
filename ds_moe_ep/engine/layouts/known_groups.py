"""The groups that DeepSpeed knows, which are global to a process, for each of several engines that live in one.

It knows one unit of model parallelism or one mesh, and one expert-parallel group per ep_size. Engines of two layouts
have other ranks in groups of one name: an engine is made where none is known, and its groups are put in force before it
runs. Part of `seams.py`, as to private names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deepspeed.utils import groups

TABLES = (
    "_EXPERT_PARALLEL_GROUP",
    "_EXPERT_PARALLEL_GROUP_RANKS",
    "_EXPERT_DATA_PARALLEL_GROUP",
    "_EXPERT_DATA_PARALLEL_GROUP_RANKS",
)


@dataclass(frozen=True)
class KnownGroups:
    """Groups that DeepSpeed knows of: its unit of model parallelism, its mesh, its tables of expert groups by name."""

    mpu: Any
    mesh: Any
    tables: Mapping[str, Any]

    @classmethod
    def now(cls) -> KnownGroups:
        """The groups in force; those of a name that is made later are found among them too."""
        return cls(groups.mpu, getattr(groups, "mesh_device", None), {name: getattr(groups, name) for name in TABLES})

    def put_in_force(self) -> None:
        """Gives them to DeepSpeed. Local."""
        groups.mpu, groups.mesh_device = self.mpu, self.mesh
        for name, table in self.tables.items():
            setattr(groups, name, table)


def forget_groups() -> None:
    """Lets DeepSpeed know of no group: the next engine makes its own. Local; the same on every rank."""
    KnownGroups(None, None, {name: {} for name in TABLES}).put_in_force()
