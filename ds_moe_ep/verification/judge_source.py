"""Verdicts on AutoEP's routers: do they route as the block of the model that they replaced?

The block is the source model's, where the caller has it; else one of the same class and configuration is made without
memory, and its gate gets the layer's own numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe_ep.engine.views.layers import ViewedLayer
from ds_moe_ep.verification.verdicts import TrainingVerdict

NUM_TOKENS = 64
SEED = 2
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
BIAS = "e_score_correction_bias"
FIX = "convert the model with the preset of its family, and load the gate's weights and bias from the same checkpoint"


def source_problems(
    model: nn.Module, layers: Sequence[ViewedLayer], source: nn.Module | None
) -> Iterator[TrainingVerdict]:
    """Problems of routers that differ from their source, and a note where there is no source to ask. Local."""
    converted = [layer for layer in layers if layer.kind == "AutoEPMoELayer"]
    if not converted:
        return
    known = source if source is not None else _without_memory(model)
    for layer in converted:
        gate = None if known is None else _gate_in(known, layer)
        if gate is None:
            yield _verdict(
                "note", "the routing of the block that it replaced is not known here: pass source=<model>", layer
            )
            continue
        yield from _differences(gate, layer, has_numbers=source is not None)


def _without_memory(model: nn.Module) -> nn.Module | None:
    """A model of the same class and configuration on the meta device; None where it cannot be made so."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    try:
        with torch.device("meta"):
            made: nn.Module = type(model)(copy.deepcopy(config))
    except Exception:  # of whatever class the model is
        return None
    return made


def _gate_in(source: nn.Module, layer: ViewedLayer) -> nn.Module | None:
    """The gate of the source's block: the child with a matrix of a row per expert."""
    try:
        block = source.get_submodule(layer.name)
    except AttributeError:
        return None
    for _, child in block.named_children():
        weight = getattr(child, "weight", None)
        if isinstance(weight, Tensor) and tuple(weight.shape) == tuple(layer.gate.gate.weight.shape):
            return child
    return None


def _differences(gate: nn.Module, layer: ViewedLayer, has_numbers: bool) -> Iterator[TrainingVerdict]:
    own = dict(gate.named_buffers()) | dict(gate.named_parameters())
    has_bias = BIAS in own and (not has_numbers or bool(own[BIAS].count_nonzero()))
    if has_bias and layer.gate.e_score_correction_bias is None:
        yield _verdict("problem", f"the block that it replaced has {BIAS}, and the layer has none", layer)
        return
    twin = _without_hooks(gate) if has_numbers else _without_hooks(gate).to_empty(device="cpu")
    twin = twin.float().eval()
    if not has_numbers:
        _fill(twin, layer)
    x_TD = torch.randn(NUM_TOKENS, layer.inner.hidden_size, generator=torch.Generator().manual_seed(SEED))
    try:
        with torch.no_grad():
            answer = twin(x_TD)
            router = _without_hooks(layer.gate).float().cpu()
            bias_E = None if layer.inner.expert_bias is None else layer.inner.expert_bias.cpu()
            weights_TK, ids_TK, _ = router(x_TD, bias_E)
    except Exception as error:  # of whatever class the gate is
        yield _verdict("note", f"the gate of the block that it replaced cannot be asked ({error})", layer)
        return
    if not (isinstance(answer, tuple) and len(answer) == 3):
        yield _verdict("note", f"{type(gate).__name__} gives no routes to compare with", layer)
        return
    asked_TE, found_TE = _dense(answer[2], answer[1], layer), _dense(ids_TK, weights_TK, layer)
    wrong_T = ((asked_TE - found_TE).abs() > 1e-4 * (1 + asked_TE.abs())).any(1)
    if int(wrong_T.sum()) > 1:  # one may be a near tie
        token = int(wrong_T.nonzero()[0])
        yield _verdict(
            "problem",
            f"{int(wrong_T.sum())} of {NUM_TOKENS} tokens are routed otherwise than by the block that it replaced "
            f"(experts {sorted(ids_TK[token].tolist())} in place of {sorted(answer[2][token].tolist())})",
            layer,
        )


def _without_hooks(gate: nn.Module) -> nn.Module:
    """A copy of a gate without its hooks, which hold what watches the run, and the run's groups of ranks."""
    kept = [(module, name, vars(module)[name]) for module in gate.modules() for name in HOOKS]
    try:
        for module, name, hooks in kept:
            vars(module)[name] = type(hooks)()
        return copy.deepcopy(gate)
    finally:
        for module, name, hooks in kept:
            vars(module)[name] = hooks


@torch.no_grad()
def _fill(gate: nn.Module, layer: ViewedLayer) -> None:
    """Gives a gate without numbers those of the layer's."""
    router = layer.gate
    gate.weight.copy_(router.gate.weight)  # type: ignore[operator]
    for name, bias_E in ((BIAS, router.e_score_correction_bias), ("bias", router.gate.bias)):
        if isinstance(own := getattr(gate, name, None), Tensor):
            own.zero_()
            if bias_E is not None:
                own.copy_(bias_E)


def _dense(ids_TK: Tensor, weights_TK: Tensor, layer: ViewedLayer) -> Tensor:
    return torch.zeros(len(ids_TK), layer.num_experts).scatter_(1, ids_TK.long(), weights_TK.float())


def _verdict(status: Any, found: str, layer: ViewedLayer) -> TrainingVerdict:
    fix = FIX if status == "problem" else ""
    return TrainingVerdict("routing", status, found, fix, layer.name, dist.get_rank())
