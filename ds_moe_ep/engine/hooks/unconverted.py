"""Blocks of experts that AutoEP left as they were, and the section of the ds_config that names them to it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ds_moe_ep.engine import seams
from ds_moe_ep.errors import EngineError

EXPERT_PARALLEL = "expert_parallel"
# Names of an expert's matrices, as AutoEP calls them (w1 the gate, w2 the way down, w3 the way up)
NAMES = (
    {"expert_w1": "gate_up_proj", "expert_w2": "down_proj"},  # what AutoEP takes without being told
    {"expert_w1": "gate_proj", "expert_w2": "down_proj", "expert_w3": "up_proj"},
    {"expert_w1": "w1", "expert_w2": "w2", "expert_w3": "w3"},
)
COMPARE = (
    "Then compare one forward pass with the unconverted model's: AutoEP routes by the top-k of softmax or sigmoid "
    "scores (score_func, route_norm, score_apply), its block returns one tensor, and its experts are SwiGLU without "
    "biases"
)


@dataclass(frozen=True)
class UnconvertedBlock:
    """A module with experts and a router as its children, as Hugging Face's models have them."""

    name: str
    experts: str
    router: str
    num_experts: int
    matrices: frozenset[str]  # parameters of the stacked experts, or children of one expert


def blocks_of(model: nn.Module) -> list[UnconvertedBlock]:
    """The blocks of experts of a model that are no MoE layer of DeepSpeed's, in the model's order."""
    own = [name for name, module in model.named_modules() if seams.is_moe_layer(module)]
    return [
        block
        for name, module in model.named_modules()
        if not any(name == layer or name.startswith(f"{layer}.") for layer in own)
        for block in _blocks_in(name, module)
    ]


def _blocks_in(name: str, module: nn.Module) -> Iterator[UnconvertedBlock]:
    for child, experts in module.named_children():
        size, matrices = _size_of(experts)
        routers = [other for other, router in module.named_children() if other != child and _routes(router, size)]
        if size > 1 and routers:
            yield UnconvertedBlock(name, child, routers[0], size, matrices)
            return


def _size_of(experts: nn.Module) -> tuple[int, frozenset[str]]:
    """Number of experts in a module, stacked or as a list, and the names of their matrices; 0 where it is none."""
    if isinstance(experts, nn.ModuleList):
        kinds = {type(expert) for expert in experts}
        names = frozenset(name for name, _ in experts[0].named_children()) if len(kinds) == 1 else frozenset[str]()
        return (len(experts) if names else 0), names
    shapes = {name: _shape(parameter) for name, parameter in experts.named_parameters(recurse=False)}
    stacks = {name: shape[0] for name, shape in shapes.items() if len(shape) == 3}
    is_stacked = len(stacks) > 1 and len(set(stacks.values())) == 1
    return (next(iter(stacks.values())) if is_stacked else 0), frozenset(shapes)


def _routes(module: nn.Module, num_experts: int) -> bool:
    """True where a module has a matrix with a row per expert."""
    return any(len(shape) == 2 and shape[0] == num_experts for shape in map(_shape, module.parameters()))


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The whole parameter's shape, which ZeRO-3 keeps aside."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def refuse_unconverted(model: nn.Module, ds_config: Mapping[str, Any]) -> None:
    """Raises EngineError where AutoEP is on and left blocks of experts as they were, with what names them to it.

    A `moe_layer_pattern` in the section says which blocks it is to convert: others are left on purpose. Local, the same
    on every rank.
    """
    section = ds_config.get(EXPERT_PARALLEL)
    if not isinstance(section, Mapping) or not section.get("enabled"):
        return
    converted = [name for name, module in model.named_modules() if seams.is_autoep_layer(module)]
    left = blocks_of(model)
    if not converted:
        raise EngineError(
            f"{EXPERT_PARALLEL}.enabled=true: AutoEP converted no layer of {_title(model)}; {fix(model, section)}"
        )
    if left and not section.get("moe_layer_pattern"):
        raise EngineError(
            f"{EXPERT_PARALLEL}.enabled=true: AutoEP converted {len(converted)} layers of {_title(model)} and left "
            f"{_few(block.name for block in left)} as they were: set moe_layer_pattern to "
            f"{json.dumps(pattern_of([*converted, *(block.name for block in left)]))} for all of them, or to "
            f"{json.dumps(pattern_of(converted))} to leave those whole on every rank"
        )


def fix(model: nn.Module, section: Mapping[str, Any]) -> str:
    """The settings with which AutoEP converts the blocks of experts of a model, in words."""
    if not seams.has("AutoEP"):
        since = seams.LATER["AutoEP"].since
        return (
            f"DeepSpeed {seams.release()} has no AutoEP: pip install 'deepspeed>={since}', or build the model with "
            "ds_moe_ep.MoE"
        )
    presets = f"the family with preset_model (one of {', '.join(seams.autoep_presets())})"
    blocks = blocks_of(model)
    if not blocks:
        return (
            "no module in it has experts and a router as children: name its layers with moe_layer_pattern, "
            f"router_pattern and expert_pattern, or {presets}"
        )
    first = blocks[0]
    alike = [block for block in blocks if (block.experts, block.router) == (first.experts, first.router)]
    wanted = json.dumps(
        {EXPERT_PARALLEL: {**section, "enabled": True, **options_of(alike, getattr(model, "config", None))}}
    )
    extra = sorted(name for name in first.matrices if name.endswith("bias"))
    warning = f" Its experts have {' and '.join(extra)}, which AutoEP leaves out." if extra else ""
    return f"name {_few(block.name for block in alike)} to it with {wanted[1:-1]}, or {presets}.{warning} {COMPARE}"


def options_of(blocks: Sequence[UnconvertedBlock], config: Any) -> dict[str, str]:
    """The options of the section "expert_parallel" that name these blocks, but for those that AutoEP takes anyway."""
    first = blocks[0]
    options = {"moe_layer_pattern": pattern_of([block.name for block in blocks])}
    if first.router != "gate":
        options["router_pattern"] = first.router
    if first.experts != "experts":
        options["expert_pattern"] = first.experts
    options |= next((names for names in NAMES[1:] if first.matrices >= set(names.values())), {})
    numbers = {name: value for name, value in vars(_text(config)).items() if isinstance(value, int)} if config else {}
    if numbers.get("num_local_experts", first.num_experts) != first.num_experts:
        named = [name for name, value in numbers.items() if "expert" in name and value == first.num_experts]
        options |= {"num_experts_attr": named[0]} if named else {}
    if "num_experts_per_tok" not in numbers:
        named = [name for name in numbers if "per_tok" in name or "top_k" in name or "topk" in name]
        options |= {"top_k_attr": named[0]} if named else {}
    return options


def pattern_of(names: Sequence[str]) -> str:
    """A regular expression that matches these names whole, and those that differ in their numbers alone."""
    return "|".join(dict.fromkeys(re.sub(r"\d+", r"\\d+", re.escape(name)) for name in names))


def _text(config: Any) -> Any:
    """The part of a Hugging Face configuration that speaks of the language model."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _title(model: nn.Module) -> str:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return f"{type(model).__name__} (model_type {kind!r})" if kind else type(model).__name__


def _few(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")
