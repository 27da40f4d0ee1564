"""`TensorRanks`: the tensor group that a layer's ranks belong to, and what it means for the layer's tokens.

1. All ranks route all tokens, so that capacities, losses and counts are those of a rank that is alone with them, and
   noise is drawn alike. Where the tokens come cut (Megatron's sequence parallelism) they are gathered for the gate.
2. Each rank takes its span of tokens to the experts, whose gradients then count every token once.
3. The results are gathered, but where the tokens came cut: those that are complete while others still come back.

The gate's gradient is whole on every rank, as that of any dense parameter: nobody sums it over the group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ds_moe_ep.errors import EngineError
from ds_moe_ep.kernels.sort import count_choices
from ds_moe_ep.moe.routes import Routes, Routing
from ds_moe_ep.moe.tensor_parallel.early import EarlyGather
from ds_moe_ep.moe.tensor_parallel.exchange import Spans, all_gather, begin_gather, cut, gather

PROBED_TOKENS = 16  # whose numbers tell whether ranks hold the same tokens
TOLERANCE = 1e-2  # of a probe: roundings are far below, other tokens far above


@dataclass(frozen=True, eq=False)
class TensorRanks:
    """Ranks that hold the same tokens, or with `has_own_tokens` a span each of the same sequences."""

    group: dist.ProcessGroup | None = None
    rank: int = 0
    size: int = 1
    has_own_tokens: bool = False

    def __deepcopy__(self, memo: object) -> TensorRanks:
        return self  # groups are the process's

    def __reduce__(self) -> tuple[Any, ...]:
        return TensorRanks, ()  # another process has other groups

    @property
    def is_shared(self) -> bool:
        """True where other ranks take a part of the tokens."""
        return self.size > 1

    def all_tokens(self, tokens: Tensor) -> Tensor:
        """The tokens, or marks of tokens, [T, ...] that are routed together. Collective where they come cut."""
        if not (self.is_shared and self.has_own_tokens):
            return tokens
        spans = self.spans(len(tokens) * self.size)
        return gather(spans, tokens) if tokens.is_floating_point() else spans.gather(tokens.to(torch.uint8))

    def cut(self, tokens_TD: Tensor, routes: Routes, early: EarlyGather | None = None) -> tuple[Tensor, Routes]:
        """This rank's span of the tokens, as the layer got them, and of the routes of all tokens.

        Rows go without padding where a capacity has dropped some: ranks need not send alike many. `early` may gather
        the tokens' gradient in the midst of the pass back.
        """
        if not self.is_shared:
            return tokens_TD, routes
        spans = self.spans(len(routes.expert_ids_TK))
        if self.has_own_tokens:
            (weights_TK,) = cut(spans, routes.weights_TK)
        else:
            tokens_TD, weights_TK = cut(spans, tokens_TD, routes.weights_TK, early=early)
        is_used_TK = routes.is_kept_TK if routes.capacity is not None else routes.is_used_TK
        own = replace(
            routes,
            expert_ids_TK=spans.own(routes.expert_ids_TK),
            weights_TK=weights_TK,
            is_used_TK=None if is_used_TK is None else spans.own(is_used_TK),
            is_kept_TK=None,
            place_TK=None,
            capacity=None,
        )
        if isinstance(own, Routing):
            scores_TE, logits_TE = spans.own(own.scores_TE.detach()), spans.own(own.logits_TE.detach())
            counts_KE = count_choices(own.expert_ids_TK, own.is_used_TK, scores_TE.shape[1])
            own = replace(own, scores_TE=scores_TE, logits_TE=logits_TE, counts_KE=counts_KE)
        return tokens_TD, own

    def early_gather(self, num_tokens: int) -> EarlyGather | None:
        """A gather that may begin in the midst of a pass over as many tokens as the layer got; None without any."""
        is_gathered = self.is_shared and not self.has_own_tokens and num_tokens > 0
        return EarlyGather(self.spans(num_tokens)) if is_gathered else None

    def gather(self, results_TD: Tensor, num_tokens: int, early: EarlyGather | None = None) -> Tensor:
        """The results [T, D] of as many tokens as the layer got."""
        return self.begin_gather(results_TD, num_tokens, early)()

    def begin_gather(
        self, results_TD: Tensor, num_tokens: int, early: EarlyGather | None = None
    ) -> Callable[[], Tensor]:
        """Begins to gather them, or those that are left, while the caller computes.

        The call of the result waits for them, once.
        """
        if not self.is_shared or self.has_own_tokens:
            return lambda: results_TD
        begun = None
        if early is not None and early.is_armed:
            last = early.begin_last()
            begun = lambda: last().to(results_TD.dtype)  # noqa: E731
        return begin_gather(self.spans(num_tokens), results_TD, begun)

    def beside(self, module: nn.Module, tokens: Tensor) -> Any:
        """The output of a dense module beside the experts, for the tokens [..., D] as the layer got them.

        One that is cut over the group itself takes them as they come. Any other sees all tokens where they come cut,
        so that its gradients are whole.
        """
        if not (self.is_shared and self.has_own_tokens) or is_cut(module):
            return module(tokens)
        flat = tokens.reshape(-1, tokens.shape[-1])
        spans = self.spans(len(flat) * self.size)
        output = module(gather(spans, flat))
        output = output[0] if isinstance(output, tuple) else output  # as DeepSpeed: a second output is left out
        (own,) = cut(spans, output)
        return own.view(*tokens.shape[:-1], output.shape[-1])

    def drawing_alike(self, device: torch.device, draws: bool) -> AbstractContextManager[None]:
        """A scope in which all ranks draw what the group's first one draws. Collective where something is drawn."""
        return self._drawing(device) if self.is_shared and draws else nullcontext()

    @contextmanager
    def _drawing(self, device: torch.device) -> Iterator[None]:
        on_cuda = device.type == "cuda"
        read: Callable[[], Tensor] = (lambda: torch.cuda.get_rng_state(device)) if on_cuda else torch.get_rng_state
        before = read()
        state = before.to(device)
        assert self.group is not None
        dist.broadcast(state, dist.get_global_rank(self.group, 0), group=self.group)
        if self.rank == 0:  # its own numbers go on as they would without the others
            yield
            return
        write = (lambda s: torch.cuda.set_rng_state(s, device)) if on_cuda else torch.set_rng_state
        write(state.cpu())
        try:
            yield
        finally:
            write(before)

    def spans(self, num_tokens: int) -> Spans:
        """The part of each rank of a layer's tokens. Local; only where the group shares them."""
        assert self.group is not None
        return Spans(self.group, self.rank, self.size, num_tokens)

    @torch.no_grad()
    def compare(self, tokens_TD: Tensor, name: str) -> None:
        """Raises EngineError on every rank where the ranks hold other tokens. Collective; on CUDA it does nothing."""
        if not self.is_shared or tokens_TD.device.type != "cpu":
            return
        mine = torch.tensor([float(len(tokens_TD)), probe(tokens_TD)], dtype=torch.float64)
        told = mine.new_empty(2 * self.size)
        all_gather(told, mine, group=self.group)
        counts, probes = told.view(self.size, 2).unbind(1)
        if counts.unique().numel() > 1:
            raise EngineError(
                f"{name}: the ranks of a tensor-parallel group have {counts.int().tolist()} tokens: they must have the "
                "same ones, or with sequence parallelism equally many; give all ranks of a group the same batch"
            )
        if not (self.has_own_tokens or torch.allclose(probes, probes[0], rtol=0, atol=TOLERANCE, equal_nan=True)):
            raise EngineError(
                f"{name}: the ranks of a tensor-parallel group have different tokens; give them the same batch, or set "
                "moe_ep.sequence_parallel=true where each has a part of the sequences"
            )


def probe(tokens_TD: Tensor) -> float:
    """A number that differs between other tokens, and hardly by rounding: some tokens along one direction."""
    some = tokens_TD[:: max(1, len(tokens_TD) // PROBED_TOKENS)].flatten().double()
    direction = torch.arange(len(some), dtype=torch.float64).cos()
    return float(torch.dot(some, direction) / torch.linalg.vector_norm(some).clamp(min=1e-30))


def is_cut(module: nn.Module) -> bool:
    """True where parameters carry Megatron's marks: the module itself minds the tensor group.

    Megatron marks weights of experts that it leaves whole too; its linear layers say which they are.
    """
    marks = ("model_parallel", "tensor_model_parallel", "sequence_parallel")
    of_cut = (p for part in module.modules() if not is_whole(part) for p in part.parameters(recurse=False))
    return any(getattr(parameter, mark, False) for parameter in of_cut for mark in marks)


def is_whole(module: nn.Module) -> bool:
    """True for a linear layer of Megatron-DeepSpeed's that is not cut, whatever its marks say."""
    return getattr(module, "is_expert_without_slicing", False) is True
