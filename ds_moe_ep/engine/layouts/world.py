"""DeepSpeed's notion of the world, which is global to a process, for each of several engines that live in one.

It keeps the unit of model parallelism, and one expert-parallel group per ep_size. Engines of two layouts have other
ranks in groups of one name: each is made in a world of its own, which is entered again before the engine runs. Part of
`seams.py`, as to private names.
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
class World:
    """Groups that DeepSpeed knows: its unit of model parallelism, and its tables of expert groups by name."""

    mpu: Any
    tables: Mapping[str, Any]

    @classmethod
    def now(cls) -> World:
        """The world in force; groups that are made later in it are found there too."""
        return cls(groups.mpu, {name: getattr(groups, name) for name in TABLES})

    def enter(self) -> None:
        """Puts this world into force. Local."""
        groups.mpu = self.mpu
        for name, table in self.tables.items():
            setattr(groups, name, table)


def enter_new_world() -> None:
    """Puts a world without groups into force: the next engine makes its own. Local; the same on every rank."""
    World(None, {name: {} for name in TABLES}).enter()
