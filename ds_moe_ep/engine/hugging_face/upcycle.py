"""A dense Hugging Face folder as one of a mixture of experts: every expert starts as the dense feed-forward.

With the k weights divided by their sum the mixture of equal experts is the dense model: logits are equal at the start
(sparse upcycling, arXiv 2212.05055). Noise on the experts lets them part sooner, and moves the logits.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.engine.hugging_face.checked_files import Made, TensorForm
from ds_moe_ep.engine.hugging_face.export import SHARD_BYTES, cut, write_index, write_shards
from ds_moe_ep.engine.hugging_face.families import FAMILIES, PROJECTIONS, Family
from ds_moe_ep.engine.hugging_face.load import Weights
from ds_moe_ep.errors import ConfigError, EngineError, nearest

ROUTER_STD = 0.02  # small: every expert is about as likely at the start
DENSE = dict(zip(PROJECTIONS, ("gate_proj", "up_proj", "down_proj"), strict=True))

# A dense family, the family of its mixture, and the configuration that only the mixture has.
MIXTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("mixtral", "MixtralForCausalLM", {"sliding_window": None}),
    "mistral": ("mixtral", "MixtralForCausalLM", {}),
    "qwen3": ("qwen3_moe", "Qwen3MoeForCausalLM", {"norm_topk_prob": True, "decoder_sparse_step": 1}),
}
CAUSAL = "ForCausalLM"
BESIDE_WEIGHTS = (  # what goes along as it is
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def upcycle(
    dense: str | os.PathLike[str],
    target: str | os.PathLike[str],
    num_experts: int,
    top_k: int = 2,
    *,
    noise: float = 0.0,
    seed: int = 0,
    max_shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Writes the dense Hugging Face folder `dense` as a mixture of experts to the new folder `target`; returns that.

    Each of `num_experts` experts is a copy of its layer's feed-forward, with normal noise of `noise` times a matrix's
    standard deviation; routers are drawn from `seed`. Llama and Mistral become Mixtral, Qwen3 becomes Qwen3-MoE.
    Local, without a process group; one tensor is in memory at a time, beside the one that it is a copy of. Raises
    ConfigError for numbers that cannot work and models that have no such mixture, EngineError where files are not whole
    or cannot be written; then nothing is left behind.
    """
    source, target = Path(dense), Path(target).absolute()
    building = target.with_name(target.name + ".part")
    for name, wrong, rule in (
        ("num_experts", num_experts < 1, "a mixture has one expert or more"),
        ("top_k", not 1 <= top_k <= num_experts, f"a token visits 1 to num_experts={num_experts} experts"),
        ("noise", not noise >= 0, "a share of a standard deviation is 0 or more"),
        ("max_shard_bytes", max_shard_bytes < 1, "a shard holds one byte or more"),
    ):
        if wrong:
            raise ConfigError(f"{name}={locals()[name]}: {rule}; choose another")
    for path in (target, building):
        if path.exists():
            raise EngineError(f"{path}: exists, and nothing is overwritten; remove it or name another folder")
    config = mixture_config(source, num_experts, top_k)
    family = FAMILIES[config["model_type"]]
    with Weights(source) as weights:
        try:
            building.mkdir(parents=True)
            _write(
                _tensors(weights, family, num_experts, noise, seed, _router_shape(config)), building, max_shard_bytes
            )
            (building / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for name in BESIDE_WEIGHTS:
                if (source / name).is_file():
                    shutil.copy(source / name, building / name)
            building.rename(target)
        except OSError as error:
            shutil.rmtree(building, ignore_errors=True)
            raise EngineError(f"{target}: cannot be written ({error}); name another folder") from error
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
    return target


def mixture_config(source: Path, num_experts: int, top_k: int) -> dict[str, Any]:
    """The configuration of the mixture, from that of the dense folder. Raises ConfigError where there is none.

    It names every value: what the dense folder leaves out is another one in the mixture's family.
    """
    config, layers = _dense_config(source)
    model_type = str(config["model_type"])
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key) and model_type == "llama":
            raise ConfigError(f"config.{key}=true: Mixtral has no such biases; take a model without them")
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"config.hidden_act={config['hidden_act']!r}: experts of the mixture compute silu")
    if len(set(layers)) > 1:
        raise ConfigError(
            f"config.layer_types={layers}: layers of the mixture are alike, all with a sliding window or none; take a "
            "model whose layers are (use_sliding_window=false, or max_window_layers=0)"
        )
    mixture, architecture, own = MIXTURES[model_type]
    family = FAMILIES[mixture]
    return {
        **config,
        **own,
        "model_type": mixture,
        "architectures": [architecture],
        family.num_experts: num_experts,
        "num_experts_per_tok": top_k,
        family.expert_width: config["intermediate_size"],
        "output_router_logits": False,
    }


def _dense_config(source: Path) -> tuple[dict[str, Any], list[str]]:
    """All values of a dense folder's configuration, and the kinds of attention of its layers, if it has several.

    Raises EngineError where it cannot be read, ConfigError where its weights are not those of a dense language model.
    """
    path = source / "config.json"
    try:
        given: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"{path}: cannot be read ({error}); name a Hugging Face folder") from None
    model_type = str(given.get("model_type"))
    if model_type not in MIXTURES:
        raise ConfigError(
            f"config.model_type={model_type!r}: has no mixture to become; {nearest(model_type, MIXTURES, 'families')}"
        )
    if given.get("quantization_config"):
        raise ConfigError("config.quantization_config: the files hold weights of fewer bits; take plain ones")
    names = given.get("architectures") or []
    if names and not any(name.endswith(CAUSAL) for name in names):
        raise ConfigError(f"config.architectures={names}: a mixture is a causal language model; take the folder of one")
    from transformers import AutoConfig

    config = {key: value for key, value in AutoConfig.from_pretrained(source).to_dict().items() if key[0] != "_"}
    layers = list(config.pop("layer_types", None) or [])
    if set(layers) == {"full_attention"}:
        config |= {"use_sliding_window": False, "sliding_window": None}
    return config, layers


def _router_shape(config: dict[str, Any]) -> tuple[int, int]:
    return int(config[FAMILIES[config["model_type"]].num_experts]), int(config["hidden_size"])


def _tensors(
    weights: Weights, family: Family, num_experts: int, noise: float, seed: int, router_shape: tuple[int, int]
) -> Iterator[tuple[str, Made]]:
    """Every tensor of the mixture: a layer's feed-forward becomes its router and experts, the rest stays."""
    read = lru_cache(maxsize=1)(weights.read)  # of a matrix and its experts, which follow each other
    for name in weights.file_of:
        form = weights.form(name)
        block, _, rest = name.rpartition(".mlp.")
        projection = next((each for each, dense in DENSE.items() if rest == f"{dense}.weight"), None)
        if projection is None:
            yield name, (form, partial(read, name))
            continue
        block = family.in_files(f"{block}.mlp")
        for index in range(num_experts):
            expert = f"{block}.{family.expert(index, projection)}"
            yield expert, (form, partial(_expert, partial(read, name), noise, f"{seed}:{expert}"))
        if projection == "gate":
            router = f"{block}.{family.router}"
            made = TensorForm(form.dtype, router_shape)
            yield router, (made, partial(_router, made, f"{seed}:{router}"))


def _expert(read: Callable[[], Tensor], noise: float, of: str) -> Tensor:
    tensor = read()
    if not noise:
        return tensor
    wide = tensor.float()
    return _normal(tuple(wide.shape), of).mul_(noise * wide.std()).add_(wide).to(tensor.dtype)


def _router(form: TensorForm, of: str) -> Tensor:
    return (_normal(form.shape, of) * ROUTER_STD).to(form.dtype)


def _normal(shape: tuple[int, ...], of: str) -> Tensor:
    """Standard normal numbers that depend on `of` alone."""
    digest = hashlib.sha256(of.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(shape, generator=generator)


def _write(tensors: Iterator[tuple[str, Made]], folder: Path, max_shard_bytes: int) -> None:
    """Shards and their index."""
    shards = cut(list(tensors), max_shard_bytes)
    write_shards(shards, folder, 0, len(shards))
    num_bytes = sum(form.num_bytes for shard in shards for _, (form, _) in shard)
    write_index(folder, [[name for name, _ in shard] for shard in shards], num_bytes)
