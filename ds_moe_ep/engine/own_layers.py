"""The package's layers in an engine, whoever made it: the section's knobs reach them, their bias follows its steps,
which clip by the norm of all experts.

DeepSpeed calls each layer while it makes an engine, and the first one called brings the engine here. So plain
`deepspeed.initialize`, Trainer and Accelerate are doors like `ds_moe_ep.initialize`. What measures and guards an
engine (`extensions/install.py`) comes with `ds_moe_ep.initialize` and `attach_overlap` alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

from ds_moe_ep.config.knobs import Layout, MoEConfig
from ds_moe_ep.config.section import SECTION, Section, read_section
from ds_moe_ep.config.training import WHOLE
from ds_moe_ep.engine import seams, step_seams
from ds_moe_ep.engine.extensions.balance_steps import BalanceSteps
from ds_moe_ep.engine.extensions.engine_extensions import EngineExtensions
from ds_moe_ep.engine.extensions.install import prepare_steps
from ds_moe_ep.engine.extensions.replica_windows import ReplicaWindows
from ds_moe_ep.engine.layouts.stages import meet_stages, stage_name, wait_for_all
from ds_moe_ep.engine.overlapped_layer import OwnLayer
from ds_moe_ep.errors import ConfigError


def meet(engine: Any, layers: Mapping[str, OwnLayer]) -> None:
    """Gives the layers of an engine that is being made its section's knobs, and lets their bias follow its steps.

    In a pipeline it also makes the groups of all stages. Collective over the world at first, local for an engine that
    was met. Raises ConfigError on every rank for a section that cannot work.
    """
    if EngineExtensions.of(engine).has(BalanceSteps):
        return
    problem, is_pipeline = None, seams.num_pipeline_stages() > 1
    try:
        give_knobs(layers, read_section(seams.ds_config_of(engine)), getattr(engine.module, "layout", WHOLE))
    except ConfigError as error:
        problem = error
    if isinstance(getattr(engine.module, "layout", None), Layout) and seams.has_data_before_experts(engine):
        problem = problem or ConfigError(
            f"use_data_before_expert_parallelism=true with {SECTION}.layout: build_pipeline gives experts their first "
            "values in groups of consecutive ranks; remove it"
        )
    if is_pipeline:
        wait_for_all(max(layer.config.timeout_s for layer in layers.values()))
    seams.settle(problem)
    if is_pipeline:
        meet_stages(engine, layers)
    windows = [ReplicaWindows(engine, layers)] if ReplicaWindows.is_needed(layers) else []
    EngineExtensions.of(engine).install([BalanceSteps(engine, layers), *windows])
    step_seams.once_it_has_an_optimizer(engine, partial(prepare_steps, engine))


def give_knobs(layers: Mapping[str, OwnLayer], section: Section, layout: Layout = WHOLE) -> None:
    """Gives the layers the knobs that a section names, and their names in the model, which is cut in `layout`. Local.

    Raises ConfigError where a knob shapes parameters and the layer was made with another value, and for a layout that
    the model is not cut in.
    """
    if section.layout not in (WHOLE, layout):
        raise ConfigError(
            f"{SECTION}.layout={section.layout.tp_size}x{section.layout.pp_size}: only ds_moe_ep.build_pipeline "
            "makes a model that is cut so; call that, or remove the layout"
        )
    for name, layer in layers.items():
        config = with_given_knobs(layer.config, section.moe, section.given)
        if config != layer.config:
            layer.configure(config, f"{SECTION} ({name})")
        layer.dispatcher.rename(stage_name(name))


def with_given_knobs(config: MoEConfig, section: MoEConfig, given: frozenset[str]) -> MoEConfig:
    """`config` with the knobs that a ds_config's section names.

    A top_k that the section changes takes with it what only the old one allowed and the section does not name.
    """
    changes = {name: getattr(section, name) for name in given}
    top_k = changes.get("top_k", config.top_k)
    if config.drop_policy == "random" and top_k != 1:
        changes.setdefault("drop_policy", "position" if top_k == 2 else "score")
    if config.sample_second and top_k != 2:
        changes.setdefault("sample_second", False)
    return dataclasses.replace(config, **changes)
