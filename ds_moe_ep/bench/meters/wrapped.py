"""Methods of a class behind functions of a meter, for as long as a block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

Method = Callable[..., Any]


@contextmanager
def wrapped(owner: type, names: Iterable[str], wrap: Callable[[str, Method], Method]) -> Iterator[None]:
    """Puts `wrap(name, method)` in the place of each method that the class has itself, and puts it back at the end."""
    # As they lie in the class: what getattr gives is unbound for ever, and could not be put back.
    descriptors = {name: vars(owner)[name] for name in names if name in vars(owner)}
    try:
        for name in descriptors:
            setattr(owner, name, wrap(name, getattr(owner, name)))
        yield
    finally:
        for name, descriptor in descriptors.items():
            setattr(owner, name, descriptor)
