"""The surroundings of code: leaving it out of torch.compile and torch.autocast, knowing that a backward pass runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch._C._dynamo import eval_frame as _eval_frame
from torch._compile import _disable_dynamo

_compiler_of_frames = _eval_frame.get_eval_frame_callback  # None where nothing is being compiled
_NOTHING = nullcontext()
F = TypeVar("F", bound=Callable[..., Any])


def not_compiled(function: F) -> F:
    """The function as torch.compile leaves it out, with all that it calls; the code around it is compiled.

    The public `torch.compiler.disable` imports the compiler where it decorates, which takes a second of every import
    of this package. This form imports it where something is being compiled, and costs nothing elsewhere.
    """
    left_out: F = _disable_dynamo(function)  # type: ignore[assignment]
    if not hasattr(_eval_frame, "set_code_exec_strategy"):  # of another release
        return left_out

    def call(*args: Any, **kwargs: Any) -> Any:
        return (function if _compiler_of_frames() is None else left_out)(*args, **kwargs)

    skip = _eval_frame._FrameExecStrategy(_eval_frame._FrameAction.SKIP, _eval_frame._FrameAction.DEFAULT)
    _eval_frame.set_code_exec_strategy(call.__code__, skip)
    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return functools.wraps(function)(call)  # type: ignore[return-value]


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """A scope in which operations compute in their tensors' types; for every device, the meta device too."""
    if not torch._C._is_any_autocast_enabled():
        return _NOTHING  # a scope of autocast costs as much as some operations
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return _NOTHING
    return torch.autocast(device_type, enabled=False)


def is_inside_backward() -> bool:
    """True in a recomputation, which has to meet what its first pass met."""
    return bool(getattr(torch._C, "_current_graph_task_id", lambda: -1)() != -1)
