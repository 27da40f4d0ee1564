"""Installs what goes along with an engine: watch, meter, whole norms, choices in log and checkpoints, safe saves.

`extend` installs the callbacks; what it returns takes them away. `prepare_steps` installs what the package's own layers
need of any engine, whoever makes it (`own_layers.py`); those stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.engine import seams, step_seams
from ds_moe_ep.engine.checkpoint.choices import ChoiceKeeper, SavedChoices
from ds_moe_ep.engine.checkpoint.folders import IncompleteCheckpoints
from ds_moe_ep.engine.checkpoint.load import SavedEpSize
from ds_moe_ep.engine.checkpoint.loading.frozen import FrozenExperts
from ds_moe_ep.engine.checkpoint.loading.mapped import MappedFiles
from ds_moe_ep.engine.checkpoint.loading.random_states import RandomStates
from ds_moe_ep.engine.checkpoint.loading.stacked import StackedExperts
from ds_moe_ep.engine.checkpoint.preflight import Preflight
from ds_moe_ep.engine.checkpoint.save import FinishedSaves, SafeSaver, saves_safely
from ds_moe_ep.engine.checkpoint.whole_files import ModelFiles
from ds_moe_ep.engine.explain_errors import Supervision
from ds_moe_ep.engine.extensions.balance_steps import BalanceSteps
from ds_moe_ep.engine.extensions.callback import EngineCallback
from ds_moe_ep.engine.extensions.clipping import GradientClipping, WrapperClipping, clipping_for
from ds_moe_ep.engine.extensions.engine_extensions import EngineExtensions
from ds_moe_ep.engine.extensions.loss_scale import LossScale
from ds_moe_ep.engine.extensions.nonfinite import SkippedSteps
from ds_moe_ep.engine.extensions.overlap_meter import OverlapMeter
from ds_moe_ep.engine.extensions.param_groups import refuse_misplaced
from ds_moe_ep.engine.extensions.replica_windows import ReplicaWindows
from ds_moe_ep.engine.extensions.reports import MeterReport
from ds_moe_ep.engine.hooks.layer import HookedLayer
from ds_moe_ep.engine.layouts.expert_files import ExpertFiles
from ds_moe_ep.engine.layouts.sequence import ExpertGradients
from ds_moe_ep.engine.load.report import LoadReport, steps_between_reports
from ds_moe_ep.engine.older_engines import OlderEngine
from ds_moe_ep.engine.overlapped_layer import OverlappedLayer
from ds_moe_ep.engine.shadow.shadow import Shadow
from ds_moe_ep.engine.views.layers import viewed_layers
from ds_moe_ep.errors import ConfigError, EngineError
from ds_moe_ep.live.run_log import RunLog

ATTRIBUTES = ("moe_ep_layers", "moe_ep_meter", "moe_ep_watch", "moe_ep_shadow")  # of an engine that is extended


def extend(
    engine: Any, layers: Mapping[str, OverlappedLayer], config: MoEConfig, log: RunLog | None = None
) -> Callable[[], None]:
    """Installs all that goes along with an engine and its layers. Every rank calls it; local.

    `config` are the knobs in force, of the first layer where there is one. `log` is rank 0's, of `"watch"`. Returns
    what makes the engine what it was. Raises EngineError where the engine is extended already.
    """
    refuse_second(engine)
    refuse_misplaced(engine)
    callbacks: list[EngineCallback] = []

    def undo() -> None:
        EngineExtensions.of(engine).uninstall(callbacks)
        for name in ATTRIBUTES:
            vars(engine).pop(name, None)

    try:
        for callback in _callbacks(
            engine, layers, config, log
        ):  # one by one: those that exist are closed where a later one fails
            callbacks.append(callback)
        EngineExtensions.of(engine).install(callbacks)
    except BaseException:
        undo()
        raise
    engine.moe_ep_layers = layers
    return undo


def _callbacks(
    engine: Any, layers: Mapping[str, OverlappedLayer], config: MoEConfig, log: RunLog | None
) -> Iterator[EngineCallback]:
    """The callbacks that this engine needs and does not have. Their order is `order.ORDER`, and not this one."""
    if config.meter_every:
        engine.moe_ep_meter = OverlapMeter(layers, engine.device, config.meter_every)
        yield MeterReport(engine, engine.moe_ep_meter)
    made_by_deepspeed = [name for name, layer in layers.items() if isinstance(layer, HookedLayer)]
    yield ModelFiles(engine.module, made_by_deepspeed)  # the package's own see to it themselves
    yield from _step_callbacks(engine)
    if hasattr(engine.optimizer, "overflow"):
        yield SkippedSteps(engine)
    has_bias = any(layer.balance is not None for layer in layers.values())
    if has_bias and not EngineExtensions.of(engine).has(BalanceSteps):
        yield BalanceSteps(engine, layers)
    if ReplicaWindows.is_needed(layers) and not EngineExtensions.of(engine).has(ReplicaWindows):
        yield ReplicaWindows(engine, layers)
    if layers and (every := steps_between_reports(engine, config)):
        yield LoadReport(engine, layers, every, log, getattr(engine, "moe_ep_meter", None))
    if config.verify_every:
        shadowed = [layer for layer in viewed_layers(engine.module) if layer.name in layers]
        engine.moe_ep_shadow = Shadow(engine, shadowed, config.verify_every)
        yield engine.moe_ep_shadow
    watch = engine.moe_ep_watch = seams.watch_of_world(config.timeout_s)
    if saves_safely(engine):
        saver = SafeSaver(engine, watch, config.async_save)
        yield saver
        yield FinishedSaves(saver)
    elif config.async_save:
        raise ConfigError("moe_ep.async_save=true: this engine saves in a way of its own; set it to false")
    numbered = [module for module in engine.module.modules() if seams.is_moe_layer(module)]
    sizes = {layer.ep_size for layer in numbered}
    if ExpertFiles.is_needed():
        yield ExpertFiles(sizes)
    if len(sizes) == 1:  # of several sizes, files do not tell which layer had which
        yield SavedEpSize(engine, *sizes)
    yield IncompleteCheckpoints(engine, [layer.num_experts for layer in numbered])
    yield Preflight(engine, sizes, config.check_crc)
    yield MappedFiles(engine)
    if any(seams.is_autoep_layer(module) for module in numbered):
        yield StackedExperts(engine)
    yield FrozenExperts(engine)
    yield RandomStates(engine, sizes)
    yield ChoiceKeeper(layers, engine.module)
    yield SavedChoices(layers)
    yield Supervision(engine, watch)


def prepare_steps(engine: Any) -> None:
    """Makes the engine's steps those of one device where DeepSpeed's are not. Local."""
    EngineExtensions.of(engine).install(_step_callbacks(engine))


def _step_callbacks(engine: Any) -> Iterator[EngineCallback]:
    present = EngineExtensions.of(engine)
    if OlderEngine.is_needed(engine) and not present.has(OlderEngine):
        yield OlderEngine(engine)
    if ExpertGradients.is_needed() and not present.has(ExpertGradients):
        yield ExpertGradients(engine)
    if not step_seams.scales_loss(engine) and not present.has(LossScale):
        yield LossScale(engine)
    if not present.has(GradientClipping) and not present.has(WrapperClipping):
        clipping = clipping_for(engine)
        if clipping is not None:
            yield clipping


def refuse_second(engine: Any) -> None:
    """Raises EngineError for an engine that is extended already. Local, alike on all ranks."""
    if "moe_ep_layers" in vars(engine):
        raise EngineError(
            f"engine.moe_ep_layers={list(engine.moe_ep_layers)}: the engine has all that attach_overlap gives, from "
            "ds_moe_ep.initialize or an earlier attach_overlap; leave this one out, or remove() the earlier handle "
            'first (to hook DeepSpeed\'s layers too, give ds_moe_ep.initialize "attach": true)'
        )
