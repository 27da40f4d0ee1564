"""DeepSpeed's constructor arguments of an MoE layer as a MoEConfig: honoured or refused by name, none ignored."""

from __future__ import annotations

from typing import Any

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.errors import ConfigError, nearest

NOISE = {None: "none", "None": "none", "Jitter": "jitter", "RSample": "rsample"}

DEFAULTS: dict[str, Any] = {
    "num_experts": 1,
    "ep_size": 1,
    "k": 1,
    "capacity_factor": 1.0,
    "eval_capacity_factor": 1.0,
    "min_capacity": 4,
    "noisy_gate_policy": None,
    "drop_tokens": True,
    "use_rts": True,
    "use_tutel": False,
    "enable_expert_tensor_parallelism": False,
    "top2_2nd_expert_sampling": True,
}


def config_of_arguments(given: dict[str, Any]) -> MoEConfig:
    """The configuration that DeepSpeed's arguments describe, by DeepSpeed's own rules.

    Its dropping depends on k: drawn (top-1 with use_rts), by position (top-1 without, top-2), by score above.
    """
    refuse_unsupported(given)
    drops, k = given["drop_tokens"], given["k"]
    drawn = drops and given["use_rts"] and k == 1
    policy = "random" if drawn else "position" if k <= 2 else "score"
    values = {
        "num_experts": given["num_experts"],
        "ep_size": given["ep_size"],
        "top_k": k,
        "capacity_factor": given["capacity_factor"] if drops else None,
        "eval_capacity_factor": given["eval_capacity_factor"] if drops else None,
        "min_capacity": given["min_capacity"],
        "noise": NOISE[given["noisy_gate_policy"]],
        "drop_policy": policy,
        "sample_second": bool(given["top2_2nd_expert_sampling"]) and k == 2,
    }
    return MoEConfig.from_dict(values, "MoE")


def refuse_unsupported(given: dict[str, Any]) -> None:
    """Raises ConfigError for an argument that has no meaning here."""
    if given["use_tutel"]:
        raise ConfigError(
            "MoE.use_tutel=True: rows are routed and moved by ds_moe_ep's own kernels, Tutel's have no place here; "
            "leave it False"
        )
    if given["enable_expert_tensor_parallelism"]:
        raise ConfigError(
            "MoE.enable_expert_tensor_parallelism=True: experts are whole on their rank; leave it False, and give "
            "more ranks to ep_size instead"
        )
    policy = given["noisy_gate_policy"]
    if policy not in NOISE:
        hint = nearest(str(policy), ["Jitter", "RSample", "None"])
        raise ConfigError(f"MoE.noisy_gate_policy={policy!r}: choose 'Jitter', 'RSample' or None; {hint}")


def refuse_beside_config(given: dict[str, Any]) -> None:
    """Raises ConfigError for arguments that stand beside `config` and would be ignored."""
    for name, default in DEFAULTS.items():
        if given[name] != default:
            raise ConfigError(
                f"MoE.{name}={given[name]!r} stands beside config=MoEConfig(...), which says it all; put it into "
                "the config or leave the config out"
            )
