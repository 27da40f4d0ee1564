"""Reads a ds_config: the file, and its section `"moe_ep"`.

DeepSpeed accepts an unknown top-level key in silence, so a misspelt section would train with defaults:
keys that come close to `moe_ep` are refused here.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds_moe_ep.config.knobs import Layout, ModelConfig, MoEConfig
from ds_moe_ep.config.shipped import path_of, shipped_ds_configs, way_to
from ds_moe_ep.errors import ConfigError

SECTION = "moe_ep"


@dataclass(frozen=True, kw_only=True)
class Section:
    """Content of `"moe_ep"`: the layers' knobs, the model if named, its layout, and which layer knobs were given."""

    moe: MoEConfig
    model: ModelConfig | None
    given: frozenset[str]
    layout: Layout


def load_ds_config(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The ds_config as a dict of its own, from a JSON file, one that ships (by its name, `ep16`), or a mapping.

    Raises ConfigError where the file is missing, is not JSON, or gives a key twice.
    """
    if isinstance(source, Mapping):
        return dict(source)
    shipped = shipped_ds_configs()
    path = path_of(source, shipped)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"config={str(path)!r}: cannot be read ({error.strerror}); {way_to(path, shipped)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"config={str(path)!r}: is not UTF-8 text ({error.reason}); save it as such") from None
    try:
        values = json.loads(text, object_pairs_hook=_refuse_twice)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"config={str(path)!r}: line {error.lineno}, column {error.colno} is not JSON ({error.msg}); "
            "remove comments and trailing commas"
        ) from None
    except RecursionError:
        raise ConfigError(f"config={str(path)!r}: nested too deeply; a ds_config has a few levels") from None
    if not isinstance(values, dict):
        raise ConfigError(f"config={str(path)!r}: holds a {type(values).__name__}; a ds_config is an object {{...}}")
    return values


def read_section(ds_config: Mapping[str, Any]) -> Section:
    """The section `"moe_ep"` of `ds_config`; without one, the defaults with nothing given.

    `"model"` inside it is a name of MODELS, or an object of ModelConfig's knobs in which `"name"` may
    choose the model that the other knobs change; `"layout"` is an object of Layout's knobs.
    """
    if SECTION not in ds_config:
        for key in ds_config:
            if _is_close(key):
                raise ConfigError(
                    f"{key}={ds_config[key]!r}: DeepSpeed would ignore this key; did you mean {SECTION!r}?"
                )
        return Section(moe=MoEConfig(), model=None, given=frozenset(), layout=Layout())
    values = ds_config[SECTION]
    if not isinstance(values, Mapping):
        raise ConfigError(f"{SECTION}={values!r}: expected an object of knobs; write {{...}}")
    moe_values = {name: value for name, value in values.items() if name not in ("model", "layout")}
    moe = MoEConfig.from_dict(moe_values, SECTION)
    model = _read_model(values["model"]) if values.get("model") is not None else None
    layout = Layout.from_dict(values.get("layout") or {}, f"{SECTION}.layout")
    if model is not None:
        layout.check(model, moe)
    return Section(moe=moe, model=model, given=frozenset(moe_values), layout=layout)


def _read_model(values: Any) -> ModelConfig:
    path = f"{SECTION}.model"
    if not isinstance(values, Mapping) or "name" not in values:
        return ModelConfig.from_dict(values, path)
    base = values["name"]
    if not isinstance(base, str):
        raise ConfigError(f"{path}.name={base!r}: names the model that the other knobs change; write a string")
    knobs = vars(ModelConfig.from_dict(base, f"{path}.name"))
    changes = {name: value for name, value in values.items() if name != "name"}
    return ModelConfig.from_dict({**knobs, **changes}, path)


def _is_close(key: str) -> bool:
    plain = "".join(letter for letter in key.lower() if letter.isalnum())
    return difflib.SequenceMatcher(a=plain, b="moeep").ratio() >= 0.8


def _refuse_twice(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{twice}={values[twice]!r}: the key stands twice in one object; keep one of them")
    return values
