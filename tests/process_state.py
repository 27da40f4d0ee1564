"""The state of a process in which functions of several tests run, one after the other."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups


class ProcessState:
    """What functions change in a rank for those after them: random numbers, variables, DeepSpeed's groups."""

    def __init__(self) -> None:
        self._random = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        self._environment = dict(os.environ)
        self._namespaces = [(names, _copied(names)) for names in (vars(groups), vars(get_accelerator()))]

    def restore(self) -> None:
        """Puts it back, and drops what the function left: engines end their lanes and their watch."""
        gc.collect()
        random.setstate(self._random[0])
        numpy.random.set_state(self._random[1])
        torch.set_rng_state(self._random[2])
        os.environ.clear()
        os.environ |= self._environment
        for names, before in self._namespaces:
            names.clear()
            names |= _copied(before)


def _copied(names: Mapping[str, Any]) -> dict[str, Any]:
    """The names, with tables of their own."""
    own = {name: dict(value) for name, value in names.items() if isinstance(value, dict) and name[:2] != "__"}
    return {**names, **own}
