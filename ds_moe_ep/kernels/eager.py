"""The surroundings of code: leaving it out of torch.compile and torch.autocast, knowing that a backward pass runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch._compile import _disable_dynamo

F = TypeVar("F", bound=Callable[..., Any])


def not_compiled(function: F) -> F:
    """The function as torch.compile leaves it out, with all that it calls; the code around it is compiled.

    The public `torch.compiler.disable` imports the compiler where it decorates, which takes a second of every import
    of this package. This form imports it with the first call, as torch's optimizers do when they are made.
    """
    left_out: F = _disable_dynamo(function)  # type: ignore[assignment]
    return left_out


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """A scope in which operations compute in their tensors' types; for every device, the meta device too."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return nullcontext()  # a scope of autocast costs as much as some operations
    return torch.autocast(device_type, enabled=False)


def is_inside_backward() -> bool:
    """True in a recomputation, which has to meet what its first pass met."""
    return bool(getattr(torch._C, "_current_graph_task_id", lambda: -1)() != -1)
