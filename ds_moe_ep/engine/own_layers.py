"""The package's layers in an engine, whoever made it: the section's knobs reach them, their bias follows its steps,
which clip by the norm of all experts.

DeepSpeed calls each layer while it makes an engine, and the first one called brings the engine here. So plain
`deepspeed.initialize`, Trainer and Accelerate are doors like `ds_moe_ep.initialize`. What measures and guards an
engine (`extensions/install.py`) comes with `ds_moe_ep.initialize` and `attach_overlap` alone.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.section import SECTION, Section, read_section
from ds_moe_ep.config.training import WHOLE
from ds_moe_ep.engine import seams, step_seams
from ds_moe_ep.engine.extensions.clipping import clip_by_whole_norm
from ds_moe_ep.engine.extensions.loss_scale import scale_losses
from ds_moe_ep.engine.older_engines import mend_older
from ds_moe_ep.engine.overlapped_layer import OverlappedLayer
from ds_moe_ep.errors import ConfigError

if TYPE_CHECKING:
    from ds_moe_ep.engine.layer import MoE

FOLLOWED = "moe_ep_follows_steps"  # an engine's attribute: its steps move the bias already
OF_THE_COMPANY = ("attach", "meter_every")  # knobs that a layer cannot honour by itself


def meet(engine: Any, layers: Mapping[str, MoE]) -> None:
    """Gives the layers of an engine that is being made its section's knobs, and lets their bias follow its steps.

    Collective over the world at first, local for an engine that was met. Raises ConfigError on every rank for a section
    that cannot work.
    """
    if FOLLOWED in vars(engine):
        return
    problem = None
    try:
        give_knobs(layers, read_section(seams.ds_config_of(engine)))
    except ConfigError as error:
        problem = error
    seams.settle(problem)
    follow_steps(engine, layers)
    step_seams.once_it_has_an_optimizer(engine, partial(make_steps_whole, engine))


def make_steps_whole(engine: Any) -> None:
    """Makes the engine's steps those of one device where DeepSpeed's are not. Local."""
    mend_older(engine)
    scale_losses(engine)
    clip_by_whole_norm(engine)


def give_knobs(layers: Mapping[str, MoE], section: Section) -> None:
    """Gives the layers the knobs that a section names, and their names in the model. Local.

    Raises ConfigError where a knob shapes parameters and the layer was made with another value, and for a layout.
    """
    if section.layout != WHOLE:
        raise ConfigError(
            f"{SECTION}.layout={section.layout.tp_size}x{section.layout.pp_size}: only ds_moe_ep.build_pipeline "
            "makes a model that is cut so; call that, or remove the layout"
        )
    for name, layer in layers.items():
        config = with_given_knobs(layer.config, section.moe, section.given)
        if config != layer.config:
            layer.configure(config, f"{SECTION} ({name})")
        layer.dispatcher.name = name


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


def follow_steps(engine: Any, layers: Mapping[str, OverlappedLayer]) -> None:
    """Lets the balancing bias of the layers move after each step of the engine's optimizer. Local.

    A second call for the same engine does nothing: no bias moves twice.
    """
    if FOLLOWED in vars(engine):
        return
    setattr(engine, FOLLOWED, True)
    untold = [True]

    def end_step(is_applied: bool) -> None:
        if is_applied:
            step_balance(engine, layers)
        else:  # an overflow under loss scaling: a batch that moved no parameter moves no bias
            forget_load(layers)
        if untold:
            untold.clear()
            tell_unheard(engine, layers)

    step_seams.after_model_step(engine, end_step)


def step_balance(engine: Any, layers: Mapping[str, OverlappedLayer]) -> None:
    """Moves the expert bias of every layer that has one. Collective over the ranks that share a batch."""
    for layer in layers.values():
        if layer.balance is not None:
            layer.balance.step(partial(seams.sum_over_batch, engine))


def forget_load(layers: Mapping[str, OverlappedLayer]) -> None:
    """Drops the load since the last step. Local."""
    for layer in layers.values():
        if layer.balance is not None:
            layer.balance.forget()


def tell_unheard(engine: Any, layers: Mapping[str, OverlappedLayer]) -> None:
    """Says which knobs nobody honours in an engine without company."""
    if "moe_ep_layers" in vars(engine):
        return
    unheard = {
        name: value for each in layers.values() for name in OF_THE_COMPANY if (value := getattr(each.config, name))
    }
    for name, value in unheard.items():
        seams.log_rank0(
            f"{SECTION}.{name}={value!r}: deepspeed.initialize alone does not do this; call "
            "ds_moe_ep.attach_overlap(engine) after it, or ds_moe_ep.initialize in its place",
            logging.WARNING,
        )
