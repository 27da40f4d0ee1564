"""A layer that DeepSpeed made and the package moves rows for: what all kinds of them share.

A hooked layer changes its class to a subclass of its own class and gets one attribute, `overlap`. Parameters, buffers,
names and state-dict keys stay what they were, and so does the way back.
"""

from __future__ import annotations

import copy
from typing import Any, SupportsIndex

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.engine.layouts.tensor import OWN_MARK, mark_as_apart
from ds_moe_ep.errors import ConfigError, EngineError
from ds_moe_ep.moe.balance import BatchLoad, StepsBias
from ds_moe_ep.moe.dispatcher import Dispatcher
from ds_moe_ep.moe.replay.tape import Chosen, Tape
from ds_moe_ep.moe.replicas.replicas import Known
from ds_moe_ep.moe.tensor_parallel.ranks import TensorRanks
from ds_moe_ep.moe.tuner import Choice

# What a hooked layer takes from a configuration: how rows move. Which experts tokens visit is its own gate's to say.
TRAFFIC = (
    "replicas",
    "replica_traffic",
    "replica_pass_share",
    "node_size",
    "sequence_parallel",
    "schedule",
    "retune_drift",
    "chunks",
    "peer_group_size",
    "row_cuts",
    "depth",
    "two_level",
    "transport",
    "kernels",
    "meter_every",
    "verify_every",
    "watch",
    "report_every",
    "heat_map_every",
    "async_save",
    "check_crc",
    "timeout_s",
)

BALANCE = ("balance", "bias_step")  # what a section may say of a bias that a hooked gate chooses with

MARKS = ("allreduce", "group_name")  # DeepSpeed's, on parameters of experts


class HookedLayer:
    """One hooked layer as the engine's extensions see it (`overlapped_layer.OverlappedLayer`)."""

    tape: Tape | None = None  # records or replays its routes
    batch_load: BatchLoad | None = None  # its gate is DeepSpeed's, and so are its losses
    group: dist.ProcessGroup  # DeepSpeed's, of the ranks that share its experts

    def __init__(self, kind: str, name: str, config: MoEConfig) -> None:
        self.kind = kind
        self.dispatcher = Dispatcher(config, name)
        self.tensor_ranks = TensorRanks()
        self._marked: list[nn.Parameter] = []
        self.last_counts_E = torch.zeros(config.num_experts, dtype=torch.int64)

    def __deepcopy__(self, memo: dict[int, Any]) -> HookedLayer:
        """The hook of a copied layer: on the same links and groups, which are the process's."""
        memo[id(self.group)] = self.group
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def share_tokens(self, layer: Any) -> None:
        """Shares the tokens of the layer that is to be hooked with its tensor ranks. Collective over them."""
        raise NotImplementedError

    @property
    def balance(self) -> StepsBias | None:
        """The bias that its gate chooses with, where it is to be moved."""
        return None

    def problem_of_balance(self) -> str:
        """Why its bias cannot be moved as the configuration says, or an empty string."""
        raise NotImplementedError

    def problem_of_replay(self) -> str:
        """Why its routes can be neither recorded nor replayed, or an empty string."""
        return ""

    def chosen(self, x_TD: Tensor) -> Chosen | None:
        """The choices that a record has for the tokens of a pass; None where the gate chooses."""
        return None if self.tape is None else self.tape.chosen(x_TD)

    def attach(self) -> None:
        """Puts the hook in. Local."""
        raise NotImplementedError

    def remove(self) -> None:
        """Makes the layer what it was. Local."""
        raise NotImplementedError

    def mark_experts(self, experts: nn.Module) -> None:
        """Lets DeepSpeed's norms count the experts of every tensor rank, until `unmark_experts`. Local."""
        self._marked = mark_as_apart(experts)

    def unmark_experts(self) -> None:
        """Takes the marks away that `mark_experts` made. Local."""
        for parameter in self._marked:
            vars(parameter).pop(OWN_MARK, None)
        self._marked = []

    @property
    def ep_size(self) -> int:
        return self.config.ep_size

    @property
    def config(self) -> MoEConfig:
        """Its knobs as they are in force."""
        return self.dispatcher.config

    def known_experts(self) -> Known | None:
        """Its experts by their weights; None where their mathematics is unknown."""
        raise NotImplementedError

    @property
    def choice(self) -> Choice | None:
        """The schedule that 'auto' chose; None before the first pass of training."""
        return self.dispatcher.choice


def check_width(x: Tensor, width: int, name: str) -> None:
    """Raises ConfigError where tokens are not of the layer's width."""
    if x.dim() == 0 or x.shape[-1] != width:
        raise ConfigError(
            f"{name}: input.shape={tuple(x.shape)}: the layer was made for hidden_size={width}; the last dimension "
            "must be that"
        )


def copied(layer: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy of a hooked layer for copy.deepcopy, hooked itself: parameters of its own, on the same process groups.

    DeepSpeed's plain layers cannot be copied, since they hold process groups. Its marks on expert parameters, which
    torch leaves out of copies, go along; the loss of the last pass stays without its graph.
    """
    for value in (value for module in layer.modules() for value in vars(module).values()):
        if isinstance(value, dist.ProcessGroup) or type(value).__name__ == "FoldingGroupHandles":
            memo[id(value)] = value
        elif isinstance(value, Tensor) and value.grad_fn is not None:
            memo[id(value)] = value.detach().clone()
    twin = type(layer).__new__(type(layer))
    memo[id(layer)] = twin
    twin.__setstate__(copy.deepcopy(vars(layer), memo))
    for theirs, mine in zip(layer.parameters(), twin.parameters(), strict=True):
        vars(mine).update({name: vars(theirs)[name] for name in MARKS if name in vars(theirs)})
    return twin


def refuse_pickling(layer: nn.Module, protocol: SupportsIndex) -> str:
    """Raises EngineError: a hooked layer holds communicators, and so does DeepSpeed's own."""
    raise EngineError(
        f"{type(layer).__name__} cannot be pickled: it holds communicators of this process, as DeepSpeed's own layer "
        "does; save engine.module.state_dict() or call engine.save_checkpoint, or copy.deepcopy the model"
    )


def balance_of(config: MoEConfig, given: frozenset[str]) -> dict[str, object]:
    """The knobs of a section that move a hooked layer's bias; none where it does not ask for that."""
    return {name: getattr(config, name) for name in BALANCE} if "balance" in given and config.balance == "bias" else {}


def traffic_of(config: MoEConfig) -> dict[str, object]:
    """The knobs of a configuration that a hooked layer takes."""
    return {name: getattr(config, name) for name in TRAFFIC}


def swap_class(module: nn.Module, cls: type[nn.Module], overlap: object) -> None:
    """Gives the module a subclass of its class, and what it needs."""
    assert issubclass(cls, type(module))
    module.__dict__["overlap"] = overlap  # not a submodule, a parameter or a buffer
    module.__class__ = cls


def restore_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Gives the module its own class back."""
    module.__class__ = cls
    del module.__dict__["overlap"]
