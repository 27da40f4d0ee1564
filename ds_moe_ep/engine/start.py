"""`initialize`: a thin door in front of `deepspeed.initialize`."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import deepspeed
from torch import nn

from ds_moe_ep.config.knobs import Layout
from ds_moe_ep.config.parallel_keys import refuse_key_alone, refuse_mesh
from ds_moe_ep.config.section import Section, load_ds_config, read_section
from ds_moe_ep.config.training import read_training
from ds_moe_ep.engine import seams
from ds_moe_ep.engine.hooks.attach import extend_engine
from ds_moe_ep.engine.hooks.hook import has_candidates, hook
from ds_moe_ep.engine.hooks.layer import balance_of, traffic_of
from ds_moe_ep.engine.hooks.unconverted import refuse_unconverted
from ds_moe_ep.engine.layer import MoE, moe_layers
from ds_moe_ep.engine.layouts.stages import refuse_in_stages, refuse_unscaled
from ds_moe_ep.engine.own_layers import give_knobs
from ds_moe_ep.errors import ConfigError, EngineError, MoEError


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
       With "meter_every" the engine also gets `moe_ep_meter`, an OverlapMeter, whose figures go there too; with "watch"
       rank 0 writes all of it for `python -m ds_moe_ep watch`.
       A PipelineModule's engine gets all of it but the reports.
    5. With "attach", hooks the MoE layers that DeepSpeed or AutoEP made, as `attach_overlap` does.

    Collective over the world. The other arguments are deepspeed.initialize's. Raises ConfigError, TopologyError or
    EngineError on every rank.
    """
    source = config if config is not None else getattr(args, "deepspeed_config", None)
    if source is None:
        raise ConfigError("config=None: pass config=<path or dict of a ds_config>, or args with deepspeed_config")
    if model is None:
        raise ConfigError("model=None: pass the torch module to train")
    ds_config = load_ds_config(source)
    section = read_section(ds_config)
    own = moe_layers(model)
    # DeepSpeed's engine gives knobs too, later: what cannot work is refused before it starts.
    if isinstance(model, deepspeed.PipelineModule):
        seams.settle(problem_of_stages(model, own, ds_config, section))
    else:
        refuse_model(model, own, ds_config, section, kwargs)
    if args is not None and getattr(args, "deepspeed_config", None) is not None:
        args = copy.copy(args)
        args.deepspeed_config = None  # DeepSpeed takes one of the two; it was read into `config` above
    engine, *others = deepspeed.initialize(args=args, model=model, config=ds_config, **kwargs)
    join(engine, own, section)
    return (engine, *others)


def refuse_model(
    model: nn.Module,
    own: Mapping[str, MoE],
    ds_config: Mapping[str, Any],
    section: Section,
    arguments: Mapping[str, Any],
) -> None:
    """Gives the layers of a plain model the section's knobs, and starts the world. Raises what cannot work there."""
    if not own and not section.moe.attach:
        raise EngineError(
            f"model={type(model).__name__} has no ds_moe_ep.MoE layer: build it with one, hook the MoE layers that it "
            'has ("attach": true in the section), or call deepspeed.initialize for a dense model'
        )
    give_knobs(own, section)
    seams.init_distributed()
    if own:
        refuse_mesh(arguments.get("mesh_param"))
    if arguments.get("mpu") is None:  # with one, the data-parallel world is the caller's to know
        refuse_key_alone(ds_config)
        for layer in own.values():
            read_training(ds_config, layer.ep_size, deepspeed.comm.get_world_size())


def problem_of_stages(
    model: deepspeed.PipelineModule, own: Mapping[str, MoE], ds_config: Mapping[str, Any], section: Section
) -> MoEError | None:
    """Error of what cannot work in this rank's stage of a pipeline, whose layers get the section's knobs. Local."""
    topology = model.topology()
    layout = Layout(pp_size=topology.get_dim("pipe"), tp_size=max(1, topology.get_dim("model")))
    try:
        refuse_in_stages(own, section)
        give_knobs(own, section, layout)
        for layer in own.values():
            refuse_unscaled(read_training(ds_config, layer.ep_size, deepspeed.comm.get_world_size(), layout))
    except MoEError as error:
        return error
    return None


def join(engine: Any, own: Mapping[str, MoE], section: Section) -> None:
    """Hooks what the section says, and gives the engine its extensions. Collective over the world."""
    if section.moe.attach:
        refuse_unconverted(engine.module, seams.ds_config_of(engine))
    balance = {} if own else balance_of(section.moe, section.given)  # with own layers, the section speaks of theirs
    hooked = hook(engine.module, traffic_of(section.moe), balance=balance) if section.moe.attach else {}
    try:
        if not own and not has_candidates(engine.module):
            name = type(engine.module).__name__
            raise EngineError(f"model={name} has no MoE layer; call deepspeed.initialize for a dense model")
        extend_engine(engine, own, hooked, section)
    except BaseException:
        for layer in hooked.values():
            layer.remove()
        raise
