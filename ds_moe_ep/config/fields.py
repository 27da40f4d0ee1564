"""Fields of configurations: a help text and a smallest value for each, checked when one is made."""

from __future__ import annotations

import dataclasses
import functools
import struct
import types
import typing
from collections.abc import Mapping
from dataclasses import field
from typing import Any, Literal, TypeVar

from ds_moe_ep.errors import ConfigError, nearest

C = TypeVar("C")


def knob(default: Any, help: str, minimum: float | None = None) -> Any:
    """A dataclass field that carries its help text and its smallest legal value."""
    return field(default=default, metadata={"help": help, "minimum": minimum})


def from_dict(cls: type[C], values: Mapping[str, Any], path: str) -> C:
    """An instance of `cls` from a mapping, with unknown keys refused by their nearest known one."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path}={values!r}: expected an object of knobs; write {{...}}")
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in known:
            raise ConfigError(f"{path}.{name}={values[name]!r}: unknown key; {nearest(name, known)}")
    return cls(**values)


def check_fields(config: Any, path: str) -> None:
    """Raises ConfigError for a field whose value has the wrong type, is no choice, or is too small."""
    hints = _type_hints(config.__class__)
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        choices, kinds = _choices_and_kinds(hints[f.name])
        if value in choices:
            continue
        if not kinds:
            known = ", ".join(repr(c) for c in choices)
            raise ConfigError(f"{path}.{f.name}={value!r}: {f.metadata['help']}; choose one of {known}")
        if not _has_kind(value, kinds):
            names = " or ".join(["null" if k is type(None) else k.__name__ for k in kinds] + [repr(c) for c in choices])
            raise ConfigError(f"{path}.{f.name}={value!r}: {f.metadata['help']}; it needs {names}")
        minimum = f.metadata["minimum"]
        if minimum is not None and value is not None and not value >= minimum:
            raise ConfigError(f"{path}.{f.name}={value!r}: {f.metadata['help']}; it needs at least {minimum}")


@functools.cache
def _type_hints(cls: type) -> dict[str, Any]:
    """The types of a class's fields: each layer has a config, and reading them takes a millisecond."""
    return typing.get_type_hints(cls)


@functools.cache
def _choices_and_kinds(hint: Any) -> tuple[tuple[Any, ...], tuple[type, ...]]:
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint), ()
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        choices = tuple(c for part in typing.get_args(hint) for c in _choices_and_kinds(part)[0])
        return choices, tuple(part for part in typing.get_args(hint) if not _choices_and_kinds(part)[0])
    return (), (hint,)


def _has_kind(value: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int) and float in kinds:
        return True
    return isinstance(value, kinds)


def to_fp32(value: float) -> float:
    """The nearest number that fp32 has."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded
