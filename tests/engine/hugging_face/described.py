"""Folders described as those of the hub: older keys of config.json, unknown ones, settings of generation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

YARN = {"type": "yarn", "factor": 4, "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 16}
AS_ON_THE_HUB: dict[str, Any] = {  # keys as older releases of transformers write them, and some that nobody knows
    "torch_dtype": "float32", "transformers_version": "4.40.0", "rope_theta": 20000.0, "pretraining_tp": 1,
    "router_aux_loss_coef": 0.0123, "output_router_logits": True, "of_their_own": {"a": [1, 2]},
}  # fmt: skip
OF_FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"rope_scaling": YARN, "auto_map": {"AutoConfig": "configuration_deepseek.Config"}, "seq_aux": True},
    "deepseek_v2": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}, "aux_loss_alpha": 0.001},
    "glm4_moe": {"partial_rotary_factor": 0.5, "rope_scaling": None},
    "qwen3_moe": {"max_window_layers": 48, "rope_scaling": None},
}
GENERATION = {"eos_token_id": [3, 5], "temperature": 0.6, "top_p": 0.9}  # as some folders have it: do_sample is missing


def as_on_the_hub(folder: Path, family: str) -> dict[str, Any]:
    """Describes a folder as those of the hub are; the content of its config.json."""
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    for name in ("rope_parameters", "dtype"):
        del values[name]
    values |= AS_ON_THE_HUB | OF_FAMILIES.get(family, {})
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return values


def differences(values: dict[str, Any], folder: Path) -> dict[str, tuple[Any, Any]]:
    """Keys of a source's config.json that an export lacks or has otherwise, with both values."""
    found = json.loads((folder / "config.json").read_text())
    return {name: (value, found.get(name)) for name, value in values.items() if found.get(name, ...) != value}
