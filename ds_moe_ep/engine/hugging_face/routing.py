"""Routing that a family's configuration decides: as knobs of a layer, kept in an engine, and held at an export."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.engine import seams
from ds_moe_ep.engine.hugging_face.expert_block import ExpertBlock
from ds_moe_ep.engine.hugging_face.families import Family
from ds_moe_ep.errors import ConfigError, ExportError


def decided_by(config: Any, family: Family) -> dict[str, Any]:
    """The knobs that a family's configuration decides: all on which logits depend outside of training."""
    is_limited = family.limits_groups and getattr(config, "topk_method", None) != "greedy"
    return {
        "num_experts": int(getattr(config, family.num_experts)),
        "top_k": int(config.num_experts_per_tok),
        "score": family.score,
        "renormalize": bool(getattr(config, family.renormalizes)) if family.renormalizes else family.renormalizes == "",
        "gate_bias": bool(family.gate_bias),
        "n_group": int(config.n_group or 1) if is_limited else 1,
        "topk_group": int(config.topk_group or 1) if is_limited else 1,
        "group_score": family.group_score,
        "route_scale": float(config.routed_scaling_factor) if family.limits_groups else 1.0,
    }


def knobs_of(config: Any, family: Family, ep_size: int, knobs: Mapping[str, Any]) -> MoEConfig:
    """The knobs that route as the family's block does. `knobs` are others, which may not contradict them.

    Raises ConfigError for a router that the package does not have, and for a knob that the family decides.
    """
    for problem, is_there in (
        ("config.router_jitter_noise multiplies the experts' input", bool(getattr(config, "router_jitter_noise", 0))),
        ("config.hidden_act is not silu", getattr(config, "hidden_act", "silu") != "silu"),
    ):
        if is_there:
            raise ConfigError(
                f"config.model_type={family.model_type!r}: cannot become MoE layers, {problem}; train it through "
                "AutoEP with attach_overlap"
            )
    decided = {"ep_size": ep_size, **decided_by(config, family)}
    default = {"balance": "bias", "bias_step": 0.0} if family.router_bias else {"balance": "none"}
    if family.router_bias and knobs.get("balance", "bias") not in ("bias", "bias_and_aux_loss"):
        raise ConfigError(
            f"moe_ep.balance={knobs['balance']!r}: the router of {family.model_type} chooses with a bias; write "
            "'bias', whose bias_step of 0 leaves it as it is, or 'bias_and_aux_loss'"
        )
    for name in decided:
        if name in knobs and knobs[name] != decided[name]:
            raise ConfigError(
                f"moe_ep.{name}={knobs[name]!r}: the folder's config decides it ({decided[name]!r}); leave it out"
            )
    made = MoEConfig(**{**default, **knobs, **decided})
    if made.has_bias and not family.router_bias:
        seams.log_rank0(
            f"moe_ep.balance={made.balance!r}: files of {family.model_type} have no place for a routing bias, and "
            "save_pretrained will refuse one that has moved; balance='aux_loss' can leave",
            logging.WARNING,
        )
    return made


def check_routing(config: Any, block: ExpertBlock) -> None:
    """Raises ExportError where a layer of the package's routes outside of training as its family's files do not."""
    knobs = getattr(block.layer, "config", None)
    if not isinstance(knobs, MoEConfig):
        return
    family = block.family
    decided = decided_by(config, family)
    asked = {**decided, "eval_capacity_factor": None, "force_even": False}
    if decided["n_group"] == 1:
        del asked["group_score"]
    for name, value in asked.items():
        found = knobs.renormalizes if name == "renormalize" else getattr(knobs, name)
        if found != value:
            raise ExportError(
                f"{block.name}: moe_ep.{name}={found!r}, and a folder of {family.model_type} is read with {value!r}, "
                "which gives other logits; export from an engine without that knob"
            )
    bias_E = block.layer.balance.bias_E if block.layer.balance is not None else None
    if bias_E is not None and not family.router_bias and bool(bias_E.any()):
        raise ExportError(
            f"{block.name}: moe_ep.balance={knobs.balance!r} has moved a routing bias, for which files of "
            f"{family.model_type} have no place; engine.save_checkpoint keeps it, and a training with "
            "balance='aux_loss' can leave"
        )
