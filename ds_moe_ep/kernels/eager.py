"""Leaving functions out of what torch.compile compiles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch._compile import _disable_dynamo

F = TypeVar("F", bound=Callable[..., Any])


def not_compiled(function: F) -> F:
    """The function as torch.compile leaves it out, with all that it calls; the code around it is compiled.

    The public `torch.compiler.disable` imports the compiler where it decorates, which takes a second of every import
    of this package. This form imports it with the first call, as torch's optimizers do when they are made.
    """
    left_out: F = _disable_dynamo(function)  # type: ignore[assignment]
    return left_out
