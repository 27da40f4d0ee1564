"""What goes along with an engine: the watch, the meter, whole norms, choices in log and checkpoints, safe saves.

All of it wraps methods of the one engine; `leave` gives the engine its own ones back. The balancing bias needs no
company: it follows the steps of any engine (`own_layers.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.checkpoint.choices import keep_choices
from ds_moe_ep.engine.checkpoint.folders import refuse_incomplete
from ds_moe_ep.engine.checkpoint.load import guard_loading
from ds_moe_ep.engine.checkpoint.model_files import guard_model_files
from ds_moe_ep.engine.checkpoint.save import save_safely
from ds_moe_ep.engine.explain_errors import supervise
from ds_moe_ep.engine.extensions.after_step import after_each_step
from ds_moe_ep.engine.extensions.clipping import clip_by_whole_norm
from ds_moe_ep.engine.extensions.loss_scale import scale_losses
from ds_moe_ep.engine.extensions.nonfinite import tell_skips
from ds_moe_ep.engine.extensions.overlap_meter import OverlapMeter
from ds_moe_ep.engine.extensions.param_groups import refuse_misplaced
from ds_moe_ep.engine.hooks.layer import HookedLayer
from ds_moe_ep.engine.older_engines import mend_older
from ds_moe_ep.engine.overlapped_layer import OverlappedLayer
from ds_moe_ep.engine.own_layers import follow_steps
from ds_moe_ep.errors import EngineError

METHODS = ("forward", "backward", "step", "save_checkpoint", "load_checkpoint")
ATTRIBUTES = ("moe_ep_layers", "moe_ep_meter", "moe_ep_watch")


class Company:
    """The company of one engine and its layers. Every rank makes it; local, but for what the wrapped methods do."""

    def __init__(self, engine: Any, layers: Mapping[str, OverlappedLayer]) -> None:
        refuse_second(engine)
        self._engine = engine
        self._before = {name: vars(engine)[name] for name in METHODS if name in vars(engine)}
        self._undo: list[Callable[[], None]] = []
        try:
            self._join(engine, layers)
        except BaseException:
            self.leave()
            raise

    def _join(self, engine: Any, layers: Mapping[str, OverlappedLayer]) -> None:
        refuse_misplaced(engine)
        config = next(iter(layers.values())).config
        if config.meter_every:
            meter = engine.moe_ep_meter = OverlapMeter(layers, engine.device, config.meter_every)
            self._undo.append(meter.end)
        engine.moe_ep_layers = layers
        made_by_deepspeed = [name for name, layer in layers.items() if isinstance(layer, HookedLayer)]
        self._undo.append(guard_model_files(engine.module, made_by_deepspeed))  # the package's own see to it themselves
        self._undo.append(mend_older(engine))
        self._undo.append(scale_losses(engine))
        self._undo.append(tell_skips(engine))
        self._undo.append(clip_by_whole_norm(engine))
        if any(layer.balance is not None for layer in layers.values()):
            follow_steps(engine, layers)
        after_each_step(engine, layers)
        watch = engine.moe_ep_watch = seams.watch_of_world(config.timeout_s)
        self._undo.append(save_safely(engine, watch))
        numbered = [module for module in engine.module.modules() if seams.is_moe_layer(module)]
        sizes = {layer.ep_size for layer in numbered}
        if len(sizes) == 1:  # of several sizes, files do not tell which layer had which
            guard_loading(engine, *sizes)
        refuse_incomplete(engine, [layer.num_experts for layer in numbered])
        keep_choices(engine, layers)
        supervise(engine, watch)
        self._undo.append(lambda: watch.step_ends(is_done=False))  # a step that nobody ended

    def leave(self) -> None:
        """Gives the engine back the methods that it had; a wrapper that somebody put on later goes with ours."""
        for undo in self._undo:
            undo()
        for name in (*METHODS, *ATTRIBUTES):
            vars(self._engine).pop(name, None)
        vars(self._engine).update(self._before)


def refuse_second(engine: Any) -> None:
    """Raises EngineError for an engine that has its company. Local, alike on all ranks."""
    if "moe_ep_layers" in vars(engine):
        raise EngineError(
            f"engine.moe_ep_layers={list(engine.moe_ep_layers)}: the engine has all that attach_overlap gives, from "
            "ds_moe_ep.initialize or an earlier attach_overlap; leave this one out, or remove() the earlier handle "
            'first (to hook DeepSpeed\'s layers too, give ds_moe_ep.initialize "attach": true)'
        )
