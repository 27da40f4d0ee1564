"""A model with adapters of the peft library as the plain model that it computes, for the time of an export."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ds_moe_ep.errors import ExportError
from ds_moe_ep.model.transformer import Transformer


class Merged:
    """A model without peft's levels, whose tensors are read with the adapters' part in them, one at a time."""

    def __init__(self, model: nn.Module, adapted: Iterable[Any]) -> None:
        self.model = model
        self._layers: dict[int, list[Any]] = {}  # by the address of a weight; tied ones have several
        for layer in adapted:
            for parameter in layer.get_base_layer().parameters():
                self._layers.setdefault(parameter.data_ptr(), []).append(layer)

    def read(self, tensor: Tensor) -> Tensor:
        """The tensor as the model computes with it; in host memory of its own where an adapter changes it. Local.

        Meanwhile one layer's weights are in host memory as they were; behind it they are so again, bit for bit.
        """
        layers = self._layers.get(tensor.data_ptr(), ())
        with ExitStack() as scopes:
            for layer in layers:
                scopes.enter_context(_with_adapters(layer))
            return tensor.detach().to("cpu", copy=True) if layers else tensor


@contextmanager
def merged(model: nn.Module) -> Iterator[Merged]:
    """A scope in which the layers that adapters adapt stand in the adapters' places; behind it all is as before.

    Local. Raises ExportError for adapters that cannot be merged, before anything has changed.
    """
    peft: Any = sys.modules.get("peft")
    if peft is None:
        yield Merged(unwrapped(model), ())
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
            scopes.enter_context(_standing_in(model, name, module.get_base_layer()))
        for name, module in list(model.named_modules()):
            if isinstance(module, peft.utils.ModulesToSaveWrapper):
                names = () if module.disable_adapters else module.active_adapters
                trained = module.modules_to_save[names[0]] if names else module.original_module
                scopes.enter_context(_standing_in(model, name, trained))
        in_force = [module for module in adapted.values() if not (module.merged or module.disable_adapters)]
        yield Merged(unwrapped(model), in_force)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model whose names its files have, inside of others' modules: torch.compile's, peft's, a user's own.

    That of Hugging Face's, or the package's; the module itself where there is none. Raises ExportError where a module
    around it has weights of its own, for which the files have no place.
    """
    found = (each for each in model.named_modules() if is_of_transformers(each[1]) or isinstance(each[1], Transformer))
    name, inner = next(found, ("", model))
    inside = {id(parameter) for parameter in inner.parameters()}
    outside = [weight for weight, parameter in model.named_parameters() if id(parameter) not in inside]
    if outside:
        raise ExportError(
            f"model={type(model).__name__}: {outside[0]} lies outside of {name} ({type(inner).__name__}), whose files "
            "have no place for it; engine.save_16bit_model(folder) writes all weights under the model's own names"
        )
    return inner


def is_of_transformers(module: Any) -> bool:
    """True for a model of Hugging Face's itself, whose weights have the names that its files have."""
    transformers: Any = sys.modules.get("transformers")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def is_adapted(module: nn.Module) -> bool:
    """True for a layer of peft's around a layer of the model."""
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


@contextmanager
def _with_adapters(layer: Any) -> Iterator[None]:
    """A scope in which the adapters' part is in the weights of an adapted layer."""
    base: nn.Module = layer.get_base_layer()
    before = {key: parameter.detach().cpu().clone() for key, parameter in base.named_parameters()}
    layer.merge()
    try:
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
