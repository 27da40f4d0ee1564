"""Experts' parameters among dense ones, which ZeRO would share over ranks that hold other experts."""

from __future__ import annotations

from typing import Any

from ds_moe_ep.engine import seams, step_seams
from ds_moe_ep.errors import ConfigError


def refuse_misplaced(engine: Any) -> None:
    """Raises ConfigError where a parameter of an expert lies in an optimizer group that is not marked "moe".

    Without ZeRO a parameter's own marks decide, and groups do not matter. Local; every rank has the same groups.
    """
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    for parameters, is_expert_group in step_seams.zero_groups(engine.optimizer):
        odd = [] if is_expert_group else [names.get(id(p), "?") for p in parameters if seams.is_expert_parameter(p)]
        if odd:
            raise ConfigError(
                f"optimizer: {len(odd)} parameters of experts lie in a group without 'moe': True ({odd[0]}), which "
                "ZeRO shares over ranks that hold other experts; sort the parameters with DeepSpeed's "
                "split_params_into_different_moe_groups_for_optimizer after the last of them was added (adapters: call "
                "the layer's mark_experts() before)"
            )
