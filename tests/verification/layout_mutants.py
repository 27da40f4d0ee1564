"""Faults beside tensor ranks, sequence ranks and in pipeline stages, one at least per kind of group that they have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from ds_moe_ep.engine.state.optimizer_view import own_master
from ds_moe_ep.engine.views.layers import viewed_layers
from ds_moe_ep.moe.tensor_parallel.ranks import TensorRanks
from tests.engine.layouts.tensor_runs import planted
from tests.verification.engines import OFFLOAD, ZERO_3
from tests.verification.layouts import AUTOTP_RANKS, CUT, FOLDED, FOLDED_3, SEQUENCE, STAGES, TENSOR
from tests.verification.mutants import (
    MORE_MUTANTS,
    MUTANTS,
    Mutant,
    doubled,
    dropping,
    expert,
    first_layer,
    frozen,
    on_the_wire,
    own_norm,
    uneven_weight,
)

LAYER, LAST_STAGE = "layers.0", "3.moe"


@contextmanager
def divided_by_the_world(engine: Any) -> Iterator[None]:
    """DeepSpeed's divisor of experts' gradients, which counts sequence ranks."""
    from ds_moe_ep.engine.layouts.sequence import REDUCE_EXPERTS

    scaled = vars(engine).pop(REDUCE_EXPERTS)
    yield
    vars(engine)[REDUCE_EXPERTS] = scaled


@contextmanager
def reduced_with_others(engine: Any) -> Iterator[None]:
    """Experts' gradients are summed over ranks that hold other experts."""
    from deepspeed.utils import groups

    names = groups._get_expert_data_parallel_group_dict()
    before = dict(names)
    names.update({name: groups._get_expert_parallel_group(name) for name in names})
    yield
    names.update(before)


class Forgetful(TensorRanks):
    """Tensor ranks that keep their results to themselves."""

    def early_gather(self, num_tokens: int) -> None:
        return None

    def begin_gather(self, results_TD: torch.Tensor, num_tokens: int, early: Any = None) -> Callable[[], torch.Tensor]:
        rows_TD = results_TD.new_zeros(num_tokens, *results_TD.shape[1:])
        first, count = self.spans(num_tokens).span(self.rank)
        rows_TD[first : first + count] = results_TD
        return lambda: rows_TD


@contextmanager
def not_gathered(engine: Any) -> Iterator[None]:
    """In the last layer, so that no other sees tokens that differ."""
    layer = engine.module.layers[1].deepspeed_moe
    ranks = layer.tensor_ranks
    layer.share_tokens(Forgetful(ranks.group, ranks.rank, ranks.size))
    yield
    layer.share_tokens(ranks)


@contextmanager
def without_marks(engine: Any) -> Iterator[None]:
    """The norm takes experts for parameters that all tensor ranks have alike."""
    from ds_moe_ep.engine.layouts.tensor import OWN_MARK

    marked = [each for each in engine.module.parameters() if hasattr(each, OWN_MARK)]
    for parameter in marked:
        delattr(parameter, OWN_MARK)
    yield
    for parameter in marked:
        setattr(parameter, OWN_MARK, True)


@contextmanager
def gates_apart(engine: Any) -> Iterator[None]:
    """The last tensor rank's gate is another."""
    weight = first_layer(engine).deepspeed_moe.gate.wg.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight += 1e-3 * (dist.get_rank() == 3)
    yield
    weight.data.copy_(before)


@contextmanager
def late_expert(engine: Any) -> Iterator[None]:
    """Gradients of the last stage's experts alone are twice too large."""
    if dist.get_rank() < 2:
        yield
        return
    handle = expert(engine).fc1.weight.register_hook(lambda gradient: 2 * gradient)
    yield
    handle.remove()


@contextmanager
def stale_master(engine: Any) -> Iterator[None]:
    """Nothing of what the optimizer does to a weight of the first layer's experts stays."""
    parameter = _first_expert_weight(engine)
    take_step = engine.optimizer.step

    def step_and_undo(*args: Any, **kwargs: Any) -> Any:
        values = own_master(engine, parameter).values
        before = values.clone()
        result = take_step(*args, **kwargs)
        values.copy_(before)
        return result

    with patch.object(engine.optimizer, "step", step_and_undo):
        yield


@contextmanager
def doubled_weight(engine: Any) -> Iterator[None]:
    handle = _first_expert_weight(engine).register_hook(lambda gradient: 2 * gradient)
    yield
    handle.remove()


def tokens_twice(engine: Any) -> Any:
    """Each tensor rank takes all tokens to the experts."""
    return planted("tokens counted twice")


def _first_expert_weight(engine: Any) -> torch.nn.Parameter:
    return next(iter(viewed_layers(engine.module)[0].stored_parameters().values()))


OF_SEQUENCES = (
    Mutant("divided by the world", SEQUENCE, divided_by_the_world, "gradients", "0.5 times as large", LAYER),
    Mutant("reduced with others", SEQUENCE, reduced_with_others, "replicas", "differs from the copy", LAYER),
    Mutant("own norm", SEQUENCE, own_norm, "norm", "all experts counted once"),
    Mutant("frozen", SEQUENCE, frozen, "groups", "in no group of the optimizer", LAYER),
    Mutant("uneven weight", SEQUENCE, uneven_weight, "balance", "has a weight of 0.1 in a micro-batch", LAYER, 1),
)
OF_TENSOR_RANKS = (
    Mutant("not gathered", TENSOR, not_gathered, "gradients", "the output is not the dense model's", "layers.1"),
    Mutant(
        "gradients not gathered",
        TENSOR,
        lambda engine: planted("gradients that are not gathered"),
        "gradients",
        "gradient of the routing weights is not the dense model's",
        LAYER,
    ),
    Mutant(
        "tokens twice",
        TENSOR,
        tokens_twice,
        "gradients",
        "2 times as large",
        f"{LAYER} expert",
    ),
    Mutant("without marks", TENSOR, without_marks, "norm", "that of all gradients is"),
    Mutant("gates apart", TENSOR, gates_apart, "replicas", "differs from the copy", "enter"),
)
OF_STAGES = (
    Mutant("late expert", STAGES, late_expert, "gradients", "2 times as large", f"{LAST_STAGE} expert 1 fc1.weight"),
    Mutant("frozen", STAGES, frozen, "groups", "in no group of the optimizer", "1.moe"),
    Mutant("own norm", STAGES, own_norm, "norm", "all experts counted once"),
    Mutant(
        "dropping",
        STAGES,
        partial(dropping, file="layer_0_expert_3_mp_rank_01_model_states.pt"),
        "checkpoint",
        "is not in the checkpoint's files",
        f"{LAST_STAGE} expert 3",
        0,
        checkpoint=True,
    ),
    Mutant("gates apart", STAGES, gates_apart, "replicas", "differs from the copy on rank 2", LAST_STAGE, 3),
    Mutant("doubled", STAGES, doubled, "gradients", "2 times as large", "1.moe expert 1"),
)
OF_OFFLOAD = (
    Mutant("doubled", OFFLOAD, doubled, "gradients", "2 times as large", f"{LAYER} expert 1 fc1.weight"),
    Mutant("stale", OFFLOAD, stale_master, "movement", "no step moved it", f"{LAYER} expert"),
    Mutant("uneven weight", OFFLOAD, uneven_weight, "balance", "has a weight of 0.1 in a micro-batch", LAYER, 1),
)
OF_ZERO_3 = (
    Mutant("doubled", ZERO_3, doubled_weight, "gradients", "2 times as large", "model.layers.0.mlp expert"),
    Mutant("stale", ZERO_3, stale_master, "movement", "no step moved it", "model.layers.0.mlp expert"),
    Mutant("wire", ZERO_3, on_the_wire, "gradients", "output is not the dense model's", "model.layers.0.mlp", 1),
)
OF_MORE = (
    Mutant("doubled", CUT, doubled_weight, "gradients", "2 times as large"),
    Mutant("stale", CUT, stale_master, "movement", "no step moved it"),
    Mutant("doubled", AUTOTP_RANKS, doubled_weight, "gradients", "2 times as large", f"{LAYER} expert"),
    Mutant("tokens twice", AUTOTP_RANKS, tokens_twice, "gradients", "2 times as large", f"{LAYER} expert"),
    Mutant("doubled", FOLDED, doubled_weight, "gradients", "2 times as large", "model.layers.0.mlp expert"),
    Mutant("tokens twice", FOLDED, tokens_twice, "gradients", "2 times as large", "model.layers.0.mlp expert"),
)
OF_FOLDED_3 = (
    Mutant("doubled", FOLDED_3, doubled_weight, "gradients", "2 times as large", "model.layers.0.mlp expert"),
    Mutant("stale", FOLDED_3, stale_master, "movement", "no step moved it", "model.layers.0.mlp expert"),
)
LAYOUT_MUTANTS = (*OF_SEQUENCES, *OF_TENSOR_RANKS, *OF_STAGES, *OF_MORE, *OF_FOLDED_3)

BY_NAME = {mutant.name: mutant for mutant in (*MUTANTS, *MORE_MUTANTS)}
# What is planted in one engine at once: each of the ten public reports, and a fault per kind of group.
TOGETHER: tuple[tuple[Mutant, ...], ...] = (
    (BY_NAME["frozen"], BY_NAME["double softmax"], BY_NAME["own norm"]),
    (BY_NAME["momentum"], BY_NAME["packed"]),
    (BY_NAME["dropping"], BY_NAME["doubled"]),
    (BY_NAME["without bias"], BY_NAME["unmoved bias"]),
    (BY_NAME["drifting scale"],),
    tuple(each for each in OF_SEQUENCES if each.name in ("divided by the world", "frozen", "uneven weight")),
    tuple(each for each in OF_TENSOR_RANKS if each.name in ("tokens twice", "without marks")),
    OF_FOLDED_3,
    tuple(each for each in OF_STAGES if each.name in ("late expert", "frozen", "own norm")),
)
