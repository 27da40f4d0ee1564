"""`initialize`: a thin door in front of `deepspeed.initialize`."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import deepspeed
from torch import nn

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.after_step import after_each_step
from ds_moe_ep.engine.checkpoint import guard_loading
from ds_moe_ep.engine.choices import keep_choices
from ds_moe_ep.engine.layer import MoE, with_given_knobs
from ds_moe_ep.engine.meter import OverlapMeter
from ds_moe_ep.errors import ConfigError, EngineError
from ds_moe_ep.section import SECTION, load_ds_config, read_section
from ds_moe_ep.training import read_training


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Any, Any, Any, Any]:
    """(engine, optimizer, dataloader, lr scheduler), as deepspeed.initialize returns them.

    1. Reads the section "moe_ep" of the ds_config (`config`, or `args.deepspeed_config`) and refuses what cannot work.
    2. Gives its knobs to the MoE layers of `model`; knobs that it does not name stay as the layers were made.
    3. Calls deepspeed.initialize, which makes the groups and connects the layers.
    4. After each optimizer step, moves the balancing bias and reports the experts' load to the engine's monitor.
       What the schedule "auto" chose is told in the log and kept in checkpoints; `engine.moe_ep_layers` has the layers.
       With "meter_every" the engine also gets `moe_ep_meter`, an OverlapMeter, whose figures go there too.

    Collective over the world. The other arguments are deepspeed.initialize's. Raises ConfigError, TopologyError or
    EngineError on every rank.
    """
    source = config if config is not None else getattr(args, "deepspeed_config", None)
    if source is None:
        raise ConfigError("config=None: pass config=<path or dict of a ds_config>, or args with deepspeed_config")
    if model is None:
        raise ConfigError("model=None: pass the torch module to train")
    if isinstance(model, deepspeed.PipelineModule):
        raise EngineError(
            "model=PipelineModule: expert parallelism does not run in pipeline stages; pass a plain module"
        )
    ds_config = load_ds_config(source)
    section = read_section(ds_config)
    layers = moe_layers(model)
    if not layers:
        raise EngineError(
            f"model={type(model).__name__} has no ds_moe_ep.MoE layer: build it with one, or call "
            "deepspeed.initialize for a dense model"
        )
    for name, layer in layers.items():
        layer.configure(with_given_knobs(layer.config, section.moe, section.given), f"{SECTION} ({name})")
        layer.deepspeed_moe.dispatcher.name = name
    seams.init_distributed()
    if kwargs.get("mpu") is None:  # with one, the data-parallel world is the caller's to know
        for layer in layers.values():
            read_training(ds_config, layer.ep_size, deepspeed.comm.get_world_size())
    if args is not None and getattr(args, "deepspeed_config", None) is not None:
        args = copy.copy(args)
        args.deepspeed_config = None  # DeepSpeed takes one of the two; it was read into `config` above
    engine, *others = deepspeed.initialize(args=args, model=model, config=ds_config, **kwargs)
    first = next(iter(layers.values()))
    if first.config.meter_every:
        engine.moe_ep_meter = OverlapMeter(layers, engine.device, first.config.meter_every)
    engine.moe_ep_layers = layers
    after_each_step(engine, layers)
    guard_loading(engine, max(layer.ep_size for layer in layers.values()))
    keep_choices(engine, layers)
    seams.say(
        f"{len(layers)} MoE layers, {first.num_experts} experts over {first.ep_size} ranks, schedule "
        f"{first.config.schedule!r} with depth {first.config.depth}, transport {first.config.transport!r}"
    )
    return (engine, *others)


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """The package's MoE layers in a model, by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
