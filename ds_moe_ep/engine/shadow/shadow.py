"""`"verify_every": n`: every n-th step one layer, in turn, is computed again by the blocking path and compared.

Memory, links and kernels do go wrong, and a run does not show it. What differs by more than rounding explains is told
on the rank that sees it, with the layer and the ranks whose experts gave the rows. The pass that is compared is the
first micro-batch's of the step; it costs a layer's pass twice over, and nothing in other steps. In pipeline stages,
whose micro-batches are on the way together, and with copies of experts, whose gradients come home with the last one,
all passes of the batch are compared, before the optimizer steps.
"""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.engine import seams, step_seams
from ds_moe_ep.engine.extensions.callback import EngineCallback
from ds_moe_ep.engine.shadow.blocking_pass import BlockingPass, blocking_pass
from ds_moe_ep.engine.state.optimizer_view import whole_weights
from ds_moe_ep.engine.views.layers import ViewedLayer
from ds_moe_ep.engine.views.moved import ROUNDINGS, ExactAndMoved
from ds_moe_ep.engine.views.observe import Observation, ObservedPass
from ds_moe_ep.engine.views.shares import gathered_passes, owner_of_token
from ds_moe_ep.records.quantity import number

short = partial(number, significant=3)
Compared = tuple[str, Tensor, ExactAndMoved, float]  # name, this rank's value, the blocking path's, a rounding more
MAX_KEPT = 100  # findings that are kept


@dataclass(frozen=True)
class DriftFound:
    """A difference beyond rounding, on the rank whose tokens or experts have it."""

    step: int
    layer: str
    rank: int
    what: str
    distance: float
    bound: float
    experts: tuple[int, ...] = ()  # that every wrong token visited
    from_ranks: tuple[int, ...] = ()  # that hold them

    def __str__(self) -> str:
        source = f", in rows of experts {list(self.experts)} of ranks {list(self.from_ranks)}" if self.experts else ""
        return (
            f"step {self.step}: {self.layer} on rank {self.rank}: the {self.what} is off by {short(self.distance)} "
            f"from the blocking path's, and rounding explains {short(self.bound)}{source}: memory, a link or a "
            "kernel is at fault; go back to the last checkpoint, and leave the machine out"
        )


class Shadow(EngineCallback):
    """Checks one layer on every `every`-th step of an engine. Collective there, over the world.

    `findings` has what all ranks found, the same on every rank; `last_ms` is what the last check took on this one.
    """

    def __init__(self, engine: Any, layers: Sequence[ViewedLayer], every: int) -> None:
        self._engine, self._layers, self._every = engine, layers, every
        self.findings: list[DriftFound] = []
        self.last_ms: float | None = None
        self.num_checks = 0
        self._scopes = ExitStack()
        self._running: _Check | None = None

    @property
    def _takes_batch(self) -> bool:
        """True where a pass alone cannot be compared, but all of a batch's can."""
        in_stages = step_seams.runs_stages(self._engine)
        return in_stages or any(map(_has_copies, self._layers))

    def around_call(self, method: str) -> AbstractContextManager[object]:
        if method in ("forward", "train_batch") and self._is_due():
            self._begin()
        return ExitStack()

    def on_backward(self, loss: Any, proceed: Callable[[Any], Any]) -> Any:
        result = proceed(loss)
        if not self._takes_batch:
            self._finish()
        return result

    def before_model_step(self) -> None:
        if self._takes_batch:
            self._finish()

    def close(self) -> None:
        self._scopes.close()

    def _is_due(self) -> bool:
        engine = self._engine
        is_first = engine.micro_steps % engine.gradient_accumulation_steps() == 0
        is_training = step_seams.runs_stages(engine) or (engine.module.training and torch.is_grad_enabled())
        return is_training and is_first and (engine.global_steps + 1) % self._every == 0

    def _begin(self) -> None:
        """Watches the layer whose turn it is. Local."""
        self._scopes.close()  # a forward pass that nobody went backward from
        turn = (self._engine.global_steps + 1) // self._every - 1
        self._running = _Check(self._layers[turn % len(self._layers)])
        self._scopes.enter_context(self._running.watching())

    def _finish(self) -> None:
        """Compares what was seen. Collective over the world where a check runs, which it does on all ranks."""
        check, self._running = self._running, None
        if check is None:
            return
        self._scopes.close()
        began_s = self._now_s()
        found = check.found(self._engine.global_steps + 1)
        # Of what tensor ranks share, each tells the same.
        everyone = list(dict.fromkeys(each for theirs in seams.gather(found) for each in theirs))
        self.last_ms = 1000 * (self._now_s() - began_s)
        self.num_checks += 1
        self.findings = [*self.findings, *everyone][-MAX_KEPT:]
        for each in everyone:
            seams.log_rank0(f"verify_every: {each}", logging.ERROR)
        meter = getattr(self._engine, "moe_ep_meter", None)
        if meter is not None:
            meter.take_check(self._engine.global_steps + 1, self.last_ms)

    def _now_s(self) -> float:
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize(self._engine.device)
        return time.perf_counter()


class _Check:
    """One layer's pass as it runs, and the gradients of its experts before any reduction."""

    def __init__(self, layer: ViewedLayer) -> None:
        self._layer = layer
        self._observation = Observation([layer], lambda tensor: tensor.detach().clone())
        self._gradients: dict[str, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A scope in which the pass is seen."""
        stored = self._layer.stored_parameters().items()
        handles = [
            parameter.register_hook(partial(self._add, name)) for name, parameter in stored if parameter.requires_grad
        ]
        try:
            with self._observation.watching():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, name: str, gradient: Tensor) -> None:
        before = self._gradients.get(name)
        self._gradients[name] = gradient.detach().clone() if before is None else before + gradient

    def found(self, step: int) -> list[DriftFound]:
        """The differences on this rank. Collective over the layer's group, and its tensor ranks."""
        passes = self._observation.take()[self._layer.name]
        if self._layer.problem_of_oracle() or not self._all_have(len(passes)):
            return []
        seen = gathered_passes(self._layer.tensor_ranks, passes)
        with whole_weights(self._layer.layer.parameters()):
            asked = [blocking_pass(self._layer, each) for each in seen]
        pairs = list(zip(seen, asked, strict=True))
        found = [(each, found) for each, pass_asked in pairs for found in self._tokens_compared(each, pass_asked)]
        found += [(seen[0], of_expert) for of_expert in self._experts_compared(asked)] if pairs else []
        return [self._finding(step, each, *differing) for each, differing in found if _is_beyond(*differing[1:])]

    def _all_have(self, num_passes: int) -> bool:
        """True where all ranks of the layer's group saw as many passes: of others nothing can be told. Collective."""
        if self._layer.group is None:
            return True
        counts = [0] * dist.get_world_size(self._layer.group)
        dist.all_gather_object(counts, num_passes, group=self._layer.group)
        return len(set(counts)) == 1

    def _tokens_compared(self, seen: ObservedPass, asked: BlockingPass) -> Iterator[Compared]:
        """The values of tokens of one pass."""
        has_more = self._layer.adds_more()
        if seen.y_TD is not None and not (has_more or seen.has_residual):
            yield "output", seen.y_TD, asked.y_TD, 0.0
        if seen.dweights_TK is not None:
            yield "gradient of the routing weights", seen.dweights_TK, asked.dweights_TK, 0.0
        if seen.dx_TD is not None and not has_more and seen.num_uses < 2:
            through_gate = 0 if seen.dgate_TD is None else seen.dgate_TD.to(asked.dx_TD.exact)
            own = seen.dx_TD.to(asked.dx_TD.exact) - through_gate
            yield "gradient of its tokens", own, asked.dx_TD, torch.finfo(seen.type).eps * float(seen.dx_TD.norm())

    def _experts_compared(self, asked: Sequence[BlockingPass]) -> Iterator[Compared]:
        """The gradients of the local experts over all passes."""
        for local in range(self._layer.num_local):
            for name, stored in self._layer.expert_tensors(local).items():
                if stored.name in self._gradients:
                    whole = reduce(operator.add, [each.experts[local][name] for each in asked])
                    told = f"gradient of expert {self._layer.expert_of(local)} {name}"
                    yield told, stored.of(self._gradients[stored.name]), whole, 0.0

    def _finding(
        self, step: int, seen: ObservedPass, what: str, own: Tensor, asked: ExactAndMoved, more: float
    ) -> DriftFound:
        bound, distance, is_of_tokens = asked.bound + ROUNDINGS * more, asked.distance(own), " expert " not in what
        if not is_of_tokens:
            return DriftFound(step, self._layer.name, dist.get_rank(), what, distance, bound)
        off_T = (own.to(asked.exact) - asked.exact).norm(dim=1)
        rank = owner_of_token(self._layer.tensor_ranks, len(off_T), int(off_T.argmax()))
        experts = self._common_experts(seen, off_T, asked) if what == "output" else ()
        ranks = dict.fromkeys(self._rank_of(expert) for expert in experts)
        return DriftFound(step, self._layer.name, rank, what, distance, bound, experts, tuple(ranks))

    def _common_experts(self, seen: ObservedPass, off_T: Tensor, asked: ExactAndMoved) -> tuple[int, ...]:
        """The experts that every wrong token visited."""
        assert seen.ids_TK is not None and seen.kept_TK is not None
        wrong_T = off_T > ROUNDINGS * (asked.moved - asked.exact).norm(dim=1)
        visited = [
            set(ids_K[kept_K].tolist())
            for ids_K, kept_K in zip(seen.ids_TK[wrong_T], seen.kept_TK[wrong_T], strict=True)
        ]
        return tuple(sorted(set.intersection(*visited))) if visited else ()

    def _rank_of(self, expert: int) -> int:
        """The rank of the world that holds an expert of this rank's group."""
        place, group = expert // self._layer.num_local, self._layer.group
        return dist.get_rank() if group is None else dist.get_global_rank(group, place)


def _has_copies(layer: ViewedLayer) -> bool:
    """True where copies of the layer's experts take a part of their rows."""
    overlapped = getattr(layer.inner, "overlap", layer.inner)  # a hooked layer's knobs are its hook's
    config = getattr(overlapped, "config", None)
    return bool(config is not None and config.replicas and layer.ep_size > 1)


def _is_beyond(own: Tensor, asked: ExactAndMoved, more: float) -> bool:
    """True where a value is further from the blocking path's than rounding explains; that one overflowed: False."""
    return bool(asked.exact.isfinite().all()) and not asked.distance(own) <= asked.bound + ROUNDINGS * more
