"""Tests that run in a process of their own in which Triton interprets its kernels on the CPU.

Triton reads TRITON_INTERPRET while it is imported, and an interpreted kernel cannot be compiled afterwards: one worker
process serves all tests that are marked so, and the process of the tests keeps the other form.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from typing import Any

import pytest

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed (pip install 'ds-moe-ep[triton]')"
)


def under_interpreter(test: Callable[..., None]) -> Callable[..., None]:
    """The test, run in the worker; what it raises there is raised here."""

    @needs_triton
    @functools.wraps(test)
    def run(**parameters: Any) -> None:
        worker().submit(call, test.__module__, test.__name__, parameters).result(timeout=240)

    return run


@functools.cache
def worker() -> ProcessPoolExecutor:
    """The process that interprets; it ends with the tests."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        pool.submit(call, __name__, "check_interpreter", {}).result(timeout=240)
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    return pool


def call(module: str, name: str, parameters: dict[str, Any]) -> None:
    """Calls a test by its name, in the worker."""
    function = getattr(importlib.import_module(module), name)
    getattr(function, "__wrapped__", function)(**parameters)


def check_interpreter() -> None:
    """Fails where kernels of this process would be compiled."""
    import torch
    import triton

    torch.set_num_threads(1)
    assert triton.knobs.runtime.interpret, sys.modules.keys() & {"triton"}
