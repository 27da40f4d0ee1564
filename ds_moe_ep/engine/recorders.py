"""transformers' registry of recorded outputs, as AutoEP uses it.

AutoEP of DeepSpeed 0.19.8 reads and restores the registry by names of classes, as it was a plain dict. In transformers
5.23 and 5.24 it takes models alone: `get` has no default, which ends deepspeed.initialize with a TypeError, and what is
set under a name lands elsewhere.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from deepspeed.utils import log_dist

HOME = "transformers.utils.output_capturing"


@functools.cache
def mend_autoep() -> None:
    """Lets AutoEP mend the registry before it uses it. Loads nothing of transformers; for engines made from now on."""
    try:
        module = importlib.import_module("deepspeed.module_inject.auto_ep")
    except ImportError:
        return  # a release without AutoEP
    retarget = getattr(module.AutoEP, "_retarget_transformers_output_recorders", None)
    if retarget is None:
        return

    @functools.wraps(retarget)
    def mend_and_retarget(*args: Any, **kwargs: Any) -> Any:
        mend_registry()
        return retarget(*args, **kwargs)

    module.AutoEP._retarget_transformers_output_recorders = mend_and_retarget


def mend_registry() -> bool:
    """Lets the registry take names as well as models, where it does not; says so in the log.

    Returns whether there was something to mend: a second call finds nothing.
    """
    try:
        registry = importlib.import_module(HOME)._CAN_RECORD_REGISTRY
    except (ImportError, AttributeError):
        return False  # no transformers, or one without it
    kind = type(registry)
    if not isinstance(registry, dict) or takes_names(kind):
        return False
    get, set_item = kind.get, kind.__setitem__

    def get_by_model_or_name(self: dict[str, Any], key: Any, default: Any = None) -> Any:
        return dict.get(self, key, default) if isinstance(key, str) else get(self, key)

    def set_by_model_or_name(self: dict[str, Any], key: Any, value: Any) -> None:
        (dict.__setitem__ if isinstance(key, str) else set_item)(self, key, value)

    kind.get, kind.__setitem__ = get_by_model_or_name, set_by_model_or_name
    message = f"ds_moe_ep: {HOME}: the registry takes class names again, which AutoEP gives it"
    log_dist(message, ranks=[0])
    return True


def takes_names(kind: type[dict[str, Any]]) -> bool:
    """True where a kind of registry can be read and set by the name of a class."""
    probe = kind()
    try:
        is_default = probe.get("name", None) is None
        probe["name"] = {"is": "there"}
        return is_default and "name" in probe and probe.get("name", None) == {"is": "there"}
    except (TypeError, AttributeError):
        return False
