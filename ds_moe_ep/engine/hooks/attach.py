"""`attach_overlap`: all that the package has for an engine or a model that somebody else made.

An engine gets its extensions, its section `"moe_ep"` is read, DeepSpeed's and AutoEP's layers are hooked (`hook.py`),
and the package's own layers, which overlap already, may get other knobs of the traffic. All of it has a way back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any

import deepspeed
from torch import nn

from ds_moe_ep.comm.callbacks import TransferCallback
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.section import SECTION, Section, read_section
from ds_moe_ep.engine import seams
from ds_moe_ep.engine.checkpoint.whole_files import ModelFiles
from ds_moe_ep.engine.extensions.install import extend, refuse_second
from ds_moe_ep.engine.hooks.hook import has_candidates, hook
from ds_moe_ep.engine.hooks.layer import TRAFFIC, HookedLayer, balance_of, traffic_of
from ds_moe_ep.engine.hooks.unconverted import EXPERT_PARALLEL, fix, refuse_unconverted
from ds_moe_ep.engine.layer import MoE, moe_layers
from ds_moe_ep.engine.load.report import open_run_log
from ds_moe_ep.engine.overlapped_layer import OverlappedLayer
from ds_moe_ep.engine.own_layers import with_given_knobs
from ds_moe_ep.errors import ConfigError, EngineError, MoEError, nearest


class OverlapHandle:
    """The layers by name, and the way back. As a context manager it goes back at the end."""

    def __init__(self, layers: Mapping[str, OverlappedLayer], undo: Sequence[Callable[[], None]]) -> None:
        self.layers = dict(layers)
        self._undo = list(undo)
        self._callbacks: list[TransferCallback] = []

    def remove(self) -> None:
        """Makes the model and the engine what they were. Local; between passes. A second call does nothing.

        A wrapper that somebody else put on a method of the engine since then goes with ours.
        """
        for callback in list(self._callbacks):
            self.remove_callback(callback)
        for undo in reversed(self._undo):
            undo()
        self.layers, self._undo = {}, []

    def __enter__(self) -> OverlapHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def add_callback(self, callback: TransferCallback) -> None:
        """Puts a callback around each message of all layers, behind those that are there. Between passes.

        Every rank adds the same ones in the same order.
        """
        for layer in self.layers.values():
            layer.dispatcher.add_callback(callback)
        self._callbacks.append(callback)

    def remove_callback(self, callback: TransferCallback) -> None:
        """Takes a callback away again. Between passes, on every rank."""
        for layer in self.layers.values():
            layer.dispatcher.remove_callback(callback)
        self._callbacks = [each for each in self._callbacks if each is not callback]

    def __str__(self) -> str:
        lines = [f"{name}: {layer.kind}, {_schedule_of(layer)}" for name, layer in self.layers.items()]
        return "\n".join(lines) or "no layer is hooked"


def _schedule_of(layer: OverlappedLayer) -> str:
    return str(layer.choice) if layer.choice is not None else f"schedule {layer.config.schedule!r}"


def attach_overlap(
    engine_or_model: nn.Module,
    config: MoEConfig | Mapping[str, Any] | None = None,
    callbacks: Sequence[TransferCallback] = (),
) -> OverlapHandle:
    """Hides the experts' traffic of layers that exist, in place; parameters and checkpoints stay as they are.

    `engine_or_model` is what deepspeed.initialize returned, or a module that holds the layers, whose groups are made.
    An engine gets the extensions of `ds_moe_ep.initialize` too: the watch, the meter (`meter_every`), safe checkpoints;
    and the section "moe_ep" of its ds_config is in force. The package's own layers of an engine take part.
    `config` says how rows move (`hooked.TRAFFIC`) where it shall be other than the section has it: a MoEConfig, or a
    mapping of such knobs. DeepSpeed's layers with ep_size 1 have no traffic and stay as they are; their engine gets the
    extensions. An expert must map each row by itself, whatever rows stand beside it. `callbacks` act on each message
    that crosses a wire, the same on every rank.

    Collective over the world. Raises EngineError on every rank, with the layers' names, where one cannot be hooked,
    ranks differ or the engine has its extensions, and ConfigError for knobs that are not to be set here.
    """
    if isinstance(engine_or_model, deepspeed.PipelineEngine):
        raise EngineError("engine=PipelineEngine: stages would wait for each other's groups; hook a plain engine")
    if isinstance(engine_or_model, deepspeed.DeepSpeedEngine):
        return _attach_to_engine(engine_or_model, config, callbacks)
    if not has_candidates(engine_or_model):
        own = "its ds_moe_ep.MoE layers overlap as they are, and an engine's extensions need the engine: pass that"
        raise EngineError(own if moe_layers(engine_or_model) else _nothing_to_hook(engine_or_model))
    traffic = traffic_of(MoEConfig()) | given_traffic(config)
    hooked = hook(engine_or_model, traffic, callbacks)
    return OverlapHandle(
        hooked, [*(layer.remove for layer in hooked.values()), ModelFiles(engine_or_model, hooked).close]
    )


def _nothing_to_hook(model: nn.Module) -> str:
    return (
        f"model={type(model).__name__} has no deepspeed.moe.layer.MoE and no AutoEP layer: hook the model that "
        f'deepspeed.initialize returned; where "{EXPERT_PARALLEL}" is enabled AutoEP replaces layers there: '
        f"{fix(model, {})}"
    )


def _attach_to_engine(
    engine: Any, config: MoEConfig | Mapping[str, Any] | None, callbacks: Sequence[TransferCallback]
) -> OverlapHandle:
    refuse_second(engine)
    own = moe_layers(engine.module)
    refuse_unconverted(engine.module, seams.ds_config_of(engine))
    if not own and not has_candidates(engine.module):
        raise EngineError(_nothing_to_hook(engine.module))
    problem: MoEError | None = None
    given, section, knobs = {}, None, {}
    try:
        given, section = given_traffic(config), read_section(seams.ds_config_of(engine))
        knobs = {name: knobs_in_force(layer, section, given) for name, layer in own.items()}
    except ConfigError as error:
        problem = error
    seams.settle(problem)
    assert section is not None
    balance = {} if own else balance_of(section.moe, section.given)  # with own layers, the section speaks of theirs
    hooked = hook(engine.module, traffic_of(section.moe) | given, callbacks, balance)
    undo: list[Callable[[], None]] = [layer.remove for layer in hooked.values()]
    try:
        for name, layer in own.items():
            undo.append(give_knobs_on_the_way(layer, knobs[name], engine))
            for callback in callbacks:
                layer.dispatcher.add_callback(callback)
                undo.append(partial(layer.dispatcher.remove_callback, callback))
        undo.append(extend_engine(engine, own, hooked, section))
    except BaseException:
        OverlapHandle({}, undo).remove()
        raise
    return OverlapHandle({**own, **hooked}, undo)


def extend_engine(
    engine: Any, own: Mapping[str, MoE], hooked: Mapping[str, HookedLayer], section: Section
) -> Callable[[], None]:
    """Installs the extensions of an engine and its layers, and returns what takes them away. Every rank calls it.

    Without layers, where DeepSpeed's have all experts on each rank, it still saves, loads, clips and watches.
    """
    layers: dict[str, OverlappedLayer] = {**own, **hooked}
    if not own:  # with layers of the package, the section speaks of theirs
        check_routing(section, hooked)
    first = next((layer.config for layer in layers.values()), section.moe)
    if not layers:
        first = dataclasses.replace(first, meter_every=0, verify_every=0, watch=None)  # there is nothing to see
    undo = extend(engine, layers, first, open_run_log(engine, layers, first))
    if not layers:
        return undo
    seams.log_rank0(
        f"{len(layers)} MoE layers, {first.num_experts} experts over {first.ep_size} ranks, schedule "
        f"{first.schedule!r} with depth {first.depth}, transport {first.transport!r}"
    )
    return undo


def check_routing(section: Section, hooked: Mapping[str, HookedLayer]) -> None:
    """Raises ConfigError for a knob of the section that a hooked layer's own gate and experts contradict."""
    for name, layer in hooked.items():
        for knob in sorted(section.given - {*TRAFFIC, "attach"}):
            value, actual = getattr(section.moe, knob), getattr(layer.config, knob)
            if value != actual:
                raise ConfigError(
                    f"{SECTION}.{knob}={value!r}: the hooked layer {name} has {actual!r}, which hooks do not change; "
                    "leave the knob out, or change the layer"
                )


def given_traffic(config: MoEConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    """The knobs that `config` gives; all of the traffic where it is a MoEConfig. Raises ConfigError for others."""
    if config is None:
        return {}
    if isinstance(config, MoEConfig):
        return traffic_of(config)
    for name, value in config.items():
        if name not in TRAFFIC:
            raise ConfigError(
                f"attach_overlap: config.{name}={value!r}: not a knob of the traffic, and the layer's own gate and "
                f"experts say all else; {nearest(name, TRAFFIC)}"
            )
    read = MoEConfig.from_dict(config, "attach_overlap: config")
    return {name: getattr(read, name) for name in config}


def knobs_in_force(layer: MoE, section: Section, given: Mapping[str, Any]) -> MoEConfig:
    """A layer's knobs with what the section and `attach_overlap` give it."""
    return dataclasses.replace(with_given_knobs(layer.config, section.moe, section.given), **given)


def give_knobs_on_the_way(layer: MoE, config: MoEConfig, engine: Any) -> Callable[[], None]:
    """Gives a connected layer other knobs, and returns what takes them back (local). Collective over the world."""
    if config == layer.config:
        return lambda: None
    before, dispatcher = layer.config, layer.dispatcher
    transport, torus = dispatcher.bare_transport, dispatcher.torus

    def take_back() -> None:
        layer.configure(before)
        if transport is not None:
            dispatcher.connect(transport, torus)

    layer.configure(config)
    layer.set_deepspeed_parallelism(seams.has_data_before_experts(engine))
    return take_back
