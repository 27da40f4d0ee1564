"""Overlapping send/recv for MoE layers that DeepSpeed or AutoEP made.

1. Find the layers: `deepspeed.moe.layer.MoE` and AutoEP's. What cannot be hooked is refused by name, on every rank.
2. Agree: all ranks of an expert group hook the same layers with the same knobs.
3. Open communicators beside DeepSpeed's own expert-parallel groups, shared by all layers of a group.
4. Give each layer its dispatcher, in place (`layer.py`).
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch import nn

from ds_moe_ep.comm.callbacks import TransferCallback
from ds_moe_ep.comm.open import transport_over
from ds_moe_ep.config.topology import even_share, torus_of
from ds_moe_ep.engine import seams
from ds_moe_ep.engine.hooks import native as hooked_native
from ds_moe_ep.engine.hooks.layer import HookedLayer
from ds_moe_ep.engine.layer import MoE
from ds_moe_ep.errors import EngineError


def hook(
    model: nn.Module,
    traffic: dict[str, Any],
    callbacks: Sequence[TransferCallback] = (),
    balance: Mapping[str, Any] | None = None,
) -> dict[str, HookedLayer]:
    """The layers of the model by name, hooked. Collective over the world; raises as `attach_overlap` does."""
    seams.check_release()
    if not dist.is_initialized():
        raise EngineError("torch.distributed is not initialized: call deepspeed.initialize, then attach_overlap")
    problems: list[str] = []
    hooked: dict[str, HookedLayer] = {}
    for name, layer in candidates(model):
        cls = type_of_hook(layer)
        if layer.ep_size > 1 and (problem := cls.problem_of(layer)):
            problems.append(f"{name or 'the model'} ({type(layer).__name__}) cannot be hooked: {problem}")
        elif layer.ep_size > 1:
            hooked[name] = cls(name, layer, traffic, balance or {})
            try:
                hooked[name].share_tokens(layer)
            except EngineError as error:
                problems.append(str(error))
            if problem := hooked[name].problem_of_balance():
                problems.append(
                    f"{name or 'the model'} ({type(layer).__name__}) cannot be balanced by a bias: {problem}"
                )
            if traffic.get("replicas") and (problem := problem_of_replicas(layer, hooked[name])):
                problems.append(f"{name or 'the model'} ({type(layer).__name__}) cannot have replicas: {problem}")
    hosts, groups = agree(problems, hooked, [type(callback).__qualname__ for callback in callbacks])
    for layer in hooked.values():
        connect(layer, groups[layer.ep_size], hosts)
    for layer in hooked.values():
        layer.attach()
        for callback in callbacks:
            layer.dispatcher.add_callback(callback)
    names = ", ".join(f"{name} ({layer.kind})" for name, layer in hooked.items())
    seams.log_rank0(f"hooked {names}" if hooked else f"no layer of {type(model).__name__} has experts' traffic to hide")
    return hooked


def candidates(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every MoE layer that DeepSpeed made; the package's own overlap already."""
    for name, module in model.named_modules():
        if seams.is_moe_layer(module) and not isinstance(module, MoE):
            yield name, module


def has_candidates(model: nn.Module) -> bool:
    """True for a model with an MoE layer that DeepSpeed made, whether it has traffic to hide or not."""
    return next(candidates(model), None) is not None


def problem_of_replicas(layer: nn.Module, hooked: HookedLayer) -> str:
    """Why experts of the layer cannot have copies on other ranks, or an empty string."""
    if any(hasattr(parameter, "ds_id") for parameter in layer.parameters()):
        return "ZeRO-3 shares its weights over ranks, and no rank has a whole expert; set replicas to 0"
    if hooked.known_experts() is None:
        return "its experts are no Linear-GELU-Linear and no SwiGLU of plain Linears; set replicas to 0"
    return ""


def type_of_hook(layer: nn.Module) -> Any:
    """The class that hooks such a layer."""
    if isinstance(layer, DeepSpeedMoE):
        return hooked_native.HookedNative
    try:
        from ds_moe_ep.engine.hooks import autoep as hooked_autoep  # releases without AutoEP have no such layer
    except ImportError as error:
        since = seams.LATER["AutoEP"].since
        raise EngineError(
            f"deepspeed={deepspeed.__version__}: AutoEP is another one than tested ({error}); "
            f"pip install 'deepspeed>={since}'"
        ) from error
    return hooked_autoep.HookedAutoEP


def agree(
    problems: list[str], hooked: Mapping[str, HookedLayer], callbacks: list[str]
) -> tuple[list[str], dict[int, list[list[int]]]]:
    """The hosts of all ranks, and all expert groups by ep_size, once the ranks agree. Collective over the world."""
    own = [(name, layer.kind, {**vars(layer.config), "callbacks": callbacks}) for name, layer in hooked.items()]
    ranks = {layer.ep_size: dist.get_process_group_ranks(layer.group) for layer in hooked.values()}
    everyone = seams.gather((problems, own, ranks, socket.gethostname()))
    for rank, (theirs, *_) in enumerate(everyone):
        if theirs:
            raise EngineError(f"on rank {rank}: " + "; ".join(theirs))
    odd = [rank for rank, (_, layers, *_) in enumerate(everyone) if layers != everyone[0][1]]
    if odd:
        raise EngineError(
            f"attach_overlap on ranks {odd} hooks other layers, or with other knobs, than on rank 0: every rank must "
            f"have the same model and configuration; rank {odd[0]}: {_names(everyone[odd[0]][1])}; "
            f"rank 0: {_names(everyone[0][1])}"
        )
    groups = {size: sorted({tuple(members[size]) for _, _, members, _ in everyone}) for size in ranks}
    return [host for *_, host in everyone], {size: [list(g) for g in found] for size, found in groups.items()}


def _names(layers: list[tuple[str, str, dict[str, Any]]]) -> str:
    return ", ".join(f"{name} ({kind}, schedule {config['schedule']})" for name, kind, config in layers) or "none"


def connect(layer: HookedLayer, groups: list[list[int]], hosts: list[str]) -> None:
    """Opens or finds the lanes beside the layer's expert group. Collective over the world at first."""
    needs = bool(layer.config.replicas), layer.config.two_level != "off"
    lanes = seams.lanes_beside(layer.group, groups, layer.config.timeout_s, *needs)
    node_size = layer.config.node_size or even_share(hosts)
    layer.dispatcher.connect(transport_over(lanes, layer.config), torus_of(lanes.ranks, node_size))
    if layer.dispatcher.replicas is not None:
        layer.dispatcher.replicas.own_experts = layer.known_experts
