"""Descriptions that a folder has beside its weights: what an export takes over from the folder that a model came from.

transformers reads older keys of config.json (rope_theta, rope_scaling, torch_dtype) into newer ones, and writes these
alone. Readers of the older ones go on where an export has both, and where both say the same.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ds_moe_ep.engine.hugging_face.blocks import MoEBlock
from ds_moe_ep.errors import EngineError

CONFIG, GENERATION = "config.json", "generation_config.json"
ROUTER_LOGITS = "output_router_logits"
CODE = "auto_map"  # names code that lay beside the source's weights; the families' own is in transformers
KEPT = "ds_moe_ep_source"  # of a model: the content of its source's config.json
OF_A_RUN = frozenset(  # what a run or an export changes, of which no older key speaks
    ("architectures", "dtype", "transformers_version", "_name_or_path", "use_cache", ROUTER_LOGITS, CODE)
)


def take_description(model: nn.Module, folder: Path) -> None:
    """Gives a model the generation settings of its folder, and notes its configuration for an export.

    The loss of transformers over the routers' logits is left out: it would read those of blocks that are gone.
    """
    from transformers import GenerationConfig

    described: Any = model
    setattr(model, KEPT, json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    if getattr(described.config, ROUTER_LOGITS, False):
        described.config.output_router_logits = False
    if (folder / GENERATION).is_file():
        try:
            described.generation_config = GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError, TypeError) as error:
            raise EngineError(f"{folder / GENERATION}: cannot be read ({error}); mend or remove it") from error


def complete(model: nn.Module, folder: Path) -> None:
    """Gives the config.json of a folder, as transformers has written it, what else the model's source says there.

    An older key is taken over where it changes nothing: the model's configuration is still the source's, but for what
    a run changes, and with the key it is read as without it.
    """
    described: Any = model
    path = folder / CONFIG
    written = json.loads(path.read_text(encoding="utf-8"))
    written.pop(CODE, None)
    source = _source_of(model)
    if source.get("model_type") == written.get("model_type"):
        if ROUTER_LOGITS in source and any(isinstance(module, MoEBlock) for module in model.modules()):
            written[ROUTER_LOGITS] = source[ROUTER_LOGITS]  # which the blocks have switched off
        written = _with_older_keys(written, source, type(described.config))
    path.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        generation.to_json_file(folder / GENERATION)


def _source_of(model: nn.Module) -> Mapping[str, Any]:
    """The content of the config.json that a model came from; nothing where it is not known."""
    described: Any = model
    found, name = getattr(model, KEPT, None), getattr(described.config, "_name_or_path", None)
    try:
        found = found or (json.loads((Path(name) / CONFIG).read_text(encoding="utf-8")) if name else {})
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, Mapping) else {}


def _with_older_keys(written: dict[str, Any], source: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    now, before = _as_read(written, kind), _as_read(source, kind)
    changed = {name for name in now.keys() | before.keys() if now.get(name) != before.get(name)}
    if changed - OF_A_RUN:
        return written
    found = dict(written)
    for name, value in source.items():
        if name in found or name == CODE:
            continue
        more = found | {name: written["dtype"] if name == "torch_dtype" else value}
        if {key: each for key, each in _as_read(more, kind).items() if key != name} == now:
            found = more
    return found


def _as_read(values: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """A configuration as transformers reads it; nothing where it refuses to."""
    try:
        found: dict[str, Any] = kind.from_dict(copy.deepcopy(dict(values))).to_dict()
    except (TypeError, ValueError, KeyError, AttributeError):
        return {}
    return found
