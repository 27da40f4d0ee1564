"""Engines that a script of somebody else's makes: met before their first pass, and given another ds_config."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import deepspeed

import ds_moe_ep


@contextmanager
def at_first_forward(act: Callable[[Any], None]) -> Iterator[None]:
    """A scope in which `act` is called with each engine before its first forward pass of training. Local."""
    original, seen = deepspeed.DeepSpeedEngine.forward, set[int]()

    @functools.wraps(original)
    def forward(engine: Any, *args: Any, **kwargs: Any) -> Any:
        if id(engine) not in seen and engine.training:
            seen.add(id(engine))
            act(engine)
            return engine(*args, **kwargs)  # whatever `act` has put around it
        return original(engine, *args, **kwargs)

    with patch.object(deepspeed.DeepSpeedEngine, "forward", forward):
        yield


@contextmanager
def another_config(path: str) -> Iterator[None]:
    """A scope in which every engine is made with the ds_config of a file, whatever its maker passes."""

    def with_config(initialize: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(initialize)
        def initialize_with_config(args: Any = None, *others: Any, **kwargs: Any) -> Any:
            if getattr(args, "deepspeed_config", None) is not None:
                args = copy.copy(args)
                args.deepspeed_config = None
            given = {name: value for name, value in kwargs.items() if name != "config_params"}
            return initialize(args, *others, **{**given, "config": path})

        return initialize_with_config

    with ExitStack() as scopes:
        own = ds_moe_ep.initialize
        scopes.enter_context(patch.object(deepspeed, "initialize", with_config(deepspeed.initialize)))
        scopes.enter_context(patch.object(ds_moe_ep, "initialize", with_config(own)))
        yield
