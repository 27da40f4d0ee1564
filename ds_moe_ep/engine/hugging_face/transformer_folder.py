"""The package's own model as a Hugging Face folder: no family of transformers has its experts, gate and attention.

The folder therefore carries the model's code (`modeling_moe_transformer.py`), which knows torch and transformers alone,
and is loaded with `trust_remote_code=True`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ds_moe_ep.config.knobs import ModelConfig, MoEConfig
from ds_moe_ep.errors import ExportError
from ds_moe_ep.model.initialize import LOCAL_EXPERT, global_name, renumbered
from ds_moe_ep.model.transformer import Transformer

OWN_KIND = "ds_moe_ep.MoE"
CODE = "modeling_moe_transformer"
MODEL_TYPE, CLASS = "ds_moe_ep_transformer", "MoETransformerForCausalLM"
ROUTING_BIAS = "gate.routing_bias"
_STEPS, _START = "gate.balance.steps_E", "gate.balance.start_bits_E"


def values_of(model: Transformer) -> dict[str, Any]:
    """The content of config.json for a model in an engine. Raises ExportError for layers that are not the package's."""
    layers = _moe_layers(model)
    odd = next((type(layer).__name__ for layer in layers if getattr(layer, "kind", "") != OWN_KIND), "")
    if odd:
        raise ExportError(f"model=Transformer with {odd} layers: the folder's code has the gate of ds_moe_ep.MoE alone")
    return config_values(model.config, layers[0].config, model.head.weight.dtype)


def tensors_of(
    model: Transformer, is_first: bool, first_expert: Callable[[str, Any], int | None]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that this rank writes, by their names in files: its experts, and on the first rank all others.

    `first_expert` gives the global index of a layer's first expert here; None where another rank writes the same ones.
    """
    state = {global_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    if is_first:
        dense = {name: tensor for name, tensor in state.items() if not LOCAL_EXPERT.search(name)}
        yield from ((name, tensor) for name, tensor in dense.items() if not is_balance_state(name))
        yield from routing_biases(dense, _moe_layers(model)[0].config.bias_step).items()
    for index, layer in enumerate(_moe_layers(model)):
        prefix = f"layers.{index}.feed_forward."
        first = first_expert(prefix.removesuffix("."), layer)
        for name, tensor in state.items() if first is not None else ():
            if name.startswith(prefix) and LOCAL_EXPERT.search(name):
                yield name_in_files(renumbered(name, expert_index(first))), tensor


def _moe_layers(model: Transformer) -> list[Any]:
    layers: Iterable[Any] = model.layers
    return [layer.feed_forward for layer in layers]


def expert_index(first: int | None) -> Callable[[int], int]:
    """The map from local to global indices of experts, of which `first` is the first one's."""
    return lambda local: (first or 0) + local


def describe(values: dict[str, Any], folder: Path) -> None:
    """Writes the configuration and the model's code into a folder."""
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (folder / f"{CODE}.py").write_text(code_path().read_text(encoding="utf-8"), encoding="utf-8")


def name_in_files(name: str) -> str:
    """The name in the folder's files of a tensor, for its name in the model on one device."""
    return re.sub(r"\.experts\.deepspeed_experts\.(\d+)\.", r".experts.\1.", name)


def is_balance_state(name: str) -> bool:
    """True for what a routing bias is computed from; the files hold the bias itself (`routing_biases`)."""
    return name.endswith((_STEPS, _START))


def routing_biases(state: dict[str, torch.Tensor], step_size: float) -> dict[str, torch.Tensor]:
    """The routing biases, by their names in files, of a state that has what they are computed from."""
    found = {}
    for name, steps_E in state.items():
        if name.endswith(_STEPS):
            block = name.removesuffix(_STEPS)
            bias_E, start_bits_E = steps_E.float() * step_size, state.get(f"{block}{_START}")
            found[f"{block}{ROUTING_BIAS}"] = (
                bias_E if start_bits_E is None else start_bits_E.view(torch.float32) + bias_E
            )
    return found


def config_values(model: ModelConfig, moe: MoEConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json. Raises ExportError for a gate that computes something else than the folder's code."""
    for problem, is_there in (
        (
            f"eval_capacity_factor={moe.eval_capacity_factor}: drops depend on the tokens of a rank",
            moe.eval_capacity_factor is not None,
        ),
        ("sample_second=true: the second expert is drawn", moe.sample_second),
        ("force_even=true: no gate chooses", moe.force_even),
        (f"router_dtype={moe.router_dtype!r}: the folder's gate computes in fp32", moe.router_dtype != "fp32"),
    ):
        if is_there:
            raise ExportError(
                f"moe_ep.{problem}; a Hugging Face folder would give other logits. Leave the knob out where that is "
                "what the exported model shall do"
            )
    return {
        "architectures": [CLASS],
        "model_type": MODEL_TYPE,
        "auto_map": {"AutoConfig": f"{CODE}.MoETransformerConfig", "AutoModelForCausalLM": f"{CODE}.{CLASS}"},
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "max_position_embeddings": model.sequence_length,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "expert": model.expert,
        "expert_width": model.expert_width,
        "expert_bias": model.expert_bias,
        "shared_expert_width": model.shared_expert_width,
        "score": moe.score,
        "norm_topk_prob": moe.renormalizes,
        "routed_scaling_factor": moe.route_scale,
        "n_group": moe.n_group,
        "topk_group": moe.topk_group,
        "group_score": moe.group_score,
        "gate_bias": moe.gate_bias,
        "routing_bias": moe.has_bias,
        "tie_word_embeddings": False,
        "use_cache": False,
    }


def code_path() -> Path:
    """The model's code, which a folder carries."""
    return Path(__file__).with_name(f"{CODE}.py")
