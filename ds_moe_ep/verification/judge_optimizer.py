"""Verdicts on an engine's optimizer: groups and step sizes, movement, the norm that clips, the loss scale, replicas."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe_ep.engine import seams, step_seams
from ds_moe_ep.engine.layouts.reductions import copy_name
from ds_moe_ep.engine.state.optimizer_view import (
    AppliedNorm,
    has_partitions,
    loss_scale,
    optimizer_groups,
    own_master,
    own_partition,
    sum_over_world,
)
from ds_moe_ep.engine.state.tensor_bytes import bytes_of
from ds_moe_ep.engine.views.layers import ViewedLayer
from ds_moe_ep.verification.judge_passes import ExpertsOutcome
from ds_moe_ep.verification.verdicts import TrainingVerdict, problem, short

EPSILON = 1e-6  # DeepSpeed's, beside the norm that clips
NORM_ROUNDING = 1e-3  # a norm of rounded gradients, one addend each: far below what one expert more or less changes
SORT = (
    "sort the parameters with DeepSpeed's split_params_into_different_moe_groups_for_optimizer after the last of them "
    "was made, and give the optimizer those of the engine's model"
)


def groups(engine: Any, layers: Sequence[ViewedLayer]) -> Iterator[TrainingVerdict]:
    """Problems of parameters in groups, and of step sizes. Local."""
    found = optimizer_groups(engine)
    places: dict[int, list[int]] = {}
    for group in found:
        for parameter in group.parameters:
            places.setdefault(id(parameter), []).append(group.index)
    for layer in layers:
        for name, parameter in (layer.stored_parameters() | layer.gate_parameters()).items():
            holders = places.get(id(parameter), [])
            if not parameter.requires_grad:
                continue
            if len(holders) != 1:
                told = "lies in no group of the optimizer" if not holders else f"lies in groups {holders}"
                yield problem(
                    "groups", f"{told}: {'nothing moves it' if not holders else 'it is stepped twice'}", SORT, name
                )
                continue
            options = found[holders[0]].options
            yield from _step_sizes(engine, name, options, holders[0])


def _step_sizes(engine: Any, name: str, options: Mapping[str, Any], index: int) -> Iterator[TrainingVerdict]:
    """Problems of a parameter's learning rate and weight decay."""
    config = seams.ds_config_of(engine).get("optimizer") or {}
    params = config.get("params") or {} if step_seams.is_own_optimizer(engine) else {}
    for key in ("lr", "weight_decay"):  # dense groups that differ are the caller's own, and so is the experts'
        dense = {group.options.get(key) for group in optimizer_groups(engine) if not group.options.get("moe")}
        params = params if len(dense) == 1 else {name: value for name, value in params.items() if name != key}
    rates = engine.lr_scheduler.get_last_lr() if hasattr(engine.lr_scheduler, "get_last_lr") else None
    asked: dict[str, Any] = {
        key: params[key] for key in ("lr", "weight_decay") if isinstance(params.get(key), (int, float))
    }
    if rates is not None and engine.lr_scheduler is not None:
        asked.pop("lr", None)
        if index < len(rates):
            asked["lr"] = rates[index]
    source = {"lr": "the scheduler" if rates is not None else "the ds_config"}
    for key, value in asked.items():
        actual = options.get(key)
        if actual is None or abs(float(actual) - float(value)) <= 1e-9 * max(abs(float(value)), 1e-12):
            continue
        yield problem(
            "groups",
            f"is stepped with {key}={float(actual):g}; {source.get(key, 'the ds_config')} says {float(value):g}",
            f"take {key} out of the parameter groups that you pass, or write the same value in optimizer.params",
            name,
        )


def frozen(layers: Sequence[ViewedLayer]) -> Iterator[TrainingVerdict]:
    """Notes on parameters that need no gradient. Local."""
    for layer in layers:
        names = [name for name, each in layer.stored_parameters().items() if not each.requires_grad]
        if names:
            yield TrainingVerdict(
                "movement",
                "note",
                f"{len(names)} parameters of its experts have requires_grad=False and stay as they are",
                parameter=names[0],
                rank=dist.get_rank(),
            )


class Movement:
    """The weights of all experts before a step, and what the step did to them. Its making is local."""

    def __init__(self, engine: Any, layers: Sequence[ViewedLayer]) -> None:
        self._engine, self._layers = engine, layers
        self._before = self._taken()
        inner = step_seams.torch_optimizer(engine)
        decays = any(group.options.get("weight_decay") for group in optimizer_groups(engine))
        self._moves_anyway = decays or bool(inner is not None and inner.state)  # without a gradient

    def _taken(self) -> dict[str, str]:
        """Digests of this rank's spans of the weights that the optimizer steps."""
        return {
            layer.expert_name(local, name): digest(stored.in_span(own_master(self._engine, stored.parameter)).values)
            for layer in self._layers
            for local in range(layer.num_local)
            for name, stored in layer.expert_tensors(local).items()
        }

    def problems(self, outcomes: Mapping[str, ExpertsOutcome]) -> Iterator[TrainingVerdict]:
        """Problems of experts that did not move, or moved for no reason. Collective over the world."""
        moved = {name for name, value in self._taken().items() if value != self._before[name]}
        norms = {
            layer.expert_name(local, name): norm
            for layer in self._layers
            for (local, name), norm in outcomes[layer.name].gradient_norms.items()
            if norm
        }
        everyone = seams.gather((moved, norms))
        moved = set().union(*(theirs for theirs, _ in everyone))
        norms = {name: norm for _, theirs in everyone for name, norm in theirs.items()}
        steps = any(float(group.options.get("lr", 1.0)) for group in optimizer_groups(self._engine))
        for layer in self._layers:
            for local, rows in outcomes[layer.name].rows.items():
                for name, stored in layer.expert_tensors(local).items():
                    whole = layer.expert_name(local, name)
                    if stored.parameter.requires_grad:
                        yield from self._judge(whole, rows, norms.get(whole, 0.0), whole in moved, steps)

    def _judge(self, name: str, rows: int, norm: float, has_moved: bool, steps: bool) -> Iterator[TrainingVerdict]:
        if rows and norm and not has_moved and steps:
            yield problem(
                "movement",
                f"{rows} rows reached it and its gradient has norm {short(norm)}, but no step moved it",
                f"the optimizer steps another tensor, or none: {SORT}",
                name,
            )
        elif not rows and (norm or (has_moved and not self._moves_anyway)):
            yield problem(
                "movement",
                f"no row reached it, and {f'its gradient has norm {short(norm)}' if norm else 'the step moved it'}",
                "gradients of other experts, or of an earlier step, land in it: check the order of the parameters in "
                "the optimizer's groups",
                name,
            )


def norm(engine: Any, square: float, applied: AppliedNorm) -> Iterator[TrainingVerdict]:
    """Problems of the norm that clipped. Collective."""
    mine = torch.tensor([square, applied.square], dtype=torch.float64, device=engine.device)
    true_norm, applied_norm = (float(each) for each in sum_over_world(mine).sqrt())
    limit, reported = float(engine.gradient_clipping()), engine.get_global_grad_norm()
    if not limit or not true_norm:
        return
    asked = min(true_norm, limit * true_norm / (true_norm + EPSILON)) if true_norm > limit else true_norm
    fix = (
        "call ds_moe_ep.initialize or ds_moe_ep.attach_overlap, whose norm counts the experts of all ranks, or use ZeRO"
    )
    if applied.is_known and abs(applied_norm - asked) > NORM_ROUNDING * asked:
        yield problem(
            "norm",
            f"gradients of norm {short(applied_norm)} reached the optimizer; all experts counted once, clipping at "
            f"{limit:g} leaves {short(asked)}",
            fix,
        )
    elif not applied.is_known and reported is not None and abs(float(reported) - true_norm) > NORM_ROUNDING * true_norm:
        found = (
            f"the step was clipped by a norm of {short(float(reported))}; that of all gradients is {short(true_norm)}"
        )
        yield problem("norm", found, fix)


def scales(engine: Any) -> Iterator[TrainingVerdict]:
    """Problems of the loss scale. Collective."""
    found = seams.gather(loss_scale(engine))
    odd = [rank for rank, scale in enumerate(found) if scale != found[0]]
    if odd and dist.get_rank() == odd[0]:
        yield problem(
            "loss scale",
            f"the loss scale is {found[odd[0]]:g} and on rank 0 {found[0]:g}",
            "ranks must skip a step together: load the last checkpoint, and look for a scaler of your own",
        )


def digest(tensor: Tensor) -> str:
    """A hash of a tensor's bits."""
    return hashlib.blake2b(bytes_of(tensor), digest_size=12).hexdigest()


def named_tensors(engine: Any, layers: Sequence[ViewedLayer]) -> dict[str, Tensor]:
    """All parameters of this rank's model, experts one by one under names that are the same on every rank.

    Under ZeRO-3 this rank's partitions, which no other rank has.
    """
    partitions = {name: own_partition(each) for name, each in engine.module.named_parameters()}
    if any(each is not None for each in partitions.values()):
        rank = dist.get_rank()
        return {f"{name} of rank {rank}": each.detach() for name, each in partitions.items() if each is not None}
    experts = {id(each) for layer in layers for each in layer.stored_parameters().values()}
    dense = ((name, each) for name, each in engine.module.named_parameters() if id(each) not in experts)
    found = {copy_name(name, each): each.detach() for name, each in dense}
    for layer in layers:
        for local in range(layer.num_local):
            for name, stored in layer.expert_tensors(local).items():
                found[layer.expert_name(local, name)] = stored.of(stored.parameter).detach()
    return found


def state_of(engine: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Memory of the optimizer of a parameter, where each rank has it whole."""
    inner = step_seams.torch_optimizer(engine)
    found = {} if inner is None or has_partitions(engine) else inner.state.get(parameter, {})
    return {key: value for key, value in found.items() if isinstance(value, Tensor) and value.dim()}


def named_states(engine: Any, layers: Sequence[ViewedLayer]) -> dict[str, Tensor]:
    """Optimizer states that lie with a parameter, under the names of `named_tensors`."""
    found: dict[str, Tensor] = {}
    experts = {id(each) for layer in layers for each in layer.stored_parameters().values()}
    for name, each in engine.module.named_parameters():
        if id(each) not in experts:
            found |= {f"{copy_name(name, each)} ({key})": value for key, value in state_of(engine, each).items()}
    for layer in layers:
        for local in range(layer.num_local):
            for name, stored in layer.expert_tensors(local).items():
                for key, value in state_of(engine, stored.parameter).items():
                    found[f"{layer.expert_name(local, name)} ({key})"] = stored.of(value)
    return found


def replicas(engine: Any, layers: Sequence[ViewedLayer]) -> Iterator[TrainingVerdict]:
    """Problems of copies that differ between ranks. Collective."""
    own = {name: digest(each) for name, each in (named_tensors(engine, layers) | named_states(engine, layers)).items()}
    everyone = seams.gather(own)
    first: dict[str, tuple[int, str]] = {}
    for rank, theirs in enumerate(everyone):
        for name, value in theirs.items():
            known_rank, known = first.setdefault(name, (rank, value))
            if known != value and rank == dist.get_rank():
                yield problem(
                    "replicas",
                    f"differs from the copy on rank {known_rank}",
                    "ranks that hold one expert must reduce its gradients together: check its marks (allreduce, "
                    "group_name), and that every rank loaded the same checkpoint",
                    name,
                )
