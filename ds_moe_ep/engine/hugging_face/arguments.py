"""Arguments of `from_pretrained` that users of transformers know: what they mean here, or why they mean nothing."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.errors import ConfigError, nearest

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
AUTO = "auto"  # transformers' word for the default: that of config.json, or else of the files
NAMED_HERE = ("dtype", "torch_dtype", "attn_implementation", "config", "data_before_expert")

NO_DOWNLOAD = (
    "a folder on this machine is read and nothing is downloaded; make it with huggingface_hub.snapshot_download("
    "repository, revision=..., token=...) and name it"
)
NO_MAP = "ranks share the experts by ep_size, and the engine moves the model to its device; leave it out"
NO_BITS = "no layer here trains weights of fewer bits; leave it out, and name a folder of plain weights"
NO_OTHER_WEIGHTS = "weights come from the folder's safetensors files; leave it out, and name a folder of those weights"
NO_OTHER_EXPERTS = "the experts are the package's own, whose knobs are those of MoEConfig; leave it out"
REFUSED: Mapping[str, str] = {  # arguments of transformers with the reason, which ends with the way out
    **dict.fromkeys(
        (
            "cache_dir", "code_revision", "force_download", "mirror", "proxies", "resume_download", "revision",
            "subfolder", "token", "use_auth_token",
        ),
        NO_DOWNLOAD,
    ),
    **dict.fromkeys(
        (
            "device_map", "device_mesh", "distributed_config", "max_memory", "offload_buffers", "offload_folder",
            "offload_state_dict", "tp_plan", "tp_size",
        ),
        NO_MAP,
    ),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit", "quantization_config"), NO_BITS),
    **dict.fromkeys(("from_flax", "from_tf", "gguf_file", "key_mapping", "state_dict", "variant"), NO_OTHER_WEIGHTS),
    **dict.fromkeys(("experts_implementation", "fusion_config", "kernel_config", "use_kernels"), NO_OTHER_EXPERTS),
    **dict.fromkeys(
        ("adapter_kwargs", "adapter_name"), "load adapters into the model: peft.PeftModel.from_pretrained(model, ...)"
    ),
    "generation_config": "that of the folder is loaded; set model.generation_config afterwards",
    "ignore_mismatched_sizes": "a tensor of another shape is an error here; leave it out",
    "output_loading_info": "a tensor too few or too many is an error here; leave it out",
}  # fmt: skip
HOLD_ANYWAY = ("local_files_only", "low_cpu_mem_usage", "trust_remote_code", "use_safetensors", "weights_only")


def knobs_among(arguments: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The knobs of MoEConfig among arguments of `from_pretrained`; `config` is the model's configuration.

    Arguments of transformers that ask for nothing (None, False, the revision "main") or hold anyway are left out: many
    programs pass all of them on. Raises ConfigError for one that has no meaning here, and for one that nobody knows.
    """
    known = {field.name for field in dataclasses.fields(MoEConfig)}
    for name, value in arguments.items():
        if name in known or name in HOLD_ANYWAY:
            continue
        if name in REFUSED:
            if value is None or value is False or (name, value) == ("revision", "main"):
                continue
            raise ConfigError(f"from_pretrained({name}={_short(value)}): {REFUSED[name]}")
        if hasattr(config, name):
            raise ConfigError(
                f"from_pretrained({name}={_short(value)}): belongs to config.json, where it is "
                f"{_short(getattr(config, name))}; change it there, or pass config=AutoConfig.from_pretrained(folder, "
                f"{name}={_short(value)})"
            )
        raise ConfigError(
            f"from_pretrained({name}={_short(value)}): no such knob of MoEConfig, nor argument; "
            f"{nearest(name, {*known, *NAMED_HERE}, 'names')}"
        )
    return {name: value for name, value in arguments.items() if name in known}


def asked_dtype(dtype: Any, torch_dtype: Any) -> torch.dtype | None:
    """The type of weights that a caller asks for, by either name; None for that of the folder.

    Raises ConfigError for two that differ, and for what no model computes in.
    """
    asked, named = (_dtype(value, name) for name, value in (("dtype", dtype), ("torch_dtype", torch_dtype)))
    if asked is not None and named not in (None, asked):
        raise ConfigError(
            f"from_pretrained(dtype={dtype!r}, torch_dtype={torch_dtype!r}): two names of one argument; give one"
        )
    return asked or named


def _dtype(value: Any, name: str) -> torch.dtype | None:
    if value is None or (isinstance(value, str) and value == AUTO):
        return None
    if isinstance(value, torch.dtype) and value in DTYPES.values():
        return value
    if isinstance(value, str) and value in DTYPES:
        return DTYPES[value]
    words = nearest(value, {*DTYPES, AUTO}, "types") if isinstance(value, str) else f"choose one of {_all_types()}"
    raise ConfigError(f"from_pretrained({name}={_short(value)}): is no type of weights that train here; {words}")


def _all_types() -> str:
    return f"{', '.join(f'torch.{each}' for each in DTYPES)} or {AUTO!r}"


def dtype_of_folder(config: Any, of_files: Iterable[torch.dtype]) -> torch.dtype:
    """The type that config.json names, or else that of the first weights in the files, as in transformers.

    Raises ConfigError where it is none that trains.
    """
    named = getattr(config, "dtype", None)
    where, found = ("config.dtype", named) if named is not None else ("the files' first weights", None)
    found = found or next((each for each in of_files if each.is_floating_point), torch.float32)
    if found not in DTYPES.values():
        raise ConfigError(f"{where}={found}: no type of weights that train here; pass dtype=, one of {_all_types()}")
    return found


def given_config(config: Any, read: Callable[[], Any]) -> Any:
    """A copy of the configuration that the caller passes, or the one that is read from the folder."""
    if config is None:
        return read()
    if not hasattr(config, "model_type"):
        raise ConfigError(
            f"from_pretrained(config={_short(config)}): no configuration of transformers; pass "
            "AutoConfig.from_pretrained(folder, ...), or leave it out"
        )
    return copy.deepcopy(config)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
