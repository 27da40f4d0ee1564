"""The state of a process in which functions of several tests run, one after the other."""

from __future__ import annotations

import gc
import logging
import os
import random
import sys
import threading
from collections.abc import Mapping
from typing import Any

import numpy
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups
from torch.distributed import distributed_c10d as c10d

from ds_moe_ep.engine import seams

GROUPS_OF_A_FUNCTION = 10_000  # more than any makes: torch numbers them
ENDING_S = 5.0  # a function may leave a transfer that never ends


class ProcessState:
    """What functions change in a rank for those after them.

    Random numbers, variables, DeepSpeed's groups, names in the package's modules and classes, what loggers write and
    where errors go, the watch over the other ranks, and their store. Groups and watches meet there by number: where a
    function failed on one rank alone, the ranks would count differently from then on.
    """

    def __init__(self) -> None:
        self._random = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        self._environment = dict(os.environ)
        self._namespaces = [(names, _copied(names)) for names in (vars(groups), vars(get_accelerator()))]
        package = [module for name, module in sys.modules.items() if name.partition(".")[0] == "ds_moe_ep"]
        classes = {each for module in package for each in vars(module).values() if isinstance(each, type)}
        own = [each for each in classes if each.__module__.partition(".")[0] == "ds_moe_ep"]
        # ZeRO 3 leaves its own linear there, and experts are no longer recognised.
        self._names = [(each, dict(vars(each))) for each in (*package, *own, torch.nn.functional)]
        loggers = [each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
        self._loggers = [(each, each.level, each.filters[:], each.handlers[:]) for each in loggers]
        self._stderr = os.dup(2)
        self._store = c10d._get_default_store()
        self._num_functions = 0

    def begin(self) -> None:
        """Readies the process for a function. Every rank has answered to the one before: none waits for another."""
        for watch in list(seams._WATCHES.values()):
            watch.end()
        seams._WATCHES.clear()
        world = dist.group.WORLD
        assert world is not None, "pooled ranks have a process group"
        self._num_functions += 1
        left = [group for group in c10d._world.pg_map if group is not world]
        list(map(dist.destroy_process_group, left))
        # Their threads wake a hundred times a second each. A group ends behind its last transfer.
        ending = threading.Thread(target=left.clear, daemon=True)
        ending.start()
        ending.join(ENDING_S)
        backend, _ = c10d._world.pg_map[world]
        c10d._world.pg_map[world] = (backend, dist.PrefixStore(f"function {self._num_functions}", self._store))
        c10d._world.group_count = self._num_functions * GROUPS_OF_A_FUNCTION

    def restore(self) -> None:
        """Puts it back, and drops what the function left: engines end their lanes and their watch."""
        for owner, before in self._names:
            now = vars(owner)
            for name in [name for name, value in before.items() if now.get(name) is not value]:
                setattr(owner, name, before[name])
        for logger, level, filters, handlers in self._loggers:
            if logger.level != level:
                logger.setLevel(level)
            logger.filters[:], logger.handlers[:] = filters, handlers
        gc.collect()
        random.setstate(self._random[0])
        numpy.random.set_state(self._random[1])
        torch.set_rng_state(self._random[2])
        os.dup2(self._stderr, 2)
        os.environ.clear()
        os.environ |= self._environment
        for names, before in self._namespaces:
            names.clear()
            names |= _copied(before)


def _copied(names: Mapping[str, Any]) -> dict[str, Any]:
    """The names, with tables of their own."""
    own = {name: dict(value) for name, value in names.items() if isinstance(value, dict) and name[:2] != "__"}
    return {**names, **own}
