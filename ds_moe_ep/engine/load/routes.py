"""Routes of a model's layers, recorded and replayed, whoever made the layers: the package, DeepSpeed or AutoEP.

What reinforcement learning needs: tokens of the training pass go where they went in the rollout, while the gate is
trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch.distributed as dist
from torch import nn

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.engine import seams
from ds_moe_ep.engine.hooks.layer import HookedLayer
from ds_moe_ep.engine.layouts.tensor import first_rank_of_group
from ds_moe_ep.errors import EngineError
from ds_moe_ep.health.diagnosis import ranks_named
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.moe.replay.record import LayerRoutes, RouteRecord
from ds_moe_ep.moe.replay.tape import RouteRecorder, RouteReplayer, Tape


class Taped(Protocol):
    """The place in a layer where its routes are chosen."""

    tape: Tape | None

    @property
    def config(self) -> MoEConfig:
        """The layer's knobs."""


@contextmanager
def record_routes(engine_or_model: Any) -> Iterator[RouteRecord]:
    """A scope whose forward passes are recorded, of each MoE layer and of this rank's tokens; gives the record.

    Ranks of a tensor-parallel group route all tokens of the group, and record the same. Recomputed passes are left out.
    The host waits for each pass's routes. Raises EngineError, on every rank, for a layer whose routes cannot be read.
    """
    places = _places(engine_or_model)
    recorders = {name: RouteRecorder() for name in places}
    record = RouteRecord(
        {
            name: LayerRoutes(place.config.num_experts, place.config.top_k, recorders[name].passes)
            for name, place in places.items()
        }
    )
    with _taped(places, recorders):
        yield record


@contextmanager
def replay_routes(engine_or_model: Any, record: RouteRecord) -> Iterator[None]:
    """A scope in which the n-th forward pass of each layer sends this rank's tokens where the record's n-th pass has
    them.

    Weights come from the gate as it is now, and so the gate has its gradients; balance losses and loads are those of
    the routes. Recomputation inside of the scope gets the same routes. Training from one's own record is bit-equal to
    the training that was recorded. Raises EngineError, on every rank, where the record does not fit the model or ranks
    of a tensor-parallel group have different ones, and in the pass whose number of tokens it does not have.
    """
    places = _places(engine_or_model)
    shapes = {name: (place.config.num_experts, place.config.top_k) for name, place in places.items()}
    problem = record.problem(shapes)
    _settle(EngineError(f"record {problem}; replay the record of this model") if problem else None)
    _refuse_unlike(record)
    with _taped(places, {name: RouteReplayer(name, record.layers[name].passes) for name in places}):
        yield


def _places(engine_or_model: Any) -> dict[str, Taped]:
    """Where the routes of each MoE layer are chosen, by the layer's name. Raises EngineError on every rank."""
    model: nn.Module = getattr(engine_or_model, "module", engine_or_model)
    found: dict[str, Taped] = {}
    problem = ""
    for name, module in model.named_modules():
        if isinstance(module, ExpertParallel):
            found[".".join(part for part in name.split(".") if part != "deepspeed_moe")] = module.gate
        elif seams.is_moe_layer(module) and not isinstance(getattr(module, "deepspeed_moe", None), ExpertParallel):
            hooked = _hook_of(module)
            if hooked is None:
                problem = problem or f"{name} ({type(module).__name__}) is not hooked; call attach_overlap first"
            elif why := hooked.problem_of_replay():
                problem = problem or f"{name} ({hooked.kind}): {why}"
            else:
                found[name] = hooked
    if not found and not problem:
        problem = (
            f"model={type(model).__name__}: has no MoE layer whose routes are chosen here; pass the model that trains"
        )
    _settle(EngineError(problem) if problem else None)
    return found


def _hook_of(module: nn.Module) -> HookedLayer | None:
    for each in (module, getattr(module, "deepspeed_moe", None)):
        if each is not None and isinstance(hooked := vars(each).get("overlap"), HookedLayer):
            return hooked
    return None


@contextmanager
def _taped(places: dict[str, Taped], tapes: Any) -> Iterator[None]:
    for name, place in places.items():
        if place.tape is not None:
            raise EngineError(
                f"{name or 'the layer'}: its routes are recorded or replayed already; leave that scope first"
            )
    try:
        for name, place in places.items():
            place.tape = tapes[name]
        yield
    finally:
        for place in places.values():
            place.tape = None


def _refuse_unlike(record: RouteRecord) -> None:
    """Raises EngineError, on every rank, where tensor ranks, which must route alike, have different records."""
    if not dist.is_initialized() or seams.tensor_parallel_size() == 1:
        return
    told = seams.gather((first_rank_of_group(), record.digest()))
    of_group = dict(reversed(told))
    odd = [rank for rank, (first, digest) in enumerate(told) if digest != of_group[first]]
    if odd:
        raise EngineError(
            f"record: {ranks_named(odd)} would send tokens elsewhere than the first rank of the tensor-parallel group, "
            "which has the same ones; replay one record on all ranks of a group"
        )


def _settle(error: EngineError | None) -> None:
    """Raises the first rank's error on every rank. Collective over the world, where there is one."""
    if dist.is_initialized():
        seams.settle(error)
    elif error is not None:
        raise error
