"""A model with adapters of the peft library as the plain model that it computes, for the time of an export."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ds_moe_ep.errors import ExportError


@contextmanager
def merged(model: nn.Module) -> Iterator[nn.Module]:
    """A scope in which adapters are part of the weights that they adapt; behind it all is as before, bit for bit.

    Gives the model without peft's outermost level. Weights that an adapter changes are kept in host memory meanwhile.
    Local. Raises ExportError for adapters that cannot be merged, before anything has changed.
    """
    peft: Any = sys.modules.get("peft")
    if peft is None:
        yield model
        return
    adapted = {name: module for name, module in model.named_modules() if is_adapted(module)}
    for name, module in adapted.items():
        if not hasattr(module, "merge") or type(module).__name__ == "ParamWrapper":
            raise ExportError(
                f"{name}: {type(module).__name__} of peft cannot be merged here; take it off first "
                "(model.merge_and_unload())"
            )
    with ExitStack() as scopes:
        for name, module in adapted.items():
            scopes.enter_context(_merged_layer(model, name, module))
        for name, module in list(model.named_modules()):
            if isinstance(module, peft.utils.ModulesToSaveWrapper):
                trained = module.modules_to_save[module.active_adapters[0]]
                scopes.enter_context(_standing_in(model, name, trained))
        yield model.get_base_model() if isinstance(model, peft.PeftModel) else model


def is_adapted(module: nn.Module) -> bool:
    """True for a layer of peft's around a layer of the model."""
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


@contextmanager
def _merged_layer(model: nn.Module, name: str, layer: Any) -> Iterator[None]:
    """The adapted layer's base in its place, with the adapters' part in its weights."""
    base: nn.Module = layer.get_base_layer()
    if layer.merged:
        with _standing_in(model, name, base):
            yield
        return
    before = {key: parameter.detach().cpu().clone() for key, parameter in base.named_parameters()}
    layer.merge()
    try:
        with _standing_in(model, name, base):
            yield
    finally:
        layer.merged_adapters.clear()
        with torch.no_grad():
            for key, parameter in base.named_parameters():
                parameter.copy_(before[key])


@contextmanager
def _standing_in(model: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """`module` in the place of the one of that name."""
    parent_name, _, place = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    before = getattr(parent, place)
    setattr(parent, place, module)
    try:
        yield
    finally:
        setattr(parent, place, before)
