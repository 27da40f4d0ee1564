"""The optimizer of an engine as its parameters see it: groups, master weights, and the gradients of a step.

DeepSpeed's optimizers keep them in places of their own: without ZeRO with each parameter, in wrappers of fp16 and bf16
as copies group by group, under ZeRO as spans of flat partitions. Each rank reads its own span of a parameter: nothing
is communicated.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe_ep.engine import step_seams
from ds_moe_ep.engine.layouts.reductions import num_counts, num_holders

MODEL_GROUPS = ("bit16_groups", "fp16_groups", "bf16_groups")  # of a wrapper: the model's parameters, group by group
SUB_GROUPS = "sub_group_to_group_id"  # of ZeRO-3: the group of each of its parts
MASTERS, FLAT_MASTERS = "fp32_groups", "fp32_groups_flat"  # of a wrapper without partitions
MAPPING = "_hp_mapping"  # of a parameter: this rank's span of it in a partition, or None
PARTITION = "ds_tensor"  # of a parameter under ZeRO-3: this rank's span of it
ACCUMULATED = "_hp_grad"  # of a parameter, beside .grad: the gradient that the optimizer takes


@dataclass(frozen=True)
class OptimizerGroup:
    """One parameter group of an optimizer: the parameters of the model, and how they are stepped."""

    index: int
    parameters: tuple[nn.Parameter, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class OwnSpan:
    """Values of a parameter that lie on this rank, from an index of the flat parameter on."""

    start: int
    values: Tensor

    def within(self, start: int, stop: int) -> OwnSpan:
        """The part that lies in a range of the flat parameter, counted from the range's start."""
        first, last = max(start, self.start), min(stop, self.start + self.values.numel())
        return OwnSpan(max(first - start, 0), self.values[max(first - self.start, 0) : max(last - self.start, 0)])


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of a parameter, also where ZeRO-3 has it in partitions."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@contextmanager
def whole_weights(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """A scope in which parameters that ZeRO-3 has in partitions are whole on every rank, to be read.

    Collective over the ranks that have them.
    """
    with ExitStack() as scopes:
        for parameter in parameters:
            if hasattr(parameter, PARTITION):  # one by one: experts' groups are others
                scopes.enter_context(deepspeed.zero.GatheredParameters([parameter]))
        yield


def own_partition(parameter: nn.Parameter) -> Tensor | None:
    """This rank's partition of a weight under ZeRO-3; None where the parameter is whole. Local."""
    found: Tensor | None = getattr(parameter, PARTITION, None)
    return found


def _in_parameter(parameter: nn.Parameter, padded: Tensor) -> OwnSpan:
    """The span of a parameter that this rank's partition of ZeRO-3 holds, without its padding."""
    rank = dist.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]
    start, num_values = rank * padded.numel(), math.prod(whole_shape(parameter))
    return OwnSpan(min(start, num_values), padded.detach().flatten()[: max(num_values - start, 0)])


def _kept_by_zero_3(parameter: nn.Parameter, read: str) -> Tensor | None:
    """This rank's part of what the optimizer of ZeRO-3 keeps of a parameter; None where it does not step it."""
    optimizer: Any = parameter._z3_optimizer  # type: ignore[attr-defined]
    if not parameter.requires_grad or optimizer.get_param_id(parameter) not in optimizer.grad_position:
        return None
    kept: Tensor = getattr(optimizer, read)(parameter)
    return kept


def optimizer_groups(engine: Any) -> list[OptimizerGroup]:
    """The groups of the engine's optimizer with the model's own parameters in them. Local."""
    inner, made = step_seams.torch_optimizer(engine), _model_groups(engine.optimizer)
    return [
        OptimizerGroup(
            index,
            tuple(made[index] if made else group["params"]),
            {name: value for name, value in group.items() if name != "params"},
        )
        for index, group in enumerate(inner.param_groups if inner is not None else [])
    ]


def own_gradient(parameter: nn.Parameter) -> OwnSpan:
    """This rank's span of the reduced gradient that the optimizer is about to step with; zeros where it has none.

    Between the backward pass and the step of a batch's last micro-batch. It still has the loss scale. Local.
    """
    if hasattr(parameter, PARTITION):
        found = _kept_by_zero_3(parameter, "get_local_fp32_grad_for_param")
        return _in_parameter(parameter, torch.zeros_like(getattr(parameter, PARTITION)) if found is None else found)
    if getattr(parameter, ACCUMULATED, None) is None and parameter.grad is not None:
        return OwnSpan(0, parameter.grad.detach().flatten())
    if not hasattr(parameter, MAPPING):
        return OwnSpan(0, torch.zeros_like(parameter).detach().flatten())
    mapping = getattr(parameter, MAPPING)
    if mapping is None:
        return OwnSpan(0, parameter.detach().new_zeros(0))
    address = mapping.lp_fragment_address
    found = mapping.get_lp_grad_fragment(parameter._index_in_param_group).detach().flatten()  # type: ignore[attr-defined]
    if found.numel() == parameter.numel() != address.numel:
        found = found[address.start : address.start + address.numel]
    return OwnSpan(address.start, found)


def own_master(engine: Any, parameter: nn.Parameter) -> OwnSpan:
    """This rank's span of the weight that the optimizer steps: the fp32 copy, where it keeps one. Local."""
    if hasattr(parameter, PARTITION):
        found = _kept_by_zero_3(parameter, "get_local_fp32_param")
        return _in_parameter(parameter, getattr(parameter, PARTITION) if found is None else found)
    if hasattr(parameter, MAPPING):
        mapping = getattr(parameter, MAPPING)
        if mapping is None:
            return OwnSpan(0, parameter.detach().new_zeros(0))
        return OwnSpan(mapping.lp_fragment_address.start, mapping.hp_fragment.detach().flatten())
    beside = _master_beside(engine.optimizer, parameter)
    return OwnSpan(0, (parameter if beside is None else beside).detach().flatten())


def _model_groups(optimizer: Any) -> list[list[nn.Parameter]]:
    if hasattr(optimizer, SUB_GROUPS):  # ZeRO-3 cuts groups into parts that it steps one by one
        made: dict[int, list[nn.Parameter]] = {}
        for part, parameters in enumerate(optimizer.fp16_groups):
            made.setdefault(getattr(optimizer, SUB_GROUPS)[part], []).extend(parameters)
        return [made.get(group, []) for group in range(len(optimizer.optimizer.param_groups))]
    return next((found for name in MODEL_GROUPS if (found := getattr(optimizer, name, None))), [])


def _master_beside(optimizer: Any, parameter: nn.Parameter) -> Tensor | None:
    """The master copy in a wrapper without partitions."""
    for group, parameters in enumerate(_model_groups(optimizer)):
        for index, each in enumerate(parameters):
            if each is not parameter:
                continue
            if masters := getattr(optimizer, MASTERS, None):
                return torch.as_tensor(masters[group][index])
            if flats := getattr(optimizer, FLAT_MASTERS, None):
                start = sum(before.numel() for before in parameters[:index])
                return torch.as_tensor(flats[group]).view(-1)[start : start + parameter.numel()]
    return None


def has_partitions(engine: Any) -> bool:
    """True where each rank's optimizer holds its own span of every parameter, and no other rank has the same."""
    return bool(engine.zero_optimization())


def loss_scale(engine: Any) -> float:
    """The factor on the gradients of a backward pass; 1 without loss scaling."""
    scale = getattr(engine.optimizer, "loss_scale", None) or getattr(engine.optimizer, "cur_scale", None) or 1.0
    return float(scale)


def own_square(engine: Any) -> float:
    """This rank's share of the squared norm of all reduced gradients, without the loss scale. Local.

    Its sum over all ranks has each number once: each rank that has it gives an equal share of its square.
    """
    square = 0.0
    for parameter in engine.module.parameters():
        counts = num_counts(parameter, has_partitions(engine)) if parameter.requires_grad else 0
        if counts:
            square += float(own_gradient(parameter).values.double().square().sum()) / counts
    return square / loss_scale(engine) ** 2


class AppliedNorm:
    """Square of the norm of the gradients that reach the torch optimizer in one step, this rank's share of it.

    Its sum over all ranks is that of the whole model, each number once. Wrappers without partitions hand over copies
    of their own, and partitions beside tensor ranks or tied stages hold numbers that several ranks have beside those
    that one has: `is_known` is False there.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.square = 0.0
        wrapped = engine.optimizer is not step_seams.torch_optimizer(engine)
        counts = {num_counts(parameter, True) for parameter in engine.module.parameters()}
        self.is_known = counts == {1.0} if has_partitions(engine) else not wrapped

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A scope in which steps of the torch optimizer are seen."""
        inner = step_seams.torch_optimizer(self._engine)
        assert inner is not None, "an engine that trains has an optimizer"
        handle = inner.register_step_pre_hook(self._see)
        try:
            yield
        finally:
            handle.remove()

    def _see(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    holders = 1 if has_partitions(self._engine) else num_holders(parameter)
                    self.square += float(parameter.grad.detach().double().square().sum()) / holders if holders else 0.0


def sum_over_world(values: Tensor) -> Tensor:
    """The sum over all ranks. Collective."""
    total = values.clone()
    dist.all_reduce(total)
    return total
