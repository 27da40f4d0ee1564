"""Engines that a script of somebody else's makes: met before their first pass, and given another ds_config."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import deepspeed
from deepspeed.runtime.pipe.engine import PipelineEngine

import ds_moe_ep


@contextmanager
def at_first_forward(act: Callable[[Any], None]) -> Iterator[None]:
    """A scope in which `act` is called with each engine before its first forward pass of training.

    Local; in a pipeline all stages are there, at its first batch.
    """
    seen = set[int]()

    def met_first(cls: type, method: str) -> AbstractContextManager[Any]:
        original = getattr(cls, method)

        @functools.wraps(original)
        def call(engine: Any, *args: Any, **kwargs: Any) -> Any:
            if id(engine) not in seen and (engine.training or cls is PipelineEngine):
                seen.add(id(engine))
                act(engine)
                return getattr(engine, method)(*args, **kwargs)  # whatever `act` has put around it
            return original(engine, *args, **kwargs)

        return patch.object(cls, method, call)

    with met_first(deepspeed.DeepSpeedEngine, "forward"), met_first(PipelineEngine, "train_batch"):
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
