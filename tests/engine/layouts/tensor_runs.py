"""Runs of `TensorModel` in engines on 4 ranks, and in one process in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.engine.layouts.tensor_models import (
    NUM_EXPERTS,
    TENSOR_SIZE,
    Dense,
    LoopExperts,
    TensorJob,
    TensorModel,
    mpu_of,
)  # fmt: skip
from tests.engine.native_layers import PlainGelu
from tests.moe.layer_cases import D
from tests.moe.replica_cases import copies_in, let_rows_count_alone

AUTOTP = {
    "tensor_parallel": {
        "autotp_size": TENSOR_SIZE,
        "partition_config": {
            "use_default_specs": False,
            "layer_specs": [
                {"patterns": [r".*dense\.\d+\.up\.weight$"], "partition_type": "column"},
                {"patterns": [r".*dense\.\d+\.down\.weight$"], "partition_type": "row"},
            ],
        },
    }
}
PLAN = {"tensor_parallel": {"partition_config": AUTOTP["tensor_parallel"]["partition_config"]}}  # of `tp_model_init`


@dataclass(frozen=True)
class Trained:
    """What two steps did."""

    losses: list[float]
    norms: list[float]  # of the gradients, before they are clipped
    moves: dict[str, Tensor]  # of each parameter, by its name on one device
    routes: dict[str, list[Tensor]] = field(default_factory=dict)  # each pass' experts [T, K], by layer, if recorded
    marks: tuple[str, ...] = ()  # of gathers, and of shared experts at their work, in the first pass
    num_hosted: int = 0  # copies of experts on other ranks, at the end

    def distance(self, other: Trained) -> float:
        """The largest difference in a move, over that tensor's largest, or in a loss or norm, relative.

        Infinite where both know their routes, which differ.
        """
        for name in self.routes.keys() & other.routes.keys():
            if not all(map(torch.equal, self.routes[name], other.routes[name])):
                return math.inf
        assert self.moves.keys() == other.moves.keys(), sorted(self.moves.keys() ^ other.moves.keys())
        numbers = zip([*self.losses, *self.norms], [*other.losses, *other.norms], strict=True)
        of_numbers = [abs(mine - theirs) / abs(theirs) for mine, theirs in numbers]
        of_moves = [
            float((self.moves[name].double() - move.double()).abs().max() / move.abs().max().clamp(min=1e-4))
            for name, move in other.moves.items()
        ]
        return max(*of_numbers, *of_moves)


def make_layer(job: TensorJob) -> nn.Module:
    from deepspeed.moe.layer import MoE as Native

    from ds_moe_ep import MoE

    if job.kind == "ours":
        shared = PlainGelu(bias=True) if job.shared else None
        return MoE(D, PlainGelu(bias=True), use_residual=job.residual, config=job.config, shared=shared)
    config = job.config
    return Native(
        D, PlainGelu(bias=True), num_experts=NUM_EXPERTS, ep_size=job.ep_size, k=job.top_k, use_residual=job.residual,
        capacity_factor=config.capacity_factor or 1.0, min_capacity=1, drop_tokens=config.capacity_factor is not None,
        use_rts=False, top2_2nd_expert_sampling=False,
    )  # fmt: skip


def run_job(job: TensorJob, keys: dict[str, Any] | None = None) -> Trained | str:
    """The job on this rank: the moves of its own parameters; or the error that the package raised."""
    import deepspeed
    from deepspeed.runtime.tensor_parallel import init_utils

    import ds_moe_ep
    from ds_moe_ep.engine.layouts.known_groups import forget_groups
    from ds_moe_ep.model.initialize import global_name

    ds_moe_ep.init_distributed()
    is_cut_by_autotp, is_recorded = bool(keys), keys == PLAN
    grid = mpu_of(TENSOR_SIZE, job.prefix)
    model = TensorModel(job, lambda _: make_layer(job), None if is_cut_by_autotp else grid)
    model.grid = grid
    give_weights(model, job)
    if is_recorded:  # for all engines that this process makes from now on
        model = deepspeed.tp_model_init(model, tp_size=TENSOR_SIZE, dtype=job.dtype)
    with planted(job.fault):
        try:
            engine, *_ = (ds_moe_ep.initialize if job.through_own_door else deepspeed.initialize)(
                model=model,
                optimizer=torch.optim.SGD(parameter_groups(model), lr=job.rate),
                mpu=None if is_cut_by_autotp else grid,
                config=job.ds_config(keys or {}),
            )
            attached = nullcontext()
            if job.kind != "native" and not job.through_own_door:
                traffic = {"schedule": "peers"} | job.knobs
                attached = ds_moe_ep.attach_overlap(engine, traffic if job.kind == "hooked" else None)
            let_rows_count_alone(engine.module)
            copy = dist.get_rank() // TENSOR_SIZE
            with attached, marked(model, job) as marks, routed(engine, job, copy) as record:
                before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
                losses, norms = train(engine, job)
                hosted = copies_in(model)
        except ds_moe_ep.MoEError as error:
            return f"{type(error).__name__}: {error}"
        finally:
            forget_groups()
            init_utils._TP_MODEL_INIT_ARGS = None
    index = job.expert_index(dist.get_rank())
    moves = {
        global_name(name, index): (parameter.detach() - before[name]).float()
        for name, parameter in model.named_parameters()
    }
    return Trained(losses, norms, moves, {} if record is None else experts_of(record), tuple(marks[:6]), hosted)


@contextmanager
def marked(model: nn.Module, job: TensorJob) -> Iterator[list[str]]:
    """A scope in which gathers and shared experts leave marks, where the job has any."""
    from ds_moe_ep.moe.tensor_parallel.ranks import TensorRanks

    begin, marks = TensorRanks.begin_gather, list[str]()

    def marking(ranks: TensorRanks, *results: Any) -> Callable[[], Tensor]:
        marks.append("begins")
        finish = begin(ranks, *results)

        def ends() -> Tensor:
            marks.append("ends")
            return finish()

        return ends

    shared = [layer.deepspeed_moe.shared for layer in model.layers] if job.shared else []
    hooks = [module.register_forward_hook(lambda *_: marks.append("computes")) for module in shared]
    with patch.object(TensorRanks, "begin_gather", marking) if job.shared else nullcontext():
        yield marks
    for hook in hooks:
        hook.remove()


@contextmanager
def routed(engine: Any, job: TensorJob, copy: int) -> Iterator[Any]:
    """A scope in which the job's routes are recorded, replayed or neither. Collective."""
    import ds_moe_ep
    from ds_moe_ep.moe.replay.record import LayerRoutes, RouteRecord

    if job.replays:
        of_others = job.fault == "other records" and dist.get_rank() % TENSOR_SIZE
        drawn = {f"layers.{layer}": job.drawn_routes(layer + of_others) for layer in range(2)}
        layers = {
            name: LayerRoutes(NUM_EXPERTS, job.top_k, [each[copy].int() for each in passes])
            for name, passes in drawn.items()
        }
        with ds_moe_ep.replay_routes(engine, RouteRecord(layers)):
            yield None
    elif job.records:
        with ds_moe_ep.record_routes(engine) as record:
            yield record
    else:
        yield None


def experts_of(record: Any) -> dict[str, list[Tensor]]:
    """The experts [1, T, K] of each pass, also of choices that a capacity dropped."""
    return {
        name: [torch.where(coded < -1, -2 - coded, coded).long()[None] for coded in layer.passes]
        for name, layer in record.layers.items()
    }


def joined_routes(by_copy: Sequence[Trained]) -> dict[str, list[Tensor]]:
    """The recorded routes [copies, T, K] of all copies."""
    return {
        name: [torch.cat(each) for each in zip(*(result.routes[name] for result in by_copy), strict=True)]
        for name in by_copy[0].routes
    }


def train(engine: Any, job: TensorJob) -> tuple[list[float], list[float]]:
    copy = dist.get_rank() // TENSOR_SIZE
    losses, norms = [], []
    for number, x in enumerate(job.batches(), 1):
        loss = engine(x[copy].to(job.dtype))
        engine.backward(loss)
        engine.step()
        total = loss.detach().float()
        dist.all_reduce(total)
        losses.append(float(total) / dist.get_world_size())
        if number % job.accumulation == 0:
            norms.append(float(engine.get_global_grad_norm()))
    return losses, norms


def parameter_groups(model: nn.Module) -> Any:
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as split

    return split({"params": list(model.parameters()), "name": "all"})


@torch.no_grad()
def give_weights(model: nn.Module, job: TensorJob, rename: Callable[[str], str] = str) -> None:
    """The first weights, which depend on their names alone; a tensor rank's part of those that are cut."""
    from ds_moe_ep.model.initialize import first_value, global_name

    rank = dist.get_rank() if dist.is_initialized() else 0
    index = job.expert_index(rank)
    for owner_name, owner in model.named_modules():
        for own_name, parameter in owner.named_parameters(prefix=owner_name, recurse=False):
            name = rename(own_name)
            shape = list(parameter.shape)
            is_cut = ".up." in f".{name}" or ".down." in f".{name}"
            dim = 0 if ".up." in name else 1
            if is_cut and getattr(parameter, "tensor_model_parallel", False):
                shape[dim] *= TENSOR_SIZE
            value = 2 * first_value(global_name(name, index), torch.Size(shape), 3, 1)
            if value.shape != parameter.shape:
                value = value.chunk(TENSOR_SIZE, dim)[rank % TENSOR_SIZE]
            parameter.copy_(value)


@contextmanager
def planted(fault: str) -> Iterator[None]:
    """A scope in which the package, or DeepSpeed's own layer, has a fault."""
    from deepspeed import comm
    from deepspeed.moe import mappings

    from ds_moe_ep.engine.layouts import tensor
    from ds_moe_ep.moe.tensor_parallel import early, exchange, ranks

    begin = exchange.Spans.begin
    late = patch.object(ranks.TensorRanks, "early_gather", lambda *_: None)

    def forgets(spans: exchange.Spans, share: Tensor) -> Callable[[], Tensor]:
        """Only the rank's own part comes back."""
        rows = share.new_zeros(spans.num_tokens, *share.shape[1:])
        spans.own(rows).copy_(share)
        return lambda: rows

    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(forgets(context.spans, gradient)() for gradient in gradients)

    def loses(arriving: early._Arriving) -> None:
        arriving._all_TD.index_fill_(0, arriving._tokens_n, 0)

    def twice(spans: exchange.Spans, share: Tensor) -> Callable[[], Tensor]:
        finish = begin(spans, share)
        return lambda: 2 * finish()

    def everything(ranks: Any, tokens: Tensor, routes: Any, *_: Any) -> tuple[Tensor, Any]:
        """Each rank takes all tokens to the experts."""
        return tokens, routes

    def other_ranks(*_: Any) -> Any:
        grid = mpu_of(TENSOR_SIZE)
        return ranks.TensorRanks(grid.get_data_parallel_group(), grid.get_data_parallel_rank(), TENSOR_SIZE)

    def flat(output: Tensor, share: Tensor, group: Any) -> Any:
        """gloo takes no other."""
        return comm.all_gather_into_tensor(output, share.flatten(), group=group)

    faults: dict[str, Any] = {
        "": nullcontext(),
        "other records": nullcontext(),  # in `routed`
        "results of a piece that are lost": patch.object(early._Arriving, "wait", loses),
        "gradients of a piece that are lost": patch.object(early, "gradients_of", no_gradients),
        "results that are not gathered": both(late, patch.object(exchange.Spans, "begin", forgets)),
        "gradients that are not gathered": patch.object(exchange._Cut, "backward", staticmethod(backward)),
        "a gradient counted twice": patch.object(exchange.Spans, "begin", twice),
        "tokens counted twice": patch.multiple(
            ranks.TensorRanks,
            cut=everything,
            early_gather=lambda *_: None,
            begin_gather=lambda ranks, results, *_: lambda: results,
        ),
        "a group of the wrong ranks": patch.object(tensor, "tensor_ranks_of", other_ranks),
        "experts without a mark": patch.object(tensor, "mark_as_apart", lambda experts: []),
    }
    with faults[fault], patch.object(mappings.deepspeed, "comm", _Flat(comm, flat)):
        yield


def no_gradients(maps: Any, in_triton: Any, tokens_n: Tensor, rows_ND: Tensor) -> Tensor:
    return rows_ND.new_zeros(len(tokens_n), rows_ND.shape[1])


@contextmanager
def both(first: AbstractContextManager[Any], second: AbstractContextManager[Any]) -> Iterator[None]:
    with first, second:
        yield


class _Flat:
    """DeepSpeed's communication as its tensor mappings see it, whose gather gloo can do."""

    def __init__(self, comm: Any, gather: Callable[..., Any]) -> None:
        self._comm, self.all_gather_into_tensor = comm, gather

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)


def run_jobs(jobs: Sequence[tuple[TensorJob, dict[str, Any] | None]]) -> list[Trained | str]:
    return [run_job(job, keys) for job, keys in jobs]


def merged(by_rank: Sequence[Trained | str]) -> Trained | str:
    """All ranks' moves as one device would make them; those that several ranks have must be equal."""
    whole: dict[str, Tensor] = {}
    for result in by_rank:
        if isinstance(result, str):
            return result
    parts = [result.moves for result in by_rank if isinstance(result, Trained)]
    for name in {name: None for moves in parts for name in moves}:
        holders = [moves[name] for moves in parts if name in moves]
        if name.startswith("dense."):
            assert all(torch.equal(a, b) for a, b in zip(holders[:TENSOR_SIZE], holders[TENSOR_SIZE:], strict=True))
            whole[name] = torch.cat(holders[:TENSOR_SIZE], 0 if ".up." in name else 1)
            continue
        assert all(torch.equal(holders[0], other) for other in holders), f"ranks' {name} differ"
        whole[name] = holders[0]
    trained = [result for result in by_rank if isinstance(result, Trained)]
    copies = [trained[first::TENSOR_SIZE] for first in range(TENSOR_SIZE)]
    routes = [joined_routes(by_copy) for by_copy in copies]
    for others in routes[1:]:  # every tensor rank records all tokens of its copy
        assert all(all(map(torch.equal, others[name], passes)) for name, passes in routes[0].items())
    return replace(trained[0], moves=whole, routes=routes[0])


def reference(job: TensorJob) -> Trained:
    """The same steps in one process and float64, from the weights and tokens that the ranks have."""
    from ds_moe_ep.model.initialize import global_name

    model = TensorModel(job, lambda index: LoopExperts(job, index))
    assert all(isinstance(dense, Dense) for dense in model.dense)
    give_weights(model, job)
    model.to(job.dtype).double()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=job.rate)
    losses, norms = [], []
    for number, x in enumerate(job.batches(), 1):
        loss = model(x.flatten(0, 1).to(job.dtype).double())
        (loss / job.accumulation).backward()
        losses.append(float(loss.detach()))
        if number % job.accumulation == 0:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), job.clipping or 1e9)))
            optimizer.step()
            optimizer.zero_grad()
    moves = {global_name(name): parameter.detach() - before[name] for name, parameter in model.named_parameters()}
    return Trained(losses, norms, moves, {f"layers.{i}": layer.routes for i, layer in enumerate(model.layers)})
