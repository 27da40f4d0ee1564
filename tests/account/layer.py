"""The real layer on meta tensors, as one rank of a torus, with every part of it under an account.

Routing is even: each expert gets as many rows from each rank. The transport moves nothing but the rank's own rows, and
counts its messages.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import Tensor

from ds_moe_ep.comm.lanes import Inline
from ds_moe_ep.comm.transport import Done, Loopback, Message
from ds_moe_ep.config.knobs import MoEConfig
from ds_moe_ep.config.topology import Torus
from ds_moe_ep.kernels import activation, gate, sort
from ds_moe_ep.kernels import permute as permute_ops
from ds_moe_ep.moe import agreement, router, split_experts
from ds_moe_ep.moe.dispatcher import Dispatcher
from ds_moe_ep.moe.experts import GeluMLP, SwiGLU
from ds_moe_ep.moe.grouped.experts import GroupedPass
from ds_moe_ep.moe.layer import ExpertParallel
from ds_moe_ep.schedule.spans import NO_TAGS, Tags
from ds_moe_ep.schedule.two_level import copies_share
from tests.account.counting import Account, Launch
from tests.account.kernels import stand_ins


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """One layer's sizes; by default the specification's: 16 experts on 4 nodes of 4, 10,000 tokens per rank, fp16."""

    num_tokens: int = 10_000
    width: int = 8192
    expert_width: int = 32_768
    num_experts: int = 16
    top_k: int = 1
    torus: Torus = field(default_factory=lambda: Torus(4, 4))
    dtype: torch.dtype = torch.float16
    expert: str = "gelu"
    schedule: str = "peers"
    knobs: dict[str, Any] = field(default_factory=dict)
    residual: str = ""  # added to the output: "inside" of the layer, "outside" of it, or not at all
    is_reentrant: bool = False  # of the checkpoint around the layer: torch's own, as in the package's model

    @property
    def token_bytes(self) -> int:
        """Bytes of all tokens of a rank: one pass over them."""
        return self.num_tokens * self.width * self.dtype.itemsize


@dataclass(frozen=True)
class LayerAccount:
    """Demands of a forward pass, its recomputation and the backward pass on a device."""

    sizes: Sizes
    forward: Sequence[Launch]
    recomputed: Sequence[Launch]
    backward: Sequence[Launch]
    peak_bytes: int
    peak_at: str
    num_messages: int
    far_bytes: Mapping[str, int]  # that left the node in each pass and lane; the recomputed forward pass counts too

    @property
    def all(self) -> list[Launch]:
        return [*self.forward, *self.recomputed, *self.backward]


class Counted(Loopback):
    """Rank 0 of a torus: its own rows stay, nothing else moves."""

    rank = 0

    def __init__(self, torus: Torus, account: Account) -> None:
        self.size, self.ranks, self._account = torus.size, range(torus.size), account
        self._node_size = torus.node_size
        self.num_messages = 0
        self.far_bytes: dict[str, int] = {}

    def start(self, lane: str, sends: Sequence[Message], receives: Sequence[Message], tags: Tags = NO_TAGS) -> Done:
        own = ([m for m in messages if m.peer == 0] for messages in (sends, receives))
        with self._account.at("own rows"):
            for sent, received in zip(*own, strict=True):
                received.rows.copy_(sent.rows)
        self.num_messages += sum(bool(m.peer and len(m)) for m in (*sends, *receives))
        far = sum(message.num_bytes for message in sends if message.peer >= self._node_size)
        self.far_bytes[f"{tags.phase} {lane}"] = self.far_bytes.get(f"{tags.phase} {lane}", 0) + far
        return Done()

    def exchange_counts(self, counts_PC: Tensor, tags: Tags = NO_TAGS) -> Tensor:
        return counts_PC.clone()

    def sum(self, values: Tensor, tags: Tags = NO_TAGS) -> Tensor:
        return values.clone()


def count(sizes: Sizes) -> LayerAccount:
    """The account of one layer: forward without gradient, forward again, and backward, as with recomputation."""
    account = Account()
    with _instrumented(sizes, account):
        layer, transport = _layer(sizes, account)
        x_TD = torch.empty(sizes.num_tokens, sizes.width, dtype=sizes.dtype, device="meta", requires_grad=True)
        r_TD = torch.empty_like(x_TD, requires_grad=bool(sizes.residual))
        marks: list[int] = []

        def run(x_TD: Tensor) -> tuple[Tensor, Tensor]:
            marks.append(len(account.launches))
            y_TD, loss, _ = layer(x_TD, residual=r_TD) if sizes.residual == "inside" else layer(x_TD)
            y_TD = r_TD + y_TD if sizes.residual == "outside" else y_TD
            marks.append(len(account.launches))
            return y_TD, loss

        with account, account.at("autograd"):
            y = torch.utils.checkpoint.checkpoint(run, x_TD, use_reentrant=sizes.is_reentrant)
            grads = [torch.empty_like(each) for each in y]
            torch.autograd.backward(y, grads)
    launches = account.launches
    start, stop, again = marks[:3]
    end, last = next(i for i in range(again, len(launches)) if launches[i].where == "unpermute backward"), len(launches)
    return LayerAccount(
        sizes,
        launches[start:stop],
        launches[again:end],
        [*launches[stop:again], *launches[end:last]],
        account.peak_bytes,
        account.peak_at,
        transport.num_messages,
        transport.far_bytes,
    )


def _layer(sizes: Sizes, account: Account) -> tuple[ExpertParallel, Counted]:
    knobs = {"aux_loss_weight": 0.02, "z_loss_weight": 0.001, "depth": 1, **sizes.knobs}
    size = sizes.torus.size
    config = MoEConfig(num_experts=sizes.num_experts, ep_size=size, top_k=sizes.top_k, schedule=sizes.schedule, **knobs)  # type: ignore[arg-type]
    expert = {"gelu": GeluMLP, "swiglu": SwiGLU}[sizes.expert]
    with account, torch.device("meta"):  # parameters are alive at the peak, too
        layer = ExpertParallel(sizes.width, expert(sizes.width, sizes.expert_width), config).to(sizes.dtype)
        layer.experts.lay_together()  # as in an engine's flat buffer
    account.launches.clear()
    transport = Counted(sizes.torus, account)
    layer.connect(transport, sizes.torus)
    dispatcher = layer.dispatcher
    dispatcher._lanes, dispatcher._device = Inline(), torch.device("meta")
    dispatcher._begin_backward = lambda *call: None  # on CUDA it asks nobody
    return layer, transport


@contextlib.contextmanager
def _instrumented(sizes: Sizes, account: Account) -> Iterator[None]:
    """The layer's parts under the account's names, our kernels as single launches, even counts."""
    places = [
        (permute_ops._Permute, "forward", "permute"),
        (permute_ops._Permute, "backward", "permute backward"),
        (permute_ops._Unpermute, "forward", "unpermute"),
        (permute_ops._Unpermute, "backward", "unpermute backward"),
    ]
    for kind in (split_experts.GeluPass, split_experts.SwiGLUPass, GroupedPass):
        places += [(kind, "compute", "experts"), (kind, "input_grads", "input gradients")]
        places += [(kind, "add_weight_grads", "weight gradients"), (kind, "weight_grads", "weight gradients")]
    places += [(router.Router, "forward", "gate"), (Dispatcher, "_permute_early", "permute")]
    with contextlib.ExitStack() as stack:
        for owner, name, where in places:
            is_static = isinstance(owner.__dict__.get(name), staticmethod)
            inside = account.wrap(getattr(owner, name), where)
            stack.enter_context(mock.patch.object(owner, name, staticmethod(inside) if is_static else inside))
        stack.enter_context(mock.patch.object(agreement, "CopyToHost", _EvenCounts.of(sizes)))
        stack.enter_context(mock.patch.object(agreement.Agreement, "check", _all_alike))
        stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", lambda kind: False))
        stack.enter_context(mock.patch.object(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext()))
        stack.enter_context(_standing_in(stand_ins(account)))
        for module in (permute_ops, activation, gate, sort, router):
            stack.enter_context(mock.patch.object(module, "runs_triton", lambda *args: True))
        yield


@contextlib.contextmanager
def _standing_in(modules: Mapping[str, ModuleType]) -> Iterator[None]:
    """These modules in place of their namesakes, and no other module's place changed."""
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    yield
    for name, module in before.items():
        if module is None:
            del sys.modules[name]
        else:
            sys.modules[name] = module


def _all_alike(self: agreement.Agreement, own: Any, rows: Any, device: torch.device) -> None:
    return None


class _EvenCounts:
    """The exchanged counts, where each expert gets as many rows from each rank: meta tensors hold no numbers."""

    sizes = Sizes()

    @classmethod
    def of(cls, sizes: Sizes) -> type[_EvenCounts]:
        return type("EvenCounts", (cls,), {"sizes": sizes})

    def __init__(self, told_PC: Tensor) -> None:
        self._num_counts = (told_PC.shape[1] - agreement.NUM_HEAD) // 2  # received, and sent

    def wait(self) -> list[list[int]]:
        sizes = self.sizes
        num_local = sizes.num_experts // sizes.torus.size
        rows = sizes.num_tokens * sizes.top_k // sizes.num_experts
        head = [0] * agreement.NUM_HEAD
        if sizes.knobs.get("two_level", "off") != "off":  # everybody tells its rows per expert and copies per node
            torus = sizes.torus
            share = copies_share(sizes.num_experts, sizes.top_k, torus.num_nodes)
            copies = round(share * rows * sizes.num_experts / torus.num_nodes)
            told = [[rows] * sizes.num_experts + [copies] * torus.num_nodes for _ in range(torus.size)]
            for rank in range(torus.size):
                told[rank][sizes.num_experts + rank // torus.node_size] = 0
            return [[*head, *each, *each] for each in told]
        assert self._num_counts == num_local
        return [[*head, *[rows] * (2 * num_local)]] * sizes.torus.size
