"""DeepSeek-V3's routing behind AutoEP, as it is and with each part of it left behind."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch


def sourced() -> dict[str, list[str]]:
    """The problems of the routing, by what the layer lost: its bias, its scale, its groups, the bias's numbers."""
    import deepspeed

    from ds_moe_ep.engine.views.layers import viewed_layers
    from ds_moe_ep.verification.judge_source import source_problems
    from tests.engine.hugging_face.tiny_models import ds_config, make_model

    deepspeed.utils.logger.setLevel(logging.ERROR)
    model = make_model("deepseek_v3")
    source = copy.deepcopy(model)
    config = ds_config(1, {"autoep_size": 2, "preset_model": "deepseek_v3"})
    engine = deepspeed.initialize(model=model, config=config, model_parameters=list(model.parameters()))[0]
    layers = viewed_layers(engine.module)
    router = layers[0].gate

    def problems(given: Any = None) -> list[str]:
        found = source_problems(engine.module, layers, given)
        return [str(each) for each in found if each.status == "problem"]

    told = {"nothing": problems() + problems(source)}
    bias_E = router.e_score_correction_bias
    router.e_score_correction_bias = None
    told["bias"] = problems()
    router.e_score_correction_bias = bias_E
    with torch.no_grad():
        kept_E = bias_E.clone()
        bias_E.zero_()
        told["bias's numbers"] = problems(source)
        bias_E.copy_(kept_E)
    scale, router.route_scale = router.route_scale, 1.0
    told["scale"] = problems()
    router.route_scale = scale
    groups, router.num_expert_groups = router.num_expert_groups, None
    told["groups"] = problems()
    router.num_expert_groups = groups
    return told
