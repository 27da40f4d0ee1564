"""Frozen weights of experts, as adapters leave them, while DeepSpeed loads a checkpoint of ZeRO-2.

Beside all weights such a checkpoint has the frozen ones once more, as its first rank had them, and DeepSpeed copies
these over what it has loaded: every rank would get the first rank's experts, under any ep_size. Here each rank keeps
those that it has read from the experts' own files.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ds_moe_ep.engine import seams
from ds_moe_ep.engine.extensions.callback import EngineCallback, LoadCall

LOAD_MODULE, FRAGMENTS = "load_module_state_dict", "frozen_param_fragments"  # of the engine, and of a checkpoint


class FrozenExperts(EngineCallback):
    """Lets a rank keep the frozen weights of its own experts when a checkpoint is loaded. Local."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def around_load(self, load: LoadCall, proceed: Callable[[LoadCall], Any]) -> Any:
        own = vars(self._engine)
        load_module, before = getattr(self._engine, LOAD_MODULE), own.get(LOAD_MODULE)

        @functools.wraps(load_module)
        def load_own(checkpoint: Any, *args: Any, **kwargs: Any) -> Any:
            if checkpoint.get(FRAGMENTS) is not None:
                fragments = {**checkpoint[FRAGMENTS], **self._frozen(checkpoint["module"])}
                checkpoint = {**checkpoint, FRAGMENTS: fragments}
            return load_module(checkpoint, *args, **kwargs)

        own[LOAD_MODULE] = load_own
        try:
            return proceed(load)
        finally:
            del own[LOAD_MODULE]
            if before is not None:
                own[LOAD_MODULE] = before

    def _frozen(self, read: dict[str, Any]) -> dict[str, Tensor]:
        """The frozen weights of this rank's experts among those that were read."""
        return {
            name: read[name]
            for name, parameter in self._engine.module.named_parameters()
            if name in read and not parameter.requires_grad and seams.is_expert_parameter(parameter)
        }
